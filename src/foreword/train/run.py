"""A run, one task with its settings, and what comes out of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foreword.config import OptimizerName, TrainConfig, load_task
from foreword.core.template import TaskTemplate
from foreword.errors import ForewordError
from foreword.eval.tasks import Task

if TYPE_CHECKING:
    from foreword.core.prompt import Vectors
    from foreword.train.data import Material

Status = Literal["running", "done", "early_stopped", "stopped", "diverged"]
"""`early_stopped` by the run's own patience, `stopped` by the controller of its `fit`."""


@dataclass(frozen=True, slots=True)
class MethodDefaults:
    """What a method trains with where the user sets nothing; measured, see docs/training.md."""

    lr: float
    """Peak learning rate with Muon, relative to the vectors' scale (train/tuners.py)."""
    adaptive_lr: float
    """The same with AdamW or Adafactor."""
    init: str


DEFAULTS: Mapping[str, MethodDefaults] = {
    "prompt": MethodDefaults(lr=0.5, adaptive_lr=0.3, init="text"),
    "prefix": MethodDefaults(lr=0.1, adaptive_lr=0.2, init="text"),
    "kv": MethodDefaults(lr=0.1, adaptive_lr=0.2, init="text"),
}


ENCODER_LR = 0.02
"""Default for runs with an encoder, whose weights move many numbers at once."""
FACTORS_LR = 0.2
"""Default for low-rank factors, which are few and begin at one; found by the finder on trec, kv and prompt alike."""


def optimizer_of(config: TrainConfig) -> OptimizerName:
    """Return the optimizer of a configuration: its own, else Muon for plain vectors and AdamW for encoders."""
    return config.optimizer or ("muon" if config.encoder == "none" else "adamw")


def default_lr(config: TrainConfig) -> float:
    """Return the measured peak learning rate for a configuration's method, encoder and optimizer."""
    if config.encoder == "low_rank":
        return FACTORS_LR
    if config.encoder != "none":
        return ENCODER_LR
    defaults = DEFAULTS[config.method]
    return defaults.lr if optimizer_of(config) == "muon" else defaults.adaptive_lr


@dataclass(frozen=True, slots=True)
class Run:
    """One task's data, tuner and optimizer settings; `fit` takes one or many."""

    task: Task
    config: TrainConfig
    name: str
    """Name of the run's files, unique within a `fit`."""
    material: Material | None = field(default=None, repr=False, compare=False)
    """Where the examples come from, if not from the task's rows."""
    start: Vectors | None = field(default=None, repr=False, compare=False)
    """Vectors to start from, tiled or cut to the template's slots; they stand above `config.init`."""
    parent: str | None = None
    """Identity (sha256) of the version that `start` was taken from."""

    @classmethod
    def from_toml(cls, path: str | Path, *, name: str | None = None, **train: Any) -> Run:
        """Read a task file; keywords such as `method="kv"` stand above its `[train]` table.

        Raises ConfigError as `load_task` does.
        """
        overrides = [f"train.{key}={json.dumps(value)}" for key, value in train.items()]
        task, config = load_task(path, overrides)
        return cls(Task(task), config, name or f"{task.name}-{config.method}")

    @property
    def template(self) -> TaskTemplate:
        """The task's template, with the run's own number of vectors where it sets one."""
        template, num = self.task.template, self.config.num_vectors
        return template if num is None else template.resized(num)

    @property
    def lr(self) -> float:
        """The peak learning rate: the run's own, else the method's default, or that of encoders."""
        return default_lr(self.config) if self.config.lr is None else self.config.lr

    @property
    def optimizer(self) -> OptimizerName:
        """The optimizer: the run's own, else Muon for plain vectors and AdamW for an encoder."""
        return optimizer_of(self.config)

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return self.config.eval_every or max(1, -(-self.config.steps // 4))

    def resolved(self) -> dict[str, Any]:
        """Return every setting, defaults filled in, JSON-ready: what is kept with the run and in the artefact."""
        config = dataclasses.replace(
            self.config,
            lr=self.lr,
            optimizer=self.optimizer,
            init=self.config.init or DEFAULTS[self.config.method].init,
            eval_every=self.eval_every,
        )
        train = config.to_json() | ({} if self.start is None else {"init": "given vectors"})
        return {"task": self.task.config.to_json(), "train": train, "template": self.template.to_json()}

    def data_sha256(self) -> str:
        """Return the hash of what the run learns from."""
        return self.task.data_sha256("train") if self.material is None else self.material.sha256()


@dataclass(frozen=True, slots=True)
class Standing:
    """How a run stands in the middle of a `fit`: what a controller decides from."""

    run: Run
    step: int
    """Finished optimizer steps."""
    status: Status
    history: Sequence[Mapping[str, Any]]
    """As in `RunResult.history`, so far."""


Controller = Callable[[Sequence[Standing]], Collection[str]]
"""Returns the names of runs to stop now (status "stopped", best vectors kept). Called after every step.

It decides from the standings alone, so that a resumed training makes the same decisions."""


@dataclass(slots=True)
class RunResult:
    """What became of a run. Filled by `fit`; `artefact` is set unless there is no good state to keep."""

    name: str
    status: Status
    artefact: Path | None = None
    best: dict[str, Any] = field(default_factory=dict)
    """step, and by which measure the kept vectors were best."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One dict a step: step, loss, lr, grad_norm, tokens; at evaluations dev_loss and dev_metric too."""
    error: ForewordError | None = None
    """Why a diverged run stopped."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict without the history."""
        return {
            "name": self.name,
            "status": self.status,
            "artefact": str(self.artefact) if self.artefact else None,
            "best": self.best,
            "error": self.error.message if self.error else None,
        }
