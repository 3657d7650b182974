"""A report as text for a terminal: wrapped paragraphs, aligned tables, figures as characters."""

from __future__ import annotations

import textwrap

from foreword.report.marks import without_marks
from foreword.report.parts import Block, Bullets, Code, Figure, HeatMap, Lines, Report, Scatter, Table, Text, show_cell

WIDTH = 100
SHADES = "·░▒▓█"
"""From the low end of a heat map's scale to its high end."""


def to_text(report: Report) -> str:
    """Return the whole report, ending in a newline."""
    parts = [f"{report.title}\n{'=' * len(report.title)}"]
    for section in report.sections:
        parts.append(f"{section.title}\n{'-' * len(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(printable(part) for part in parts) + "\n"


def printable(text: str) -> str:
    """Return text that cannot send control codes to a terminal: all but line ends are written out."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return textwrap.fill(without_marks(block.text), WIDTH)
    if isinstance(block, Bullets):
        return "\n".join(_item(place, item, block.numbered) for place, item in enumerate(block.items, 1))
    if isinstance(block, Code):
        return textwrap.indent(block.text, "    ")
    if isinstance(block, Table):
        return _table(block)
    return figure_as_text(block)


def figure_as_text(figure: Figure) -> str:
    """Return a heat map in shades, and a figure of points as the table of its numbers."""
    return _heat_map(figure) if isinstance(figure, HeatMap) else _points(figure)


def _item(place: int, item: str, numbered: bool) -> str:
    lead = f"{place}. " if numbered else "- "
    return textwrap.fill(without_marks(item), WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead))


def _table(table: Table) -> str:
    cells = [[without_marks(cell) for cell in table.columns]]
    cells += [[without_marks(show_cell(cell)).replace("\n", " ") for cell in row] for row in table.rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, table.is_number, strict=True)
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    caption = [textwrap.fill(without_marks(table.caption), WIDTH)] if table.caption else []
    return "\n".join([*caption, *lines])


def _heat_map(heat: HeatMap) -> str:
    low, high = scale(heat)
    span = (high - low) or 1.0
    margin = max((len(name) for name in heat.y), default=0)
    lines = [f"{without_marks(heat.title)} ({SHADES[0]} {low:.3g} to {SHADES[-1]} {high:.3g})"]
    for name, row in zip(heat.y, heat.values, strict=True):
        shades = "".join("??" if value is None else _shade((value - low) / span) * 2 for value in row)
        lines.append(f"{name.rjust(margin)} {shades}")
    ends = f"{heat.x[0]} … {heat.x[-1]}" if heat.x else ""
    return "\n".join([*lines, f"{' ' * margin} {heat.x_title} {ends}".rstrip()])


def _shade(share: float) -> str:
    return SHADES[round(min(1.0, max(0.0, share)) * (len(SHADES) - 1))]


def _points(figure: Scatter | Lines) -> str:
    if isinstance(figure, Scatter):
        names = ("", figure.x_title, figure.y_title)
        rows = tuple((point.label + " *" * point.on_front, point.x, point.y) for point in figure.points)
        star = "; * on the front" if any(point.on_front for point in figure.points) else ""
        return _table(Table(names, rows, figure.title + star))
    names = ("", figure.x_title, figure.y_title)
    rows = tuple((name, x, y) for name, points in figure.series.items() for x, y in points)
    return _table(Table(names, rows, figure.title))


def scale(heat: HeatMap) -> tuple[float, float]:
    """Return the ends of a heat map's scale."""
    values = [value for row in heat.values for value in row if value is not None]
    low = heat.low if heat.low is not None else min(values, default=0.0)
    return low, heat.high if heat.high is not None else max(values, default=1.0)
