"""A comparison as a report: what it says in words, tables, Pareto pictures, and how everything was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from foreword.compare.plan import METHODS
from foreword.compare.result import Comparison, MeasuredRow, Paired, pareto_front
from foreword.report import Bullets, Point, Report, Scatter, Section, Table, Text

NAMES = {"hard_text": "text", "few_shot": "few-shot", "lora": "LoRA"}
"""Where a method's name in reports differs."""
UNITS = ("B", "KB", "MB", "GB")


def report(comparison: Comparison) -> Report:
    """Return the report of one task: findings, quality, cost, pictures, method."""
    sections = [
        Section("What it says", (Bullets(tuple(findings(comparison))),)),
        Section("Quality", (_quality(comparison),)),
        Section("Cost", (_cost(comparison.rows),)),
        Section("Pareto pictures", (by_bytes(comparison), by_latency(comparison))),
        Section("How it was measured", (Bullets(tuple(_conditions(comparison))),)),
    ]
    title = f"{comparison.task} on {comparison.base}: {', '.join(show(row.method) for row in comparison.rows)}"
    return Report(title, tuple(sections), comparison.to_json())


def overview(comparisons: Sequence[Comparison]) -> Report:
    """Return one report of several tasks: scores side by side, costs as medians, a line per task, then each task."""
    methods = [method for method in METHODS if any(_find(one, method) for one in comparisons)]
    bases = sorted({one.base for one in comparisons})
    scores = Table(
        ("task", "metric", "rows", *map(show, methods)),
        tuple(
            (one.task, one.metric, max(row.num_rows for row in one.rows), *(_score_cell(one, m) for m in methods))
            for one in comparisons
        ),
        "Score with its 95 % interval; **strong** where the paired tests cannot tell it from the task's best.",
    )
    merged = [_median_row(method, [row for one in comparisons if (row := _find(one, method))]) for method in methods]
    words = tuple(f"**{one.task}**: {' '.join(findings(one)[:2])}" for one in comparisons)
    parts = (
        Section("Scores", (scores, Bullets(words))),
        Section(
            "Cost", (Text("Medians over the tasks." if len(comparisons) > 1 else "Of the one task."), _cost(merged))
        ),
        *(Section(one.task, (_quality(one), _cost(one.rows), by_bytes(one))) for one in comparisons),
        Section("How it was measured", (Bullets(tuple(_conditions(comparisons[0]))),)),
    )
    count = f"{len(comparisons)} task{'' if len(comparisons) == 1 else 's'}"
    title = f"{count} on {', '.join(bases)}: methods under one budget"
    return Report(title, parts, {"tasks": [one.to_json() for one in comparisons]})


def findings(comparison: Comparison) -> list[str]:
    """Return what the numbers and the paired tests say, in sentences."""
    best = comparison.best
    if best is None:
        return ["No method could be judged.", *_failures(comparison)]
    low, high = best.interval or (0.0, 0.0)
    if not best.score:
        lines = [f"No method scores above 0 on {best.num_rows} test rows."]
    else:
        lines = [
            f"{show(best.method)} scores highest: {comparison.metric} {best.score:.3f} [{low:.3f}, {high:.3f}]"
            f" on {best.num_rows} test rows."
        ]
    return [*lines, *_against_best(comparison), *_against_text(comparison), *_front(comparison), *_failures(comparison)]


def show(method: str) -> str:
    """Return a method's name as reports write it."""
    return NAMES.get(method, method)


def show_bytes(count: int | float | None) -> str | None:
    """Return bytes with a decimal unit: 15.4 KB."""
    if count is None:
        return None
    size, place = float(count), 0
    while size >= 1000 and place < len(UNITS) - 1:
        size, place = size / 1000, place + 1
    return f"{size:.0f} B" if place == 0 else f"{size:.3g} {UNITS[place]}"


def by_bytes(comparison: Comparison) -> Scatter:
    """Return the picture of score against bytes per task; what nothing beats in both is on the front."""
    return _scatter(comparison, "bytes per task", lambda row: max(row.bytes_per_task or 0, 1), x_log=True)


def by_latency(comparison: Comparison) -> Scatter:
    """Return the picture of score against the latency of one request."""
    return _scatter(comparison, "whole answer of one request, ms", lambda row: row.latency_ms, x_log=False)


