"""Figures as SVG, by matplotlib; the same figure gives the same file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from foreword.report.marks import without_marks
from foreword.report.parts import Figure, HeatMap, Lines, Scatter
from foreword.report.text import scale

SETTINGS = {"svg.hashsalt": "foreword", "svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"}
LINES_AREA = (0.11, 0.13, 0.86, 0.79)
"""Left, bottom, width and height of lines in their figure: fixed, which takes half the time of finding it."""

FEW_DECADES = 1000.0
"""Up to this ratio of its ends, an axis has plain numbers, and 2 and 5 of each decade are labelled too."""


def to_svg(figure: Figure) -> str:
    """Return a figure as SVG."""
    stream = io.BytesIO()
    _save(figure, stream, "svg")
    return stream.getvalue().decode()


def to_png(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG."""
    with open(path, "wb") as stream:
        _save(figure, stream, "png")


def _save(figure: Figure, stream: Any, form: str) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(SETTINGS):
        lines = isinstance(figure, Lines)
        canvas = Canvas(figsize=_size(figure), layout=None if lines else "constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.add_axes(LINES_AREA) if lines else canvas.add_subplot()
        if isinstance(figure, HeatMap):
            _heat_map(canvas, axes, figure)
        elif isinstance(figure, Scatter):
            _scatter(axes, figure)
        else:
            _lines(axes, figure)
        axes.set_title(_plain(figure.title), fontsize=11)
        metadata = {"Date": None} if form == "svg" else None
        canvas.savefig(stream, format=form, metadata=metadata, dpi=150)


def _size(figure: Figure) -> tuple[float, float]:
    if isinstance(figure, HeatMap):
        return min(14.0, max(5.0, 2.5 + 0.28 * len(figure.x))), min(12.0, max(2.5, 1.4 + 0.24 * len(figure.y)))
    return 7.5, 4.5


def _heat_map(canvas: Any, axes: Any, heat: HeatMap) -> None:
    low, high = scale(heat)
    values = [[float("nan") if value is None else value for value in row] for row in heat.values]
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    canvas.colorbar(image, ax=axes)
    _ticks(axes.set_xticks, heat.x)
    _ticks(axes.set_yticks, heat.y)
    axes.set_xlabel(_plain(heat.x_title))
    axes.set_ylabel(_plain(heat.y_title))


def _ticks(set_ticks: Any, names: tuple[str, ...]) -> None:
    """Label at most 32 places, evenly."""
    step = max(1, -(-len(names) // 32))
    set_ticks(range(0, len(names), step), [_plain(name) for name in names[::step]])


def _scatter(axes: Any, figure: Scatter) -> None:
    for point in figure.points:
        if point.low is not None and point.high is not None:
            axes.plot([point.x, point.x], [point.low, point.high], color="#888", linewidth=1, zorder=1)
    front = sorted((point.x, point.y) for point in figure.points if point.on_front)
    if front:
        axes.plot(*zip(*front, strict=True), color="#c44", linewidth=1, linestyle="--", zorder=1)
    colors = ["#c44" if point.on_front else "#356" for point in figure.points]
    axes.scatter([point.x for point in figure.points], [point.y for point in figure.points], c=colors, zorder=2)
    for point in figure.points:
        axes.annotate(_plain(point.label), (point.x, point.y), xytext=(6, 5), textcoords="offset points", fontsize=9)
    axes.margins(x=0.12, y=0.12)
    _axes(axes, figure)


def _lines(axes: Any, figure: Lines) -> None:
    for name, points in figure.series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker=".", label=_plain(name))
    if figure.series:
        axes.legend(fontsize=9, frameon=False)
    _axes(axes, figure)


def _axes(axes: Any, figure: Scatter | Lines) -> None:
    for is_log, set_scale, axis in (
        (figure.x_log, axes.set_xscale, axes.xaxis),
        (figure.y_log, axes.set_yscale, axes.yaxis),
    ):
        if is_log:
            set_scale("log")
            low, high = axis.get_view_interval()
            if high < FEW_DECADES * low:
                axis.set_major_formatter(_number)
                axis.set_minor_formatter(_number)
    axes.set_xlabel(_plain(figure.x_title))
    axes.set_ylabel(_plain(figure.y_title))
    axes.grid(alpha=0.25)


def _number(value: float, _: int) -> str:
    """Label 1, 2 and 5 of each decade, as plain numbers."""
    return f"{value:g}" if f"{value:e}"[:3] in ("1.0", "2.0", "5.0") else ""


def _plain(text: str) -> str:
    return without_marks(text).replace("$", r"\$")
