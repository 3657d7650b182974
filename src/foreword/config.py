"""A task and a training run as frozen dataclasses: TOML in, resolved JSON out.

`load_task` reads a file with the tables `[task]` and `[train]`. An unknown key, a wrong type and a value out of range
are ConfigErrors that name the file, the key, both values, and the nearest known name. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from foreword.errors import ConfigError, did_you_mean

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

OptimizerName = Literal["muon", "adamw", "adafactor"]
MetricName = Literal["exact_match", "accuracy", "f1", "token_f1", "squad_f1", "rouge_l", "bleu"]
CLOSED_METRICS: tuple[str, ...] = ("exact_match", "accuracy", "f1")
"""Metrics of tasks that may have a closed set of answers."""

FIELDS = ("input", "target", "messages", "references")
"""What a record of a task's data may hold that is read."""

INITS = ("text", "vocab", "labels", "random")
INIT_FORMS = (*INITS, "text:…", "from:<version or path>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """What is to be learned and how it is judged."""

    table: ClassVar[str] = "task"

    name: str
    """The task's name in the registry and in requests: a-z, 0-9, `.`, `_`, `-`; 64 characters at most."""
    train: str
    """Examples: JSONL, Parquet, a pattern of such files, or a saved data set's folder, `#split` behind it where it has
    several; in a TOML file relative to that file's folder."""
    dev: str | None = None
    """Examples on which steps and settings are chosen; None takes no such choice."""
    test: str | None = None
    """Examples that nothing is tuned on."""
    columns: Mapping[str, str] | None = dataclasses.field(default=None, hash=False)
    """The data's names of input, target, messages and references, where they differ: `{input = "question"}`."""
    learn: Literal["last", "all"] = "last"
    """Answers of a conversation that are learned; the last is the one that is judged."""
    template: str = "{soft:20}{input}"
    """Hard text and soft slots around the input; 20 vectors, where most of the gain of longer ones is reached."""
    chat: bool = False
    """Render through the base's chat template; off, since not every base has one."""
    system: str | None = None
    """Text and slots of a system turn of the task's own; needs `chat`."""
    metric: MetricName = "exact_match"
    """What the score is; all are 0 to 1, higher is better."""
    labels: tuple[str, ...] | None = None
    """The closed set of answers; None finds it in the training rows where they have one."""
    max_new_tokens: int = 32
    """Tokens of an answer at most; 32 holds a label or a short span."""
    max_input_tokens: int | None = None
    """Tokens of an input at most; None is what fits the base beside block, template and answer."""
    truncate: Literal["error", "left", "right"] = "error"
    """Inputs over the limit: refused, or cut on that side; refused, since a cut may take away what decides."""
    hard_text: str = ""
    """The instruction in words: the text baseline's prompt and the start of vectors initialised from text."""

    def __post_init__(self) -> None:
        _check_types(self)
        if not NAME.fullmatch(self.name):
            raise _bad(self, "name", f"a name of the form {NAME.pattern}")
        for key in ("train", "dev", "test"):
            if getattr(self, key) == "":
                raise _bad(self, key, "a path")
        self._check_columns()
        if self.learn == "all" and not self.chat:
            raise ConfigError(
                "task.learn = 'all' is for conversations, and task.chat is false", hint="Set chat = true."
            )
        if self.system is not None and not self.chat:
            raise ConfigError("task.system is for chat templates, and task.chat is false", hint="Set chat = true.")
        if self.labels is not None:
            if len(self.labels) < 2 or not all(label.strip() for label in self.labels):
                raise _bad(self, "labels", "at least two labels, none of them empty")
            if len({_fold(label) for label in self.labels}) < len(self.labels):
                raise _bad(self, "labels", "labels that differ by more than case and spaces")
            if self.metric not in CLOSED_METRICS:
                raise ConfigError(
                    f"task.labels is set, and task.metric = {self.metric!r} is for open answers",
                    hint=f"Set metric to one of {', '.join(CLOSED_METRICS)}, or leave labels out.",
                )
        _check_at_least(self, 1, "max_new_tokens", "max_input_tokens")

    def _check_columns(self) -> None:
        named = self.columns or {}
        for field in named:
            if field not in FIELDS:
                raise ConfigError(f"task.columns names {field!r}, which is no field", hint=did_you_mean(field, FIELDS))
        if "messages" in named and (both := [field for field in ("input", "target") if field in named]):
            raise ConfigError(
                f"task.columns names both messages and {both[0]}", hint="Name messages, or input and target."
            )

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, source: str = "") -> TaskConfig:
        """Build from the `[task]` table; `source` names it in errors. Raises ConfigError."""
        return _from_mapping(cls, data, {}, source)

    def to_json(self) -> dict[str, Any]:
        """Return every field, resolved and JSON-ready; `from_mapping` is its inverse."""
        return _to_json(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How the vectors are trained."""

    table: ClassVar[str] = "train"

    method: Literal["prompt", "prefix", "kv"] = "prompt"
    """Prompt tuning, prefix tuning by hidden states, or by keys and values; prompt makes the smallest file."""
    init: str | None = None
    """`text:…`, `text` (the task's hard_text), `vocab`, `labels`, `random`, `from:<version or path>`; None is the
    method's measured default."""
    num_vectors: int | None = None
    """Vectors in place of the template's slot length; None keeps the template."""
    frozen_vectors: int = 0
    """Vectors at the front that stay as they begin; 0 trains all."""
    encoder: Literal["none", "mlp", "lstm", "residual", "low_rank"] = "none"
    """Reparametrisation while training; none is stored either way. `low_rank` trains factors on the start alone."""
    rank: int = 1
    """Rank of the factors of encoder `low_rank`; 1 is that of multitask prompt tuning."""
    share: str | None = None
    """Group of runs of one training that share the source under their `low_rank` factors; None shares nothing."""
    optimizer: OptimizerName | None = None
    """The optimizer of the vectors, in float32; None is muon for plain vectors and adamw for encoders, as measured."""
    lr: float | None = None
    """Peak learning rate; None is the method's measured default."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """The learning rate after the warm-up; linear falls to 0 at the last step."""
    warmup_steps: int = 20
    """Steps in which the learning rate rises; short, as few tensors train."""
    steps: int = 400
    """Optimizer steps; a few minutes on two CPU cores for the demo base."""
    batch_size: int = 16
    """Rows per forward pass."""
    accumulate: int = 1
    """Forward passes per optimizer step; a step sees batch_size * accumulate rows."""
    weight_decay: float = 0.0
    """Decoupled decay towards 0, per step and learning rate; off, since it pulls the vectors out of the text space."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    eval_every: int | None = None
    """Steps between evaluations on dev; None evaluates 4 times per run."""
    eval_rows: int = 200
    """Dev rows per evaluation at most, a seeded sample; enough to order checkpoints."""
    best_by: Literal["metric", "loss"] = "loss"
    """What picks the vectors that are kept; the loss is less noisy on few rows and needs no generation."""
    patience: int | None = None
    """Evaluations without gain before the run stops; None runs all steps."""
    seed: int = 0
    """Seeds initial values, sampling and data order."""
    max_train_rows: int | None = None
    """Training rows at most, a seeded sample; None takes all."""
    checkpoint_every_s: int = 120
    """Seconds between checkpoints: what a killed run loses at most."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "num_vectors", "steps", "batch_size", "accumulate", "eval_every", "eval_rows")
        _check_at_least(self, 1, "patience", "max_train_rows", "checkpoint_every_s", "rank")
        _check_at_least(self, 0, "warmup_steps", "weight_decay", "clip", "seed", "frozen_vectors")
        if self.lr is not None and self.lr <= 0:
            raise _bad(self, "lr", "a number above 0")
        self._check_factors()
        if self.init is not None:
            form, colon, rest = self.init.partition(":")
            if not (rest.strip() if colon and form in ("text", "from") else self.init in INITS):
                raise _bad(self, "init", " or ".join(INIT_FORMS), hint=did_you_mean(form, (*INITS, "from")))

    def _check_factors(self) -> None:
        if self.encoder != "low_rank" and (self.rank != 1 or self.share is not None):
            key = "rank" if self.rank != 1 else "share"
            raise ConfigError(
                f"train.{key} = {getattr(self, key)!r} is for low-rank factors, and train.encoder = {self.encoder!r}",
                hint='Set train.encoder = "low_rank".',
            )
        if self.share is not None and not NAME.fullmatch(self.share):
            raise _bad(self, "share", f"a name of the form {NAME.pattern}")

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, source: str = "") -> TrainConfig:
        """Build from the `[train]` table; `source` names it in errors. Raises ConfigError."""
        return _from_mapping(cls, data, {}, source)

    def to_json(self) -> dict[str, Any]:
        """Return every field, resolved and JSON-ready; `from_mapping` is its inverse."""
        return _to_json(self)


Config = TaskConfig | TrainConfig
C = TypeVar("C", TaskConfig, TrainConfig)
TABLES: dict[str, type[TaskConfig] | type[TrainConfig]] = {"task": TaskConfig, "train": TrainConfig}


def load_task(path: str | Path, overrides: Sequence[str] = ()) -> tuple[TaskConfig, TrainConfig]:
    """Read a task file; `overrides` such as `train.lr=0.3` (values in TOML, bare words are text) stand above it.

    Data paths, also overridden ones, are relative to the file's folder. Raises ConfigError naming file or override,
    key, both values and the nearest known name.
    """
    path = Path(path)
    tables = _read_toml(path)
    if unknown := sorted(tables.keys() - TABLES.keys()):
        raise ConfigError(f"{path}: unknown table [{unknown[0]}]", hint=did_you_mean(unknown[0], TABLES))
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} = {table!r} is not a table", hint=f"Write [{name}] above its keys.")
    if "task" not in tables:
        raise ConfigError(f"{path}: no table [task]", hint="Write [task] above name, train, template and metric.")
    merged: dict[str, dict[str, Any]] = {name: dict(tables.get(name, {})) for name in TABLES}
    origins: dict[str, str] = {}
    for override in overrides:
        table_name, key, value = _parse_override(override)
        merged[table_name][key] = value
        origins[f"{table_name}.{key}"] = f"override {override!r}"
    for key in ("train", "dev", "test"):
        if isinstance(merged["task"].get(key), str) and merged["task"][key]:
            merged["task"][key] = str(path.parent / merged["task"][key])
    task = _from_mapping(TaskConfig, merged["task"], origins, str(path))
    train = _from_mapping(TrainConfig, merged["train"], origins, str(path))
    if train.init == "text" and not task.hard_text:
        raise ConfigError(
            f"{origins.get('train.init', path)}: train.init = 'text' takes task.hard_text, which is empty",
            hint="Set hard_text, or write the text behind it: init = 'text:…'.",
        )
    return task, train


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="Check the path of the task file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error})", hint="Save the file as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path}: not TOML: {error}", hint="Text needs quotes, and true and false are small."
        ) from error


def _parse_override(override: str) -> tuple[str, str, Any]:
    """Split `table.key=value`; a value that is not TOML is text."""
    target, equals, text = override.partition("=")
    table, dot, key = target.strip().partition(".")
    if not (equals and dot):
        raise ConfigError(f"override {override!r} is not of the form table.key=value", hint="For example train.lr=0.3.")
    if table not in TABLES:
        raise ConfigError(f"override {override!r}: unknown table {table!r}", hint=did_you_mean(table, TABLES))
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    return table, key, parsed["value"] if parsed.keys() == {"value"} else text.strip()


def _from_mapping(cls: type[C], data: Mapping[str, Any], origins: Mapping[str, str], source: str) -> C:
    """Build a config; an error is led by where its key was written: `origins[key]`, else `source`."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            origin = origins.get(f"{cls.table}.{key}", source)
            raise ConfigError(f"{_lead(origin)}unknown key {cls.table}.{key}", hint=did_you_mean(key, known))
    for key, field in known.items():
        if key not in data and field.default is dataclasses.MISSING:
            raise ConfigError(f"{_lead(source)}{cls.table}.{key} is missing", hint=f"Write {key} in [{cls.table}].")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        origin = origins.get(error.message.split(" ", 1)[0], source)
        raise ConfigError(_lead(origin) + error.message, hint=error.hint) from error


def _lead(origin: str) -> str:
    return f"{origin}: " if origin else ""


def _to_json(config: Config) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps({f.name: getattr(config, f.name) for f in dataclasses.fields(config)}))
    return data


def _fold(text: str) -> str:
    return " ".join(text.lower().split())


def _check_types(config: Config) -> None:
    hints = get_type_hints(type(config))
    for key in (field.name for field in dataclasses.fields(config)):
        value, hint = getattr(config, key), hints[key]
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if any(_fits(value, kind) for kind in kinds):
            continue
        options = [str(option) for kind in kinds if get_origin(kind) is Literal for option in get_args(kind)]
        expected = " or ".join(_describe(kind) for kind in kinds if kind is not type(None))
        near = did_you_mean(value, options) if options and isinstance(value, str) else ""
        raise _bad(config, key, expected, hint=near)


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if get_origin(kind) is Mapping:
        return isinstance(value, dict) and all(
            isinstance(name, str) and name for pair in value.items() for name in pair
        )
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(repr(option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        return "a list of texts"
    if get_origin(kind) is Mapping:
        return 'a table of names such as {input = "question"}'
    return {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number"}[kind]


def _check_at_least(config: Config, least: int, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if value is not None and value < least:
            raise _bad(config, key, f"at least {least}")


def _bad(config: Config, key: str, expected: str, hint: str = "") -> ConfigError:
    """An error that begins with the key, so that `_from_mapping` can say where the key was written."""
    value = getattr(config, key)
    shown = list(value) if isinstance(value, tuple) else value
    return ConfigError(f"{config.table}.{key} = {shown!r} ({type(shown).__name__}) is not {expected}", hint=hint)
