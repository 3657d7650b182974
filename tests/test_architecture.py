"""The import rule, the rooms that need no torch, the public names, and the start-up time's cause."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import foreword

SRC = Path(foreword.__file__).parent
ORDER = [
    {"errors"},
    {"config", "report"},
    {"core"},
    {"engine"},
    {"eval", "registry", "advise"},
    {"train", "doctor", "explain", "serve"},
    {"distil", "recipes"},
    {"compare", "demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
NEED_VLLM = {("serve", "vllm_connector"), ("serve", "vllm", "checks"), ("serve", "vllm", "stats")}
"""Imported by tests/vllm, in vLLM's own environment."""
TORCH_FREE = [
    "foreword",
    "foreword.errors",
    "foreword.config",
    "foreword.report",
    "foreword.core.artefact",
    "foreword.core.template",
    "foreword.registry.store",
    "foreword.advise",
    "foreword.engine.request",
    "foreword.engine.scheduler",
    "foreword.engine.kvpool",
    "foreword.serve.gateway",
    "foreword.serve.run_replicas",
    "foreword.cli",
]


def imports(path):
    """Every foreword module that a file imports, also inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "foreword":
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "foreword")


def room(parts):
    return parts[0].removesuffix(".py")


def test_imports_go_one_way_and_never_sideways():
    wrong = []
    for path in sorted(SRC.rglob("*.py")):
        here = room(path.relative_to(SRC).parts)
        if here == "__init__":
            continue
        for module in imports(path):
            if module == "foreword":
                continue
            there = module.split(".")[1]
            if there != here and LEVEL[there] >= LEVEL[here]:
                wrong.append(f"{path.relative_to(SRC)} imports {module}")
    assert not wrong


def test_every_room_has_a_level():
    rooms = {room(path.relative_to(SRC).parts) for path in SRC.rglob("*.py")} - {"__init__"}
    assert rooms <= LEVEL.keys()


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_without_torch(module):
    code = f"import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_sorted_and_complete():
    assert foreword.__all__ == sorted(foreword.__all__)
    assert set(foreword.__all__) == {*foreword._HOME, "__version__"}
    for name in foreword.__all__:
        assert getattr(foreword, name) is not None
    rooms = {room(path.relative_to(SRC).parts) for path in SRC.rglob("*.py")}
    assert not rooms & set(foreword.__all__)  # importing a room binds its name in the package
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        foreword.nothing  # noqa: B018


def test_api_page_names_every_public_name():
    page = (SRC.parents[1] / "docs/api.md").read_text()
    missing = [name for name in foreword.__all__ if not re.search(rf"\b{re.escape(name)}\b", page)]
    assert not missing


def test_cli_imports_nothing_heavy():
    code = "import sys, foreword.cli; print([m for m in ('torch', 'transformers', 'numpy', 'sqlalchemy', 'fastapi', "
    code += "'matplotlib', 'alembic') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_modules_have_docstrings():
    for path in SRC.rglob("*.py"):
        if "versions" not in path.parts:
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_importing_every_module_works():
    for path in SRC.rglob("*.py"):
        parts = path.relative_to(SRC).with_suffix("").parts
        if "migrations" not in parts and parts not in {("__main__",), *NEED_VLLM}:
            importlib.import_module(".".join(("foreword", *parts)).removesuffix(".__init__"))
