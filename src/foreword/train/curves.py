"""A run's curves: its history as JSONL, and as figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreword.core.artefact import write_atomically
from foreword.report import Lines

MAX_POINTS = 200
"""Points of a curve at most; of more steps, means of equally many are drawn."""
LOG_FROM = 5
"""From this ratio of the largest loss to the smallest, losses are drawn by their logarithm."""

Points = tuple[tuple[float, float], ...]


def write_history(folder: Path, name: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Write `<name>.history.jsonl` into `folder`."""
    lines = "".join(json.dumps(row) + "\n" for row in history)
    write_atomically(folder / f"{name}.history.jsonl", lines.encode())


def curves(history: Sequence[Mapping[str, Any]]) -> list[Lines]:
    """Return the figures that a history has numbers for: losses, dev metric, learning rate, gradient, displacement."""
    losses = {"training": points(history, "loss"), "dev": points(history, "dev_loss")}
    shown = {name: series for name, series in losses.items() if series}
    figures = [loss_figure("Loss", shown)]
    for key, title, unit in (
        ("dev_metric", "Metric on dev rows", "score"),
        ("displacement", "Distance of the vectors from their start", "share of the start's norm"),
        ("grad_norm", "Norm of the gradient, before clipping", "norm"),
        ("lr", "Learning rate", "relative displacement per step"),
    ):
        if series := points(history, key):
            figures.append(Lines(title, "step", unit, {key.replace("_", " "): series}))
    return figures


def loss_figure(title: str, series: Mapping[str, Points]) -> Lines:
    """Return losses over steps, by their logarithm where they differ much."""
    values = [value for points in series.values() for _, value in points]
    is_wide = bool(values) and 0 < LOG_FROM * min(values) < max(values)
    return Lines(title, "step", "nats per learned token", series, y_log=is_wide)


def points(history: Sequence[Mapping[str, Any]], key: str) -> Points:
    """Return (step, value) of the rows that have `key`; means over equally many rows where they are too many."""
    rows = [(row["step"], row[key]) for row in history if row.get(key) is not None]
    size = -(-len(rows) // MAX_POINTS)
    if size <= 1:
        return tuple(rows)
    bins = (rows[first : first + size] for first in range(0, len(rows), size))
    return tuple((part[-1][0], sum(value for _, value in part) / len(part)) for part in bins)
