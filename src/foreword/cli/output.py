"""What every command prints with: JSON for programs, rich tables for people."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_json(data: Any) -> None:
    """Print JSON on stdout, and nothing else; NaN and Inf, which JSON has not, become null."""
    sys.stdout.write(json.dumps(_finite(data), indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def console() -> Console:
    """Return a console on stdout that prints text as it stands: square brackets are no markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200  # a file has no edge at 80
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True, width=width)


def print_table(
    columns: Iterable[str], rows: Iterable[Iterable[object]], title: str = "", whole: Collection[str] = ()
) -> None:
    """Print a table; None is shown as a dash. No value can send control codes to the terminal.

    Columns named in `whole` are never wrapped.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column in whole, overflow="fold")
    for row in rows:
        table.add_row(*(plain(cell) for cell in row))
    console().print(table, soft_wrap=False)


def plain(value: object) -> str:
    """Return a value as one line of text, control characters written out."""
    text = "-" if value is None else str(value)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