def _scatter(
    comparison: Comparison, x_title: str, cost: Callable[[MeasuredRow], float | None], *, x_log: bool
) -> Scatter:
    rows = [row for row in comparison.judged if cost(row) is not None]
    front = pareto_front(rows, lambda row: cost(row) or 0.0, lambda row: row.score or 0.0)
    points = tuple(
        Point(
            label=show(row.method),
            x=float(cost(row) or 0.0),
            y=row.score or 0.0,
            on_front=row in front,
            low=row.interval[0] if row.interval else None,
            high=row.interval[1] if row.interval else None,
        )
        for row in rows
    )
    return Scatter(f"{comparison.task}: score against {x_title}", x_title, comparison.metric, points, x_log=x_log)


def _against_best(comparison: Comparison) -> list[str]:
    level, best = comparison.level_with_best(), comparison.best
    tests = [test for test in comparison.paired if test.role == "best"]
    if best is None or not tests:
        return []
    alike = [row for row in level if row is not best]
    behind = [test for test in tests if test.verdict == "worse"]
    lines = []
    if alike:
        lines.append(f"{_join(show(row.method) for row in alike)} cannot be told from it on these rows.")
    if behind:
        parts = (f"{show(test.method)} ({test.difference:+.3f}{_p(test)})" for test in behind)
        lines.append(f"Worse than it: {_join(parts)}.")
    sizes = [row for row in level if row.bytes_per_task is not None]
    least = min(sizes, key=lambda row: row.bytes_per_task or 0, default=None)
    if alike and least is not None and best.score:
        lines.append(
            f"Among those level with the best, {show(least.method)} takes the fewest bytes per task"
            f" ({show_bytes(least.bytes_per_task)})."
        )
    return lines


def _against_text(comparison: Comparison) -> list[str]:
    tests = [test for test in comparison.paired if test.role == "hard_text"]
    if not tests:
        return []
    groups: dict[str, list[str]] = {}
    for test in tests:
        groups.setdefault(test.verdict, []).append(f"{show(test.method)} ({test.difference:+.3f}{_p(test)})")
    words = {"better": "better", "no difference": "not told apart", "worse": "worse"}
    found = (f"{words[verdict]}: {_join(groups[verdict])}" for verdict in words if verdict in groups)
    return [f"Against the text alone, {'; '.join(found)}."]


def _front(comparison: Comparison) -> list[str]:
    rows = [row for row in comparison.judged if row.bytes_per_task is not None]
    front = pareto_front(rows, lambda row: row.bytes_per_task or 0, lambda row: row.score or 0.0)
    ordered = sorted(front, key=lambda row: row.bytes_per_task or 0)
    parts = (f"{show(row.method)} ({show_bytes(row.bytes_per_task)}, {row.score:.3f})" for row in ordered)
    return [f"Nothing is both smaller and better than {_join(parts)}."]


def _failures(comparison: Comparison) -> list[str]:
    return [f"{show(row.method)} failed: {row.error['message']}" for row in comparison.rows if row.error]


def _quality(comparison: Comparison) -> Table:
    tests = {(test.role, test.method): test for test in comparison.paired}
    rows = []
    for row in comparison.rows:
        interval = None if row.interval is None else f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
        score = None if row.score is None else f"{row.score:.3f}"
        is_best = row is comparison.best
        against_best = "the best" if is_best else _verdict(tests.get(("best", row.method)))
        text = tests.get(("hard_text", row.method)) or (
            tests.get(("best", row.method)) if comparison.best and comparison.best.method == "hard_text" else None
        )
        against_text = None if row.method == "hard_text" else _verdict(text)
        cut = row.num_cut if row.score is not None else None
        rows.append((show(row.method), score, interval, against_best, against_text, cut))
    alpha = next((test.alpha for test in comparison.paired), None)
    level = "" if alpha is None else f" Paired verdicts at {100 * alpha:.3g} % each, 5 % over all tests of a column."
    return Table(
        ("method", comparison.metric, "95 % interval", "against the best", "against text", "answers cut"),
        tuple(rows),
        f"{comparison.task}, {_rows(comparison)} test rows, {_decoding(comparison)} decoding.{level}",
    )


def _cost(rows: Sequence[MeasuredRow]) -> Table:
    columns = (
        "method", "bytes per task", "numbers alone", "training s", "step ms", "training memory",
        "positions", "first token ms", "answer ms", "start cached: first, answer ms", "tokens/s mixed",
    )  # fmt: skip

    def cached(row: MeasuredRow) -> str | None:
        if row.first_token_cached_ms is None or row.latency_cached_ms is None:
            return None
        return f"{row.first_token_cached_ms:.1f}, {row.latency_cached_ms:.1f}"

    table = tuple(
        (
            show(row.method),
            show_bytes(row.bytes_per_task),
            show_bytes(row.tensor_bytes) if row.tensor_bytes else None,
            None if row.training_s is None else f"{row.training_s:.1f}",
            None if row.step_ms is None else f"{row.step_ms:.0f}",
            show_bytes(row.training_peak_bytes),
            None if row.prompt_positions is None else f"{row.prompt_positions:.0f}",
            None if row.first_token_ms is None else f"{row.first_token_ms:.1f}",
            None if row.latency_ms is None else f"{row.latency_ms:.1f}",
            cached(row),
            None if row.throughput_tokens_per_s is None else f"{row.throughput_tokens_per_s:.0f}",
        )
        for row in rows
    )
    caption = "Training memory is the peak on top of the base. LoRA's mixed batch is two batches, one after the other."
    return Table(columns, table, caption)


