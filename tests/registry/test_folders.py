"""The home folder: where it is, and what cannot be one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from foreword.errors import ConfigError
from foreword.registry.store import Registry, home_folder

from .conftest import Factory


@pytest.mark.parametrize("where", ["argument", "environment"])
def test_a_home_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def folder(value: object) -> Path:
        if where == "argument":
            return home_folder(str(value))
        monkeypatch.setenv("FOREWORD_HOME", str(value))
        return home_folder()

    file = tmp_path / "file"
    file.write_text("")
    for value, message in [
        (file, "is a file, not a folder"),
        (file / "below", "Not a directory"),
        ("/proc/foreword", "cannot create"),
        ("~nobody-has-this-name/x", "home directory"),
        ("", "not a folder"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            folder(value)
        assert ("FOREWORD_HOME" in caught.value.message) == (where == "environment")
        assert caught.value.hint
    assert folder(tmp_path / "new" / "home").is_dir()


def test_a_home_that_cannot_be_written() -> None:
    home, user = Path(tempfile.mkdtemp()), os.geteuid()
    home.chmod(0o555)
    try:
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        with pytest.raises(ConfigError, match=r"cannot be written|cannot create"):
            Registry.open(home)
    finally:
        os.seteuid(user)
        home.rmdir()


def test_home_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FOREWORD_HOME", raising=False)
    assert home_folder() == tmp_path / ".foreword"
    monkeypatch.setenv("FOREWORD_HOME", "~/elsewhere")
    assert home_folder() == tmp_path / "elsewhere"
    assert home_folder(tmp_path / "mine") == tmp_path / "mine"


def test_odd_characters_in_the_homes_name(tmp_path: Path, artefact: Factory) -> None:
    home = tmp_path / "a b?c#d%20e:f@g"
    with Registry.open(home) as registry:
        assert registry.publish(artefact()).number == 1
    assert (home / "registry.sqlite").exists()
