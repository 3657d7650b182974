"""What the tests of commands share."""

import pytest

from tests.command import command_runner


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command line."""
    monkeypatch.setenv("FOREWORD_HOME", str(tmp_path / "home"))
    return command_runner(monkeypatch, capsys)
