"""What a distillation is asked to do: the `[distil]` table of a TOML file, or the command's options."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from foreword.config import NAME, MetricName, TrainConfig
from foreword.errors import ConfigError, did_you_mean

STEPS = 200
"""Steps where the user sets none; at 1/4 of notes' tokens most of the gap is closed by then (bench/distil.py)."""
KV_LR = 0.05
"""Peak learning rate of `kv` where the user sets neither it nor the optimizer. Lower than for tasks: the start is near
the goal already (bench/distil.py)."""
RATIO = 4.0
SEED_TYPES = ("structuring", "summarization", "question", "use_case", "creative")
"""What self-study asks for (distil/questions.py)."""
SELF_STUDY = 256
"""Questions that the model writes where the user gives none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilConfig:
    """One context and how it is compressed."""

    context: str
    """The text file, or `.json` with messages; in a TOML file relative to that file's folder."""
    name: str
    """The name of the artefact and its task."""
    vectors: int | None = None
    """P; None takes the context's tokens divided by `ratio`."""
    ratio: float | None = None
    """Context tokens per vector; None is 4 where `vectors` is None too."""
    place: Literal["system", "front"] = "system"
    """Where the teacher has the context: a system turn of the chat, or plain in front."""
    chat: bool | None = None
    """Rows are turns of the base's chat; None where it has a chat template."""
    questions: str | None = None
    """JSONL of questions to learn from; None lets the model write them."""
    self_study: int | None = None
    """Questions that the model writes, beside those given; None is 256 without questions, else 0."""
    seed_types: tuple[str, ...] = SEED_TYPES
    """What self-study asks for."""
    writer: Literal["turn", "instruction"] = "turn"
    """How self-study gets a question: by opening the user's turn, or by asking for one."""
    test: str | None = None
    """JSONL of questions with answers that are judged and not learned; None judges on questions held back."""
    elsewhere: str | None = None
    """JSONL of prompts, or a task file, that have nothing to do with the context: where harm is measured."""
    objective: Literal["kl", "likelihood"] = "kl"
    """The teacher's distribution, or its answers as text."""
    learn: Literal["answers", "all"] = "answers"
    """Learned tokens: the answers, or the questions too."""
    top_k: int = 20
    """Tokens that the teacher names at each place; all others are one bucket."""
    init: Literal["auto", "first", "spread", "match"] = "auto"
    """Start: attention matching where it is possible, else the context's first tokens."""
    chunk_tokens: int | None = None
    """Tokens of a chunk; None allows no chunks: the context must fit the window."""
    max_new_tokens: int = 32
    """Tokens of an answer at most."""
    metric: MetricName = "exact_match"
    """The score of answers."""
    seed: int = 0
    """Of self-study and of which questions are held back; training has its own."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(
                f"distil.name = {self.name!r} is not a name of the form {NAME.pattern}", hint="For example handbook."
            )
        if self.vectors is not None and self.ratio is not None:
            raise ConfigError(
                f"distil.vectors = {self.vectors} and distil.ratio = {self.ratio} are both given", hint="Give one."
            )
        for key, least in LEAST.items():
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or value < least):
                raise ConfigError(f"distil.{key} = {value!r} is not a number of at least {least}")
        if self.ratio is not None and self.ratio <= 1:
            raise ConfigError(f"distil.ratio = {self.ratio!r} compresses nothing", hint="Use a ratio above 1.")
        for name in self.seed_types:
            if name not in SEED_TYPES:
                raise ConfigError(f"distil.seed_types holds {name!r}", hint=did_you_mean(name, SEED_TYPES))
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"distil.{key} = {getattr(self, key)!r} is not one of {', '.join(known)}",
                    hint=did_you_mean(str(getattr(self, key)), known),
                )

    @property
    def num_written(self) -> int:
        """Questions that the model writes."""
        return self.self_study if self.self_study is not None else 0 if self.questions else SELF_STUDY

    def to_json(self) -> dict[str, Any]:
        """Return every field, JSON-ready."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return data | {"seed_types": list(self.seed_types)}


LEAST = {"vectors": 2, "self_study": 0, "top_k": 1, "chunk_tokens": 64, "max_new_tokens": 1, "seed": 0}
CHOICES: dict[str, tuple[str, ...]] = {
    "place": ("system", "front"),
    "writer": ("turn", "instruction"),
    "objective": ("kl", "likelihood"),
    "learn": ("answers", "all"),
    "init": ("auto", "first", "spread", "match"),
    "metric": get_args(MetricName),
}


@dataclass(frozen=True, slots=True)
class Job:
    """A context with its settings and those of its training."""

    distil: DistilConfig
    train: TrainConfig = field(default_factory=lambda: train_config({}))


def train_config(table: Mapping[str, Any]) -> TrainConfig:
    """Return the training settings of a distillation: kv, 200 steps and a first vector that stays, where none is set.

    Raises ConfigError.
    """
    for key in ("init", "num_vectors", "best_by", "max_train_rows"):
        if key in table:
            raise ConfigError(
                f"train.{key} is not for a distillation",
                hint="Set vectors, ratio and init in [distil]." if key in ("init", "num_vectors") else "Leave it out.",
            )
    known: dict[str, Any] = {"method": "kv", "steps": STEPS, "frozen_vectors": 1, **table}
    if known["method"] == "kv" and not known.keys() & {"optimizer", "encoder"}:
        known = {"lr": KV_LR, **known}
    return TrainConfig.from_mapping(known)


def load_job(path: str | Path, given: Mapping[str, Any], overrides: Mapping[str, Any]) -> Job:
    """Read one context of the command line: a TOML file with `[distil]` and `[train]`, or the context itself.

    `given` are fields of DistilConfig and `overrides` of TrainConfig that stand above the file's. Raises ConfigError
    naming file, key and the nearest known name.
    """
    path = Path(path)
    if path.suffix != ".toml":
        name = path.stem.lower().replace(" ", "-")
        return Job(DistilConfig(**{"context": str(path), "name": name, **given}), train_config(overrides))
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="Check the path.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}", hint="Text needs quotes.") from error
    if unknown := sorted(tables.keys() - {"distil", "train"}):
        raise ConfigError(f"{path}: unknown table [{unknown[0]}]", hint=did_you_mean(unknown[0], ("distil", "train")))
    table = dict(tables.get("distil", {}))
    known = {f.name: f for f in dataclasses.fields(DistilConfig)}
    for key in table:
        if key not in known:
            raise ConfigError(f"{path}: unknown key distil.{key}", hint=did_you_mean(key, known))
    for key in ("context", "questions", "test", "elsewhere"):
        if isinstance(table.get(key), str):
            table[key] = str(path.parent / table[key])
    merged = {"name": path.stem, **table, **given}
    if "vectors" in given:
        merged["ratio"] = None
    if "ratio" in given:
        merged["vectors"] = None
    if "context" not in merged:
        raise ConfigError(f"{path}: distil.context is missing", hint="Write context in [distil].")
    if isinstance(merged.get("seed_types"), list):
        merged["seed_types"] = tuple(merged["seed_types"])
    try:
        return Job(DistilConfig(**merged), train_config({**tables.get("train", {}), **overrides}))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Return TrainConfig fields from `train.lr=0.3` or `lr=0.3`. Raises ConfigError."""
    found: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} is not of the form train.key=value", hint="For example train.lr=0.1.")
        try:
            found[key.strip().removeprefix("train.")] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key.strip().removeprefix("train.")] = value.strip()
    return found
