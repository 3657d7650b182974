"""What is compared: the methods, the one budget that each of them trains under, and what makes two results the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from foreword.config import TrainConfig, load_task
from foreword.core.model import FrozenModel
from foreword.errors import ConfigError, did_you_mean
from foreword.eval.baselines import NUM_SHOTS
from foreword.eval.tasks import Task
from foreword.train.run import Run

METHODS = ("hard_text", "few_shot", "prompt", "prefix", "kv", "lora")
"""In the order of reports: from what trains nothing to what changes layers."""
ALIASES: Mapping[str, str] = {"text": "hard_text"}
SOFT = ("prompt", "prefix", "kv")
TRAINED = (*SOFT, "lora")
BASELINES = ("hard_text", "few_shot")

LORA_LR = 2e-3
"""Peak learning rate of LoRA at rank 8 in short runs: the better of two on eleven of twelve tasks (docs/compare.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Shape of the low-rank updates. Source: Hu et al. 2021, arXiv:2106.09685; PEFT's `LoraConfig`."""

    rank: int = 8
    """Rows of A and columns of B."""
    alpha: int | None = None
    """The update is scaled by alpha / rank; None is twice the rank."""
    targets: str = "all-linear"
    """Modules that get an update, PEFT's `target_modules`: names between commas; all-linear leaves the head out."""

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value is not None and value < 1:
                raise ConfigError(f"lora {name} is {value}, it must be at least 1")

    @property
    def scale_alpha(self) -> int:
        """Alpha, with its default."""
        return 2 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How methods are compared. Whatever trains comes from the task file's `[train]` and the overrides above it."""

    methods: tuple[str, ...] = METHODS
    rows_limit: int | None = None
    """Test rows judged, drawn by the seed; None judges all."""
    decoding: Literal["free", "labels"] = "free"
    """Free greedy text, or the most probable label of a closed set; one way for all methods."""
    num_shots: int = NUM_SHOTS
    """Examples in the few-shot prompt at most."""
    lr: Mapping[str, float] = field(default_factory=dict)
    """Peak learning rate by method, above its default."""
    lora: Lora = field(default_factory=Lora)
    timing_rounds: int = 11
    """Requests of each method whose median is its latency; methods take turns."""
    mixed_requests: int = 32
    """Requests of the mixed batch, half of them the task's own, half plain."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", parse_methods(self.methods))
        for method in self.lr:
            if method not in TRAINED:
                raise ConfigError(f"lr for {method!r}, which is not trained", hint=did_you_mean(method, TRAINED))
            if method not in self.methods:
                raise ConfigError(f"lr for {method!r}, which is not among the methods", hint="Leave it out.")
            if not self.lr[method] > 0:
                raise ConfigError(f"lr of {method} is {self.lr[method]}, it must be above 0")
        if self.decoding not in ("free", "labels"):
            raise ConfigError(
                f"unknown decoding {self.decoding!r}", hint=did_you_mean(self.decoding, ("free", "labels"))
            )
        least = {"rows_limit": 2, "num_shots": 1, "timing_rounds": 1, "mixed_requests": 2}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"{name} is {value}, it must be at least {minimum}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A comparison that can run: data read and checked, every method's run resolved."""

    task: Task
    """With inputs cut for all methods alike: to what the template with its vectors leaves."""
    train: TrainConfig
    """The budget: rows, steps, batch size, seed, schedule, choice on dev; the learning rate is each method's own."""
    settings: Settings

    def run(self, method: str) -> Run:
        """Return the run of a trained method. LoRA takes the budget and nothing of vectors."""
        rate = self.settings.lr.get(method)
        if method == "lora":
            config = dataclasses.replace(
                self.train, method="prompt", lr=rate or LORA_LR, init=None, encoder="none", optimizer="adamw"
            )
            return Run(self.task, config, method)
        own = method == self.train.method
        init, given = self.train.init, self.train.lr if own else None
        if init is not None and init.startswith("from:") and not own:
            init = None
        changed: Any = {"method": method, "lr": rate or given, "init": init}
        return Run(self.task, dataclasses.replace(self.train, **changed), method)

    def identity(self, method: str, base: FrozenModel) -> dict[str, Any]:
        """Return what must be equal for a trained method's file to be used again."""
        run = self.run(method)
        train = {key: value for key, value in run.resolved()["train"].items() if key != "checkpoint_every_s"}
        splits = [split for split in ("train", "dev") if getattr(self.task.config, split) is not None]
        lora = dataclasses.asdict(self.settings.lora) if method == "lora" else {}
        return {
            "base": base.fingerprint.to_json(),
            "dtype": str(base.dtype).removeprefix("torch."),
            **{f"train.{key}": value for key, value in train.items()},
            **{f"lora.{key}": value for key, value in lora.items()},
            "template": run.template.to_json(),
            "task.max_input_tokens": self.task.config.max_input_tokens,
            "task.hard_text": self.task.config.hard_text,
            **{f"{split} data": self.task.data_sha256(split) for split in splits},  # type: ignore[arg-type]
        }


def parse_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """Return the methods in their fixed order, `text` read as hard_text.

    Raises ConfigError for an unknown name (with the nearest), for one that is named twice, and for none.
    """
    names = [ALIASES.get(name.strip(), name.strip()) for name in methods]
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"unknown method {name!r}", hint=did_you_mean(name, (*METHODS, *ALIASES)))
        if names.count(name) > 1:
            raise ConfigError(f"method {name!r} is named twice")
    if not names:
        raise ConfigError("no method to compare", hint=f"Known: {', '.join(METHODS)}.")
    return tuple(name for name in METHODS if name in names)


