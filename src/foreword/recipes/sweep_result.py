"""What a sweep is told, what it tries, and what comes out of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreword.errors import ConfigError
from foreword.eval.paired import PairedResult
from foreword.eval.report import EvalReport
from foreword.recipes.halving import RUNGS
from foreword.recipes.memory import MemoryPlan
from foreword.recipes.space import Setting
from foreword.train.loss import MICRO_TOKENS
from foreword.train.run import Run, RunResult


@dataclass(frozen=True, slots=True)
class Options:
    """How a sweep goes about its settings."""

    num_random: int | None = None
    """Settings drawn from the space; None takes the whole grid."""
    sample_seed: int = 0
    """Seed of that draw."""
    seeds: int = 1
    """Runs of each setting, with consecutive seeds."""
    rungs: tuple[float, ...] = RUNGS
    """Parts of the steps at which the worse settings stop; () stops none."""
    keep: float = 0.5
    """Part of the settings that goes on at each rung."""
    passes: int | None = 1
    """Joint passes that the runs are spread over; None takes as few as fit the memory."""
    micro_tokens: int = MICRO_TOKENS
    """Padded tokens of one forward at most."""
    judge_rows: int = 500
    """Dev rows on which the best two settings answer, and are compared; 0 leaves that out."""

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ConfigError(f"keep = {self.keep:g} is not between 0 and 1", hint="For example 0.5, the better half.")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting, and its runs (its seeds)."""

    number: int
    setting: Setting
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """What its runs' names begin with."""
        return f"{self.runs[0].task.name}-{self.number:02d}"


@dataclass(frozen=True, slots=True)
class Ranked:
    """What became of a setting."""

    name: str
    setting: Setting
    value: float | None
    """Mean over the seeds of the best dev measure; None where no run was ever judged."""
    spread: tuple[float, float] | None
    """Least and largest over the seeds, where there are several."""
    steps: int
    """Steps that its runs took at most."""
    results: tuple[RunResult, ...]

    @property
    def status(self) -> str:
        """The status of its runs, the different ones with commas."""
        return ", ".join(dict.fromkeys(result.status for result in self.results))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict without histories."""
        runs = [result.to_json() for result in self.results]
        plain = {"name": self.name, "setting": self.setting, "value": self.value, "spread": self.spread}
        return {**plain, "status": self.status, "steps": self.steps, "runs": runs}


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A finished sweep."""

    task: str
    measure: str
    """dev_loss (lower is better) or dev_metric (higher is better): what halved, and what ranks."""
    ranking: tuple[Ranked, ...]
    """Best first."""
    steps: int
    """Steps of a whole run, the largest of the settings."""
    memory: MemoryPlan
    options: Options
    reports: tuple[EvalReport, ...] = ()
    """The best two settings' answers on dev rows, the best first."""
    paired: PairedResult | None = field(default=None)
    """The best against the second on the same dev rows."""

    @property
    def best(self) -> Ranked:
        """The best setting."""
        return self.ranking[0]

    @property
    def artefact(self) -> Path | None:
        """The artefact of the best setting's best run."""
        return best_run(self.best, self.measure).artefact

    @property
    def steps_saved(self) -> float:
        """Part of all steps that stopped runs did not take."""
        asked = sum(self.steps * len(ranked.results) for ranked in self.ranking)
        taken = sum(len(result.history) for ranked in self.ranking for result in ranked.results)
        return 1 - taken / asked

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict without histories and rows."""
        return {
            "task": self.task,
            "measure": self.measure,
            "best": self.best.setting,
            "artefact": str(self.artefact) if self.artefact else None,
            "ranking": [ranked.to_json() for ranked in self.ranking],
            "steps": self.steps,
            "steps_saved": self.steps_saved,
            "reports": [report.to_json() for report in self.reports],
            "paired": self.paired.to_json() if self.paired else None,
            "memory": self.memory.to_json(),
            "options": dataclasses.asdict(self.options),
        }


def best_run(ranked: Ranked, measure: str) -> RunResult:
    """Return the best of a setting's runs: the artefact to take where there are several seeds."""
    known = [result for result in ranked.results if result.best.get("value") is not None]
    if not known:
        return ranked.results[0]
    return (max if measure == "dev_metric" else min)(known, key=lambda result: result.best["value"])
