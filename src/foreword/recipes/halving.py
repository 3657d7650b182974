"""Successive halving: at each rung the worse part of the settings stops, and the rest goes on as if alone.

Source: Jamieson and Talwalkar 2016, arXiv:1502.07943. A run's schedule is that of its full budget, so what goes on is
what a single training would give (contract 5). Decisions follow from the runs' histories alone, so a resumed sweep
makes the same ones (contract 4).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from foreword.errors import ConfigError
from foreword.train.run import Run, Standing

RUNGS = (0.25, 0.5)
"""Parts of a run's steps at which settings are cut; with the default of four evaluations these are the first two."""


@dataclass(frozen=True, slots=True)
class Halving:
    """A controller for `fit`: which settings stop at which rung."""

    settings: Mapping[str, str]
    """The setting of each run by its name; runs of a setting (its seeds) stop together."""
    rungs: tuple[float, ...] = RUNGS
    """Parts of a run's steps, rising, above 0 and below 1."""
    keep: float = 0.5
    """Part of the settings that goes on at each rung, rounded up."""

    def __call__(self, standings: Sequence[Standing]) -> Collection[str]:
        """Return the names of the runs that are cut at the rungs reached so far."""
        left = set(self.settings.values())
        for rung in self.rungs:
            entrants = [standing for standing in standings if self.settings[standing.run.name] in left]
            if not all(has_reached(standing, rung) for standing in entrants):
                break
            left = self._best(entrants, rung)
        return {standing.run.name for standing in standings if self.settings[standing.run.name] not in left}

    def _best(self, entrants: Sequence[Standing], rung: float) -> set[str]:
        values: dict[str, list[float]] = {}
        for standing in entrants:
            values.setdefault(self.settings[standing.run.name], []).append(value_at(standing, rung))
        ranked = sorted(values, key=lambda setting: sum(values[setting]) / len(values[setting]))
        return set(ranked[: max(1, math.ceil(len(ranked) * self.keep))])


def rung_step(run: Run, rung: float) -> int:
    """Return the step of a rung: the first evaluation at or behind that part of the run's steps."""
    return math.ceil(Fraction(rung).limit_denominator(1000) * run.config.steps / run.eval_every) * run.eval_every


def has_reached(standing: Standing, rung: float) -> bool:
    """Whether a run has been judged at a rung, or has ended before it."""
    return standing.status != "running" or standing.step >= rung_step(standing.run, rung)


def value_at(standing: Standing, rung: float) -> float:
    """Return the best dev measure up to a rung, the lower the better; infinity where there is none."""
    sign, key = direction(standing.run)
    last = rung_step(standing.run, rung)
    known = [sign * float(row[key]) for row in standing.history if key in row and row["step"] <= last]
    return min((value for value in known if math.isfinite(value)), default=math.inf)


def direction(run: Run) -> tuple[int, str]:
    """Return the sign that makes a run's dev measure better when lower, and its key in the history."""
    return (-1, "dev_metric") if run.config.best_by == "metric" else (1, "dev_loss")


def parse_rungs(text: str) -> tuple[float, ...]:
    """Return rungs from `1/4,1/2`, `0.25,0.5` or `none`. Raises ConfigError."""
    if text.strip() == "none":
        return ()
    try:
        rungs = tuple(float(Fraction(part.strip())) for part in text.split(","))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"--rungs {text!r} are no parts", hint="For example 1/4,1/2, or none.") from error
    if list(rungs) != sorted(set(rungs)) or not all(0 < rung < 1 for rung in rungs):
        raise ConfigError(f"--rungs {text!r} do not rise between 0 and 1", hint="For example 1/4,1/2.")
    return rungs


def check_rungs(runs: Sequence[Run], rungs: Sequence[float]) -> None:
    """Raise ConfigError where a rung of a run falls on no evaluation of its own before the last step."""
    for run in runs:
        steps: list[Any] = [rung_step(run, rung) for rung in rungs]
        for rung, step, before in zip(rungs, steps, [0, *steps], strict=False):
            if step >= run.config.steps or step == before:
                raise ConfigError(
                    f"run {run.name}: the rung at {rung:g} of {run.config.steps} steps falls on the evaluation at step "
                    f"{min(step, run.config.steps)}, which is {'an earlier rung' if step == before else 'the end'}",
                    hint=f"Evaluate more often than every {run.eval_every} steps (train.eval_every), or give "
                    "other --rungs, or none.",
                )
