"""What the tests of commands share."""

import sys

import pytest

from foreword.cli import main


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command line; return (exit code, standard output, standard error)."""
    monkeypatch.setenv("FOREWORD_HOME", str(tmp_path / "home"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["foreword", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call
