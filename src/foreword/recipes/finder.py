"""A learning-rate finder by relative displacement: a few steps at each of a row of rates, all in one joint pass.

Each rate is a run of its own from the same start over the same batches, so what is compared is the rate alone.
Displacement is ‖θ_t - θ_{t-1}‖ / ‖θ_{t-1}‖ of a step, θ being the vectors with every part (layer, keys, values) divided
by its root mean square at the start: the space in which the optimizer steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from foreword.core.compile import compile
from foreword.core.model import FrozenModel
from foreword.core.prompt import vectors_from_tensors
from foreword.errors import ConfigError, TrainingDiverged
from foreword.report import Lines, Report, Section, Table, Text
from foreword.train.loop import one_step
from foreword.train.loss import MICRO_TOKENS, mean_losses
from foreword.train.run import Run
from foreword.train.sharing import build_states
from foreword.train.state import RunState
from foreword.train.strategy import choose_strategy

STEPS = 24
"""Steps at each rate."""
PROBE_ROWS = 64
"""Fixed rows on which the loss is measured before, while and after: dev rows where there are any."""
PROBES = 6
"""Measurements of that loss over the steps."""
RISE = 1.2
"""A rate is unstable where the last loss is so many times the least on its way."""
RATES_PER_DECADE = 3


@dataclass(frozen=True, slots=True)
class RateTrial:
    """What some steps at one rate did."""

    lr: float
    displacements: tuple[float, ...]
    """Of each step."""
    losses: tuple[tuple[int, float], ...]
    """(step, loss) on the probe rows in nats per target token; step 0 is the start."""
    is_stable: bool
    """Whether all is finite and the loss at the end is about the least on the way."""

    @property
    def displacement(self) -> float:
        """The median over the steps."""
        return median(self.displacements) if self.displacements else math.inf

    @property
    def end(self) -> float:
        """The loss at the end: the mean of the last two measurements, as a single one is noisy."""
        return mean(loss for _, loss in self.losses[-2:])

    @property
    def drop(self) -> float:
        """What the steps took off the probe loss, in nats; minus infinity where it is not finite."""
        change = self.losses[0][1] - self.end
        return change if math.isfinite(change) else -math.inf

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {**dataclasses.asdict(self), "displacement": self.displacement, "drop": self.drop}


@dataclass(frozen=True, slots=True)
class LrFinding:
    """The trials of a run, and the rate to begin with."""

    run: str
    method: str
    default_lr: float
    """What the run would train with now."""
    trials: tuple[RateTrial, ...]
    """By rising rate."""

    @property
    def best(self) -> RateTrial:
        """The stable trial with the largest drop of the loss."""
        return max((trial for trial in self.trials if trial.is_stable), key=lambda trial: trial.drop)

    @property
    def lr(self) -> float:
        """The recommended peak rate."""
        return self.best.lr

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        trials = [trial.to_json() for trial in self.trials]
        plain = {"run": self.run, "method": self.method, "lr": self.lr, "displacement": self.best.displacement}
        return {**plain, "default_lr": self.default_lr, "trials": trials}


def default_rates(run: Run) -> list[float]:
    """Return rates from a hundredth of the run's own to ten times it, three a decade."""
    powers = range(-2 * RATES_PER_DECADE, RATES_PER_DECADE + 1)
    return [float(f"{run.lr * 10 ** (power / RATES_PER_DECADE):.3g}") for power in powers]


def check_rates(rates: Sequence[float], steps: int) -> None:
    """Raise ConfigError for a rate that is not above 0, and for too few rates or steps."""
    if bad := [rate for rate in rates if not (math.isfinite(rate) and rate > 0)]:
        raise ConfigError(f"rate {bad[0]:g} is not above 0", hint="Rates are like 0.05.")
    if len(set(rates)) < 2 or steps < 2:
        raise ConfigError(
            f"{len(set(rates))} different rates over {steps} steps show no trend", hint="Give 2 at least of both."
        )