def make_plan(path: str | Path, base: FrozenModel, settings: Settings, overrides: Sequence[str] = ()) -> Plan:
    """Read the task file and check everything that can be wrong before anything is trained.

    `overrides` such as `train.steps=200` stand above the file. Raises ConfigError and DataError: no test data, a base
    without tokenizer, labels asked for and absent, LoRA without the PEFT library.
    """
    config, train = load_task(path, overrides)
    task = Task(config)
    if config.test is None:
        raise ConfigError(
            f"task {task.name!r} has no test data: methods are compared on rows that nothing was tuned on",
            hint="Set test in [task].",
        )
    if base.tokenizer is None:
        raise ConfigError("the base has no tokenizer, and texts are to be compared", hint="Load it with its tokenizer.")
    if "lora" in settings.methods:
        check_peft()
    task.rows("train")
    task.rows("test")
    if config.dev is not None:
        task.rows("dev")
    if config.dev is None and (train.best_by == "metric" or train.patience is not None):
        raise ConfigError('best_by = "metric" and patience need task.dev', hint="Give a dev file.")
    run = Run(task, train, "budget")
    if settings.decoding == "labels":
        _check_labels(task, run)
    limit = task.input_limit(base.tokenizer, base.spec.max_positions, run.template)
    if limit is not None:
        task = Task(dataclasses.replace(config, max_input_tokens=limit))
    return Plan(task=task, train=train, settings=settings)


def check_peft() -> None:
    """Raise ConfigError where the PEFT library is not installed."""
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "method lora needs the PEFT library, which is not installed",
            hint="Run `pip install peft`, or leave lora out of --methods.",
        )


def digest(data: Mapping[str, Any]) -> str:
    """Return a short hash of JSON-ready data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _check_labels(task: Task, run: Run) -> None:
    if not task.labels():
        raise ConfigError(
            f"task {task.name!r} has no closed set of answers", hint="Set labels in [task], or decode free."
        )
    if run.template.num_after:
        raise ConfigError(
            f"template {run.template.text!r} has soft slots behind the input, where label probabilities are not read",
            hint="Decode free.",
        )
