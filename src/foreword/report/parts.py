"""What a report is made of. Plain data: no part knows how it will be shown.

Text may hold two marks, in all its places: `code` between backticks and **strong** between double asterisks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | None
"""A table's cell; floats are shown to three digits, None as a dash."""


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list; `numbered` counts from 1."""

    items: tuple[str, ...]
    numbered: bool = False


@dataclass(frozen=True, slots=True)
class Code:
    """Lines shown as they stand: a command, a formula, a file."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under column names; every row is as long as `columns`."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for place, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {place} has {len(row)} cells for {len(self.columns)} columns")

    @property
    def is_number(self) -> tuple[bool, ...]:
        """Whether each column holds numbers only; such columns are aligned at the right."""
        cells = (tuple(row[place] for row in self.rows) for place in range(len(self.columns)))
        return tuple(bool(column) and all(isinstance(cell, int | float | None) for cell in column) for column in cells)


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Values over two axes: `values[y][x]`, or None where there is none; `low` to `high` is the scale of colours."""

    title: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    x_title: str = ""
    y_title: str = ""
    low: float | None = None
    """None is the least value."""
    high: float | None = None
    """None is the largest value."""


@dataclass(frozen=True, slots=True)
class Point:
    """One labelled point; `on_front` are joined by a line; `low` and `high` are its interval along y."""

    label: str
    x: float
    y: float
    on_front: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Scatter:
    """Labelled points, as a Pareto picture is."""

    title: str
    x_title: str
    y_title: str
    points: tuple[Point, ...]
    x_log: bool = False
    y_log: bool = False


@dataclass(frozen=True, slots=True)
class Lines:
    """Series over one axis: `series[name]` are its (x, y)."""

    title: str
    x_title: str
    y_title: str
    series: Mapping[str, tuple[tuple[float, float], ...]]
    x_log: bool = False
    y_log: bool = False


Block = Text | Bullets | Code | Table | HeatMap | Scatter | Lines
Figure = HeatMap | Scatter | Lines


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """A whole report; `data` holds its numbers for programs, JSON-ready."""

    title: str
    sections: tuple[Section, ...]
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return title, numbers and text, JSON-ready; each block carries its `kind`."""
        sections = [
            {"title": section.title, "blocks": [_block_json(block) for block in section.blocks]}
            for section in self.sections
        ]
        return {"title": self.title, "data": dict(self.data), "sections": sections}


def show_cell(cell: Cell) -> str:
    """Return a cell as text: floats to three digits, None as a dash."""
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _block_json(block: Block) -> dict[str, Any]:
    return {"kind": type(block).__name__.lower(), **dataclasses.asdict(block)}