def find_lr(
    base: FrozenModel,
    run: Run,
    *,
    rates: Sequence[float] = (),
    steps: int = STEPS,
    micro_tokens: int = MICRO_TOKENS,
    on_step: Callable[[int], None] | None = None,
) -> LrFinding:
    """Try rates (default `default_rates`) for `steps` steps each in one joint pass; nothing is written.

    Steps go at a constant rate without warm-up. Raises ConfigError for a rate that is not above 0 and for too few
    rates or steps, TrainingDiverged where no rate is stable.
    """
    rates = sorted(rates or default_rates(run))
    check_rates(rates, steps)
    states, strategy = _states(base, run, rates, steps), choose_strategy(base)
    probe = (states[0].dev or states[0].train)[:PROBE_ROWS]
    start = mean_losses(base, [(_prefix(base, states[0]), probe)])[0]
    moved: list[list[float]] = [[] for _ in states]
    losses = [[(0, start)] for _ in states]
    marks = {math.ceil(steps * (place + 1) / PROBES) for place in range(PROBES)}
    for step in range(1, steps + 1):
        active = [state for state in states if state.status != "diverged"]
        before = {id(state): _theta(state) for state in active}
        one_step(base, active, (), micro_tokens, strategy)
        for place, state in enumerate(states):
            if id(state) in before and state.status != "diverged":
                old = before[id(state)]
                moved[place].append(float((_theta(state) - old).norm() / old.norm()))
        if step in marks:
            _measure(base, states, probe, step, losses)
        if on_step is not None:
            on_step(step)
    trials = tuple(_trial(*found) for found in zip(rates, states, moved, losses, strict=True))
    if not any(trial.is_stable for trial in trials):
        raise TrainingDiverged(
            f"run {run.name}: no rate from {rates[0]:g} to {rates[-1]:g} lowers the loss of {start:.3f} nats steadily",
            hint="Give smaller rates, or look at the data with foreword doctor.",
        )
    return LrFinding(run.name, run.config.method, run.lr, trials)


def _states(base: FrozenModel, run: Run, rates: Sequence[float], steps: int) -> list[RunState]:
    runs = []
    for place, rate in enumerate(rates):
        config = dataclasses.replace(
            run.config, lr=rate, schedule="constant", warmup_steps=0, steps=steps + 1, share=None, patience=None,
            best_by="loss", eval_rows=PROBE_ROWS,
        )  # fmt: skip
        runs.append(dataclasses.replace(run, config=config, name=f"{run.name}-{place}"))
    return build_states(base, runs)[0]


def _measure(
    base: FrozenModel,
    states: Sequence[RunState],
    probe: Sequence[Any],
    step: int,
    losses: list[list[tuple[int, float]]],
) -> None:
    for place, state in enumerate(states):
        if state.status == "diverged":
            losses[place].append((step, math.inf))
    alive = [place for place, state in enumerate(states) if state.status != "diverged"]
    found = mean_losses(base, [(_prefix(base, states[place]), probe) for place in alive])
    for place, loss in zip(alive, found, strict=True):
        losses[place].append((step, loss))


def _trial(rate: float, state: RunState, moved: Sequence[float], losses: Sequence[tuple[int, float]]) -> RateTrial:
    values = [loss for _, loss in losses]
    stable = all(map(math.isfinite, values)) and values[-1] <= RISE * min(values) and values[-1] < values[0]
    return RateTrial(rate, tuple(moved), tuple(losses), stable and state.status != "diverged")


def _theta(state: RunState) -> Tensor:
    with torch.no_grad():
        return state.tuner.theta().detach().clone()


def _prefix(base: FrozenModel, state: RunState) -> Any:
    return compile(base, vectors_from_tensors(state.snapshot(), state.block))


def join_reports(reports: Sequence[Report]) -> Report:
    """Return several findings' reports as one."""
    if len(reports) == 1:
        return reports[0]
    sections = tuple(
        Section(f"{report.title}: {section.title}", section.blocks) for report in reports for section in report.sections
    )
    return Report("Learning rates", sections, {"findings": [dict(report.data) for report in reports]})


def finder_report(finding: LrFinding, *, figures: bool = True) -> Report:
    """Return the trials as a report: the recommendation, the table, and `figures`, which a terminal has no room for."""
    best = finding.best
    verdict = (
        f"**lr = {finding.lr:g}** for `{finding.method}` (a step moves the vectors by {best.displacement:.2%} of their "
        f"norm, the loss falls by {best.drop:.3f} nats in {best.losses[-1][0]} steps); the run's own is "
        f"{finding.default_lr:g}."
    )
    rows = tuple(
        (trial.lr, trial.displacement * 100, trial.end, trial.drop, "yes" if trial.is_stable else "no")
        for trial in finding.trials
    )
    columns = ("lr", "displacement per step in %", "loss at the end", "drop", "stable")
    drops = tuple((trial.lr, trial.end) for trial in finding.trials if math.isfinite(trial.end))
    moves = tuple((trial.lr, trial.displacement) for trial in finding.trials if math.isfinite(trial.displacement))
    paths = {
        f"lr {trial.lr:g}": tuple((float(step), loss) for step, loss in trial.losses if math.isfinite(loss))
        for trial in finding.trials
    }
    lines = (
        Lines("Loss after the steps", "lr", "nats per target token", {"loss": drops}, x_log=True),
        Lines("Displacement per step", "lr", "of the norm", {"median": moves}, x_log=True, y_log=True),
        Lines("Loss on the way", "step", "nats per target token", paths),
    )
    sections = (Section("Recommendation", (Text(verdict), Table(columns, rows))),)
    return Report(
        f"Learning rate of {finding.run}",
        (*sections, *((Section("Figures", lines),) if figures else ())),
        finding.to_json(),
    )
