"""Where a registry lies: arguments, environment, home; and what is said when it cannot lie there."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreword.errors import ConfigError, RegistryError
from foreword.registry.blobs import open_blobs
from foreword.registry.database import open_engine
from foreword.registry.store import Registry

from .conftest import EVERYWHERE, Factory, Place, finish, start


@pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
def test_the_environment_says_where(place: Place, artefact: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    with Registry.open() as registry:
        version = registry.publish(artefact())
    with place.open() as registry:
        assert registry.resolve("triage") == version
        assert registry.header(version).task == "triage"
    assert (place.home / "registry.sqlite").exists() == (place.database_url is None)
    assert (place.home / "blobs").exists() == (place.blob_url is None)


def test_arguments_go_before_the_environment(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def url(name: str) -> str:
        return f"sqlite:///{tmp_path / name}.sqlite"

    monkeypatch.setenv("FOREWORD_HOME", str(tmp_path / "environment"))
    monkeypatch.setenv("FOREWORD_DATABASE_URL", url("environment"))
    monkeypatch.setenv("FOREWORD_BLOB_URL", str(tmp_path / "blobs-environment"))
    with Registry.open(database_url=url("argument")) as registry:
        assert registry.blobs.url == str(tmp_path / "blobs-environment")
    assert (tmp_path / "argument.sqlite").exists() and not (tmp_path / "environment.sqlite").exists()
    with Registry.open(blob_url=str(tmp_path / "blobs-argument")) as registry:
        assert registry.blobs.url == str(tmp_path / "blobs-argument")
    assert (tmp_path / "environment.sqlite").exists()
    with Registry.open(home) as registry:  # an explicit home is the whole registry
        assert registry.blobs.url == str(home / "blobs")
    assert (home / "registry.sqlite").exists()


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_postgresql_means_psycopg(scheme: str) -> None:
    engine = open_engine(f"{scheme}://ann:secret@host/db")
    assert (engine.dialect.name, engine.dialect.driver) == ("postgresql", "psycopg")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:s3cret@127.0.0.1:1/db",
        "postgres://ann:s3cret@127.0.0.1:1/db",
        "postgresql://127.0.0.1:1/db?user=ann&password=s3cret",
        "postgresql://ann:s3cret@host:port/db",
        "postgresql+nothing://ann:s3cret@host/db",
        "postgres//ann:s3cret@host/db",
        "mysql://ann:s3cret@host/db",
    ],
)
def test_no_error_shows_a_password(home: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("FOREWORD_HOME", str(home))
    monkeypatch.setenv("FOREWORD_DATABASE_URL", url)
    with pytest.raises((ConfigError, RegistryError)) as caught:
        Registry.open()
    assert "s3cret" not in str(caught.value)
    assert caught.value.hint


def test_no_error_shows_a_blob_stores_password(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_blobs("gopher://ann:s3cret@host/blobs?token=s3cret", tmp_path)
    assert "s3cret" not in str(caught.value)
    assert "gopher://host/blobs" in str(caught.value)


@pytest.mark.parametrize(
    ("package", "variable", "url", "cure"),
    [
        ("psycopg", "FOREWORD_DATABASE_URL", "postgresql://ann:s3cret@host/db", "pip install 'psycopg[binary]'"),
        ("s3fs", "FOREWORD_BLOB_URL", "s3://bucket/blobs", "pip install s3fs"),
    ],
)
def test_a_package_that_is_not_there(home: Path, package: str, variable: str, url: str, cure: str) -> None:
    code = """
        import sys
        sys.modules[sys.argv[1]] = None
        from foreword.errors import ConfigError
        from foreword.registry.store import Registry
        try:
            Registry.open()
        except ConfigError as error:
            print(error)
    """
    out = finish(start(code, package, **{**Place(home).environment, variable: url}))
    assert out.splitlines()[-1] == cure
    assert "s3cret" not in out
