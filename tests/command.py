"""Running a command line inside the test's process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import pytest

from foreword.cli import main

Run = Callable[..., tuple[int, str, str]]
"""Arguments of a command -> exit code, standard output, standard error."""


def command_runner(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    first: Sequence[str] = (),
    last: Sequence[str] = (),
) -> Run:
    """Return a function that runs `foreword`, `first`, its own arguments, `last`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foreword", *first, *map(str, arguments), *last])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call
