"""A run's curves, as data and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreword.core.artefact import write_atomically


def write_history(folder: Path, name: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Write `<name>.history.jsonl` and `<name>.png` into `folder`."""
    lines = "".join(json.dumps(row) + "\n" for row in history)
    write_atomically(folder / f"{name}.history.jsonl", lines.encode())
    draw_curves(folder / f"{name}.png", name, history)


def draw_curves(path: Path, title: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw training loss, dev loss and dev metric over the steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in history], [row["loss"] for row in history], color="0.7", label="training loss")
    for key, colour, label in (("dev_loss", "tab:blue", "dev loss"), ("dev_metric", "tab:green", "dev metric")):
        rows = [row for row in history if key in row]
        if rows:
            where = axes if key == "dev_loss" else axes.twinx()
            where.plot([row["step"] for row in rows], [row[key] for row in rows], "o-", color=colour, label=label)
            where.legend(loc="upper right" if key == "dev_loss" else "lower right")
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="nats per target token", title=title)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=110)
