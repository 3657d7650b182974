"""Reports: sections, tables and figures as data, rendered to the terminal, Markdown, HTML or JSON.

A report is written once, as data; `render` and `write` turn it into whatever its reader wants. Imports no torch.
"""

from foreword.report.parts import (
    Block,
    Bullets,
    Cell,
    Code,
    HeatMap,
    Lines,
    Point,
    Report,
    Scatter,
    Section,
    Table,
    Text,
)
from foreword.report.write import FORMATS, render, write

__all__ = [
    "FORMATS",
    "Block",
    "Bullets",
    "Cell",
    "Code",
    "HeatMap",
    "Lines",
    "Point",
    "Report",
    "Scatter",
    "Section",
    "Table",
    "Text",
    "render",
    "write",
]
