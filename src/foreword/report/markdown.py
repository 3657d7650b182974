"""A report as Markdown, figures beside the file or, where there is no file, as tables."""

from __future__ import annotations

from collections.abc import Mapping

from foreword.report.marks import spans
from foreword.report.parts import Block, Bullets, Code, Figure, HeatMap, Lines, Report, Scatter, Table, Text, show_cell
from foreword.report.text import figure_as_text

_ESCAPED = str.maketrans({char: f"\\{char}" for char in "\\*_[]<>#|"})


def figures_of(report: Report) -> list[Figure]:
    """Return a report's figures in their order."""
    blocks = [block for section in report.sections for block in section.blocks]
    return [block for block in blocks if isinstance(block, HeatMap | Scatter | Lines)]


def to_markdown(report: Report, names: Mapping[int, str]) -> str:
    """Return the whole report; `names` are the figures' files by their place, figures without one become text."""
    parts, place = [f"# {_inline(report.title)}"], 0
    for section in report.sections:
        parts.append(f"## {_inline(section.title)}")
        for block in section.blocks:
            if isinstance(block, HeatMap | Scatter | Lines):
                parts.append(_figure(block, names.get(place)))
                place += 1
            else:
                parts.append(_block(block))
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return _inline(block.text)
    if isinstance(block, Bullets):
        leads = (f"{place}." if block.numbered else "-" for place in range(1, len(block.items) + 1))
        return "\n".join(f"{lead} {_inline(item)}" for lead, item in zip(leads, block.items, strict=True))
    if isinstance(block, Code):
        fence = "```" if "```" not in block.text else "````"
        return f"{fence}\n{block.text}\n{fence}"
    if isinstance(block, Table):
        return _table(block)
    raise TypeError(f"{type(block).__name__} is a figure")


def _figure(figure: Figure, name: str | None) -> str:
    if name is not None:
        return f"![{_inline(figure.title)}]({name})"
    return _block(Code(figure_as_text(figure)))


def _table(table: Table) -> str:
    lines = [[_inline(name) for name in table.columns], ["---:" if right else "---" for right in table.is_number]]
    lines += [[_inline(show_cell(cell)).replace("\n", " ") for cell in row] for row in table.rows]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_inline(table.caption)}\n\n{rows}" if table.caption else rows


def _inline(text: str) -> str:
    """Return text with its own marks kept and every other mark of Markdown's written out."""
    shown = []
    for mark, part in spans(text):
        if mark == "code":
            shown.append("`" + part.replace("|", "\\|") + "`")
        else:
            escaped = part.translate(_ESCAPED)
            shown.append(f"**{escaped}**" if mark == "strong" else escaped)
    return "".join(shown)
