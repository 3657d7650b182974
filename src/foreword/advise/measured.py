"""Measured rows in place of rules: what `foreword compare` found, read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreword.advise.methods import METHODS
from foreword.errors import DataError, did_you_mean

SAME_VECTORS: Mapping[str, str] = {"compiled_prompt": "prompt"}
"""Methods that serve another's vectors, and so have its quality."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRow:
    """One method on one task, as judged."""

    task: str
    method: str
    metric: str
    score: float
    low: float
    """Ends of the 95 % interval of the score."""
    high: float
    numbers: Mapping[str, float]
    """Whatever else was measured: bytes_per_task, training_s, latency_ms, throughput_tokens_per_s, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured on one base."""

    base: str
    rows: tuple[MeasuredRow, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that were judged, in the file's order."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    def of(self, method: str) -> dict[str, MeasuredRow]:
        """Return a method's rows by task; a method that serves another's vectors has that one's."""
        name = SAME_VECTORS.get(method, method)
        return {row.task: row for row in self.rows if row.method == name}

    def best(self, task: str, methods: tuple[str, ...]) -> MeasuredRow | None:
        """Return the best row of a task among `methods`."""
        names = {SAME_VECTORS.get(method, method) for method in methods}
        found = [row for row in self.rows if row.task == task and row.method in names]
        return max(found, key=lambda row: row.score, default=None)

    def losses(self, method: str, methods: tuple[str, ...], target: float | None) -> dict[str, tuple[float, str]]:
        """Return the tasks that a method loses, each with what it lacks in score and the reason in numbers.

        With a target, a task is lost below it. Without, it is lost where the best of `methods` is better beyond doubt:
        its interval lies above the method's score and the method's interval below its score.
        """
        lost: dict[str, tuple[float, str]] = {}
        for task, row in self.of(method).items():
            if target is not None:
                if row.score < target:
                    lost[task] = (target - row.score, f"{row.score:.3f} {row.metric}, target {target:.3f}")
                continue
            best = self.best(task, methods)
            if best is not None and best.low > row.score and row.high < best.score:
                text = f"{row.score:.3f} against {best.score:.3f} {row.metric} by {METHODS[best.method].title.lower()}"
                lost[task] = (best.score - row.score, text)
        return lost


def load_measured(path: str | Path) -> Measured:
    """Read the JSON that `foreword compare` writes. Raises DataError naming file, row and field."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="Check the path of the measured rows.") from error
    except ValueError as error:
        raise DataError(
            f"{path}: malformed JSON: {error}", hint="Give what `foreword compare --json` wrote."
        ) from error
    return measured_from(data, source=str(path))


def measured_from(data: Any, source: str = "measured rows") -> Measured:
    """Build from the parsed JSON: one task with its rows, or `tasks` with several. Raises DataError."""
    if not isinstance(data, Mapping):
        raise DataError(f"{source}: not a JSON object", hint="Give what `foreword compare --json` wrote.")
    parts = data["tasks"] if "tasks" in data else [data]
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise DataError(f"{source}: tasks is not a list of objects")
    rows: list[MeasuredRow] = []
    bases = {str(part["base"]) for part in (data, *parts) if "base" in part}
    if len(bases) > 1:
        raise DataError(f"{source}: rows of several bases: {', '.join(sorted(bases))}", hint="Give one base at a time.")
    for part in parts:
        task = str(part.get("task", "task"))
        found = part.get("rows")
        if not isinstance(found, list):
            raise DataError(f"{source}: task {task!r} has no list of rows")
        rows += [_read_row(row, task, f"{source}: {task} row {place}") for place, row in enumerate(found, 1)]
    if not rows:
        raise DataError(f"{source}: no rows", hint="Run `foreword compare` first.")
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if (row.task, row.method) in seen:
            raise DataError(f"{source}: {row.method} stands twice for task {row.task!r}")
        seen.add((row.task, row.method))
    return Measured(base=next(iter(bases), ""), rows=tuple(rows))


def _read_row(row: Any, task: str, where: str) -> MeasuredRow:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is not an object")
    for key in ("method", "score", "interval"):
        if key not in row:
            raise DataError(f"{where} has no {key}", hint=did_you_mean(key, row))
    if row["method"] not in METHODS:
        raise DataError(f"{where}: unknown method {row['method']!r}", hint=did_you_mean(str(row["method"]), METHODS))
    interval = row["interval"]
    if not isinstance(interval, list) or len(interval) != 2:
        raise DataError(f"{where}: interval = {interval!r} is not [low, high]")
    for number in (row["score"], *interval):
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise DataError(f"{where}: {number!r} is not a finite number")
    if interval[0] > interval[1]:
        raise DataError(f"{where}: interval = {interval!r} ends before it begins")
    numbers = {
        key: float(value)
        for key, value in row.items()
        if key != "score" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return MeasuredRow(
        task=task,
        method=row["method"],
        metric=str(row.get("metric", "score")),
        score=float(row["score"]),
        low=float(interval[0]),
        high=float(interval[1]),
        numbers=numbers,
    )