def _conditions(comparison: Comparison) -> list[str]:
    budget, settings, machine = comparison.budget, comparison.settings, comparison.machine
    rates = _join(f"{show(row.method)} {row.lr:g}" for row in comparison.rows if row.lr is not None)
    how = sorted({row.training_peak_how for row in comparison.rows if row.training_peak_bytes})
    lines = [
        f"One budget: {budget['steps']} steps of {budget['batch_size'] * budget['accumulate']} rows out of"
        f" {budget['train_rows']}, in one order, AdamW, {budget['schedule']} schedule after {budget['warmup_steps']}"
        f" steps of warm-up, clip {budget['clip']}, seed {budget['seed']}; the best of {budget['eval_rows']} dev rows"
        f" by {budget['best_by']} every {budget['eval_every']} steps is kept. {budget['num_vectors']} vectors; LoRA of"
        f" rank {budget['lora']['rank']} on {budget['lora']['targets']} through PEFT.",
        f"Peak learning rates, each method's own: {rates}." if rates else "Nothing was trained.",
        "Intervals and tests cover the choice of test rows, not the choice of a training seed: one was run.",
        "The best is the highest score on the rows that the tests use, so chance favours it; a method that is level"
        " with it in spite of that is level.",
        f"Latency: median of {settings['timing_rounds']} requests, one at a time, methods by turns, on the embedded"
        f" engine; each makes {settings['answer_tokens']} tokens, so that a talkative answer is not counted as a slow"
        " method. A plain prompt is computed whole for each request; with its start cached, only what follows is.",
        f"Mixed batch: {settings['mixed_requests']} requests at once, half the task's, half plain. LoRA changes the"
        " layers that all rows of a batch pass, so its requests and the plain ones run one after the other here;"
        " engines with kernels for many adapters can mix them.",
        "LoRA runs unmerged in the same engine, with PEFT's layers; merged into the base it would cost no time and a"
        " whole copy of the base per task.",
    ]
    if how:
        lines.append(f"Training memory: {_join(how)}.")
    place = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    lines.append(f"{place}, {comparison.dtype}, {comparison.date}. {versions}.")
    return lines


def _median_row(method: str, rows: Sequence[MeasuredRow]) -> MeasuredRow:
    """Return one row with the median of each cost over tasks."""

    def middle(key: str) -> Any:
        values = [value for row in rows if (value := getattr(row, key)) is not None]
        return statistics.median(values) if values else None

    keys = (
        "bytes_per_task", "tensor_bytes", "training_s", "step_ms", "training_peak_bytes", "prompt_positions",
        "first_token_ms", "latency_ms", "first_token_cached_ms", "latency_cached_ms", "throughput_tokens_per_s",
    )  # fmt: skip
    return MeasuredRow(method=method, **{key: middle(key) for key in keys})


def _score_cell(comparison: Comparison, method: str) -> str | None:
    row = _find(comparison, method)
    if row is None or row.score is None or row.interval is None:
        return None
    text = f"{row.score:.3f} [{row.interval[0]:.3f}, {row.interval[1]:.3f}]"
    return f"**{text}**" if row.score and row in comparison.level_with_best() else text


def _find(comparison: Comparison, method: str) -> MeasuredRow | None:
    return next((row for row in comparison.rows if row.method == method), None)


def _verdict(test: Paired | None) -> str | None:
    if test is None:
        return None
    low, high = test.interval
    return f"{test.verdict}: {test.difference:+.3f} [{low:+.3f}, {high:+.3f}]{_p(test)}"


def _p(test: Paired) -> str:
    return "" if test.p_value is None else f", p {test.p_value:.2g}"


def _rows(comparison: Comparison) -> int:
    return max((row.num_rows for row in comparison.rows), default=0)


def _decoding(comparison: Comparison) -> str:
    return str(comparison.settings["decoding"])


def _join(parts: Iterable[str]) -> str:
    listed = list(parts)
    return listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " and " + listed[-1] if listed else ""
