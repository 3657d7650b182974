"""What the registry may load: no torch, and Alembic only when a migration has to run."""

from __future__ import annotations

from pathlib import Path

from .conftest import Factory, finish, start


def test_all_of_it_without_torch(home: Path, artefact: Factory) -> None:
    code = """
        import sys
        for name in ("torch", "transformers", "numpy", "safetensors"):
            sys.modules[name] = None
        from foreword.registry.store import Registry
        home, *paths = sys.argv[1:]
        with Registry.open(home) as registry:
            registry.access.create_tenant("shop")
            for path in paths:
                version = registry.publish(path, alias="canary")
            registry.promote("triage@canary")
            registry.diff("triage@1", "triage")
            registry.gc()
            print(registry.header(version).task, "alembic" in sys.modules)
        with Registry.open(home) as registry:
            print(registry.resolve("triage").reference)
    """
    assert finish(start(code, home, artefact(), artefact())) == "triage True\ntriage@2\n"
    code = """
        import sys
        from foreword.registry.store import Registry
        with Registry.open(sys.argv[1]) as registry:
            print(registry.resolve("triage").reference)
        print([name for name in ("alembic", "fsspec", "s3fs", "psycopg", "rich", "torch") if name in sys.modules])
    """
    assert finish(start(code, home)) == "triage@2\n[]\n"


def test_the_commands_load_nothing_before_they_run() -> None:
    code = """
        import sys, typer
        from foreword.cli.registry_commands import register
        register(typer.Typer())
        print([name for name in ("sqlalchemy", "alembic", "fsspec", "torch") if name in sys.modules])
    """
    assert finish(start(code)) == "[]\n"
