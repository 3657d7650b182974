"""A run's report: what was trained on what, how it went, what was kept and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreword.report import Bullets, Cell, Report, Section, Table, Text
from foreword.train.curves import MAX_POINTS, curves
from foreword.train.export import versions

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.train.run import Run
    from foreword.train.state import RunState

MAX_CHARACTERS = 300
"""Of a dev row's text that is shown."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a training went, since it began or was last resumed."""

    seconds: float
    """Wall clock of the steps and evaluations."""
    tokens: int
    """Text tokens of the training rows, all runs together; without blocks and padding."""
    steps: int
    """Steps of all runs together."""
    runs: int
    """Runs that were trained in one pass."""


def run_report(base: FrozenModel, state: RunState, pace: Pace) -> Report:
    """Return the report of a finished run; `data` holds its history, settings and numbers."""
    sections = [
        Section("Result", (Text(_outcome(state)), Bullets(tuple(_facts(state, pace))))),
        Section("Curves", (*_thinned(state), *curves(state.history))) if state.history else None,
        _answers(state),
        Section("Settings", tuple(_settings(state.run))),
        Section("Made with", (_made_with(base, state),)),
    ]
    data = {
        "run": state.run.name,
        "status": state.status,
        "best": state.best,
        "settings": state.run.resolved(),
        "pace": dataclasses.asdict(pace),
        "history": state.history,
    }
    return Report(f"Training run `{state.run.name}`", tuple(section for section in sections if section), data)


def _outcome(state: RunState) -> str:
    best, run = state.best, state.run
    ends = {
        "done": f"All {state.step} steps were taken.",
        "early_stopped": f"Stopped early after {state.step} of {run.config.steps} steps: {run.config.patience} "
        "evaluations in a row brought no gain.",
        "diverged": f"Diverged at step {state.step + 1}: {state.error.message if state.error else ''}.",
        "stopped": f"Stopped from outside after {state.step} of {run.config.steps} steps.",
    }
    kept = f"The vectors of step {best['step']} are kept"
    if best["by"] == "last":
        why = f"{kept}: no evaluation was there to choose by."
    else:
        better = "highest" if best["by"] == "dev_metric" else "lowest"
        why = f"{kept}: their {best['by'].replace('_', ' ')}, **{best['value']:.4g}**, is the {better} measured."
    return f"{ends.get(state.status, state.status)} {why}"


def _facts(state: RunState, pace: Pace) -> list[str]:
    tokens = sum(row["tokens"] for row in state.history)
    vectors = state.template.num_left + state.template.num_after
    facts = [
        f"method `{state.run.config.method}`, {vectors} vectors, "
        f"{sum(tensor.numel() for tensor in state.best_tensors.values()):,} numbers",
        f"{len(state.train):,} training rows, {tokens:,} text tokens seen; data `{state.run.data_sha256()}` (sha256)",
    ]
    if state.dev:
        own = state.run.material is None
        data = (
            f" of {len(state.run.task.rows('dev')):,}; data `{state.run.task.data_sha256('dev')}` (sha256)"
            if own
            else ""
        )
        facts.append(f"{len(state.dev):,} dev rows{data}")
    if pace.seconds > 0 and pace.steps:
        together = f", {pace.runs} runs in one pass" if pace.runs > 1 else ""
        since = " since the last resume" if pace.steps < state.step else ""
        facts.append(
            f"{pace.seconds:,.1f} s{since}: {pace.tokens / pace.seconds:,.0f} text tokens/s, "
            f"{1000 * pace.seconds / pace.steps:,.0f} ms a step, evaluations included{together}"
        )
    return facts


def _thinned(state: RunState) -> tuple[Text, ...]:
    if len(state.history) <= MAX_POINTS:
        return ()
    size = -(-len(state.history) // MAX_POINTS)
    return (Text(f"A point is the mean of {size} steps; each step is in `{state.run.name}.history.jsonl`."),)


def _answers(state: RunState) -> Section | None:
    rows = state.answers.get(state.best["step"], ())
    if not rows:
        return None
    cells = tuple((_cut(row.input), row.target, row.output, row.score) for row in rows)
    caption = f"Some of the dev rows as judged at step {state.best['step']}, by generation"
    return Section("Dev rows and answers", (Table(("input", "target", "answer", "score"), cells, caption),))


def _settings(run: Run) -> list[Table]:
    return [
        Table(("key", "value"), tuple((key, _cell(value)) for key, value in table.items()), f"[{name}]")
        for name, table in run.resolved().items()
    ]


def _made_with(base: FrozenModel, state: RunState) -> Table:
    rows: dict[str, Any] = {
        **{f"base {key}": value for key, value in base.fingerprint.to_json().items() if not isinstance(value, Mapping)},
        "base dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "started from version": state.parent,
        **versions(),
    }
    return Table(("what", "value"), tuple((key, _cell(value)) for key, value in rows.items()))


def _cell(value: Any) -> Cell:
    return value if value is None or isinstance(value, str | float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"
