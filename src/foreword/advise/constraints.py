"""A decision's constraints: a TOML file in, checked and complete out; every default that was assumed is kept."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreword.advise.bases.find import KNOWN, BaseShape, from_folder, from_numbers
from foreword.advise.cost.hardware import Hardware, find_hardware
from foreword.advise.questions import (
    TABLES,
    UNIT_MEANS,
    Audit,
    Change,
    Limits,
    Priorities,
    Question,
    Tasks,
    Traffic,
    questions,
)
from foreword.advise.units import parse_bytes, parse_seconds
from foreword.errors import ConfigError, did_you_mean

ALL_TABLES = ("base", *TABLES, "hardware")
DEFAULT_HARDWARE = "h100"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """Everything that a decision rests on. Bytes, hours, milliseconds and tokens, as `questions` says."""

    base: BaseShape
    tasks: Tasks = field(default_factory=Tasks)
    limits: Limits = field(default_factory=Limits)
    change: Change = field(default_factory=Change)
    traffic: Traffic = field(default_factory=Traffic)
    audit: Audit = field(default_factory=Audit)
    priorities: Priorities = field(default_factory=Priorities)
    hardware: Hardware
    assumed: tuple[str, ...] = ()
    """One sentence for each default that stands in for something not given."""

    def value(self, path: str) -> Any:
        """Return one key's value: `limits.storage_total_bytes`."""
        table, _, name = path.partition(".")
        return getattr(getattr(self, table), name)

    def replaced(self, path: str, value: Any) -> Constraints:
        """Return these constraints with one key changed."""
        table, _, name = path.partition(".")
        changed = dataclasses.replace(getattr(self, table), **{name: value})
        return dataclasses.replace(self, **{table: changed})

    def to_json(self) -> dict[str, Any]:
        """Return every key, JSON-ready; the base and the hardware by name."""
        tables = {name: dataclasses.asdict(getattr(self, name)) for name in TABLES}
        return {"base": self.base.name, **tables, "hardware": self.hardware.name, "assumed": list(self.assumed)}


def load_constraints(path: str | Path, overrides: Sequence[str] = ()) -> Constraints:
    """Read a constraints file; `overrides` such as `limits.storage_total_bytes=20 MB` stand above it.

    A folder of a base is relative to the file's folder. Raises ConfigError naming file, key, value and cure.
    """
    path = Path(path)
    tables = read_tables(path)
    try:
        return from_tables(with_overrides(tables, overrides), folder=path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error


def read_tables(path: Path) -> dict[str, Any]:
    """Return the tables of a file as they stand. Raises ConfigError for what cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="Check the path of the file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error})", hint="Save the file as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}", hint='Text needs quotes: surface = "text".') from error


def with_overrides(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the tables with `table.key=value` overrides set; a value that is not TOML is text."""
    merged = {name: dict(table) if isinstance(table, Mapping) else table for name, table in tables.items()}
    for override in overrides:
        target, equals, text = override.partition("=")
        table, dot, key = target.strip().partition(".")
        if not (equals and dot and key):
            raise ConfigError(
                f"override {override!r} is not of the form table.key=value",
                hint="For example limits.storage_total_bytes=20 MB.",
            )
        if table not in ALL_TABLES:
            raise ConfigError(f"override {override!r}: unknown table {table!r}", hint=did_you_mean(table, ALL_TABLES))
        try:
            parsed = tomllib.loads(f"value = {text}")
        except tomllib.TOMLDecodeError:
            parsed = {}
        merged.setdefault(table, {})[key] = parsed["value"] if parsed.keys() == {"value"} else text.strip()
    return merged


def from_tables(tables: Mapping[str, Any], *, folder: Path | None = None) -> Constraints:
    """Build constraints from the tables of a file. Raises ConfigError for what is unknown, wrong or contradictory."""
    for name, table in tables.items():
        if name not in ALL_TABLES:
            raise ConfigError(f"unknown table [{name}]", hint=did_you_mean(name, ALL_TABLES))
        if not isinstance(table, Mapping):
            raise ConfigError(f"{name} = {table!r} is not a table", hint=f"Write [{name}] above its keys.")
    assumed: list[str] = []
    base = _read_base(tables.get("base", {}), folder or Path())
    assumed += [f"base: {text}" for text in base.assumed]
    read = {name: _read_table(name, tables.get(name, {}), assumed) for name in TABLES}
    hardware = _read_hardware(tables.get("hardware", {}), assumed)
    constraints = Constraints(base=base, hardware=hardware, assumed=tuple(assumed), **read)
    check_contradictions(constraints)
    return constraints


def check_contradictions(constraints: Constraints) -> None:
    """Raise ConfigError naming both keys where two constraints leave no room for any method."""
    tasks, limits, change = constraints.tasks, constraints.limits, constraints.change
    longest = tasks.input_tokens + tasks.output_tokens
    if limits.context_tokens is not None and longest > limits.context_tokens:
        raise ConfigError(
            f"limits.context_tokens = {limits.context_tokens:,} is less than tasks.input_tokens = "
            f"{tasks.input_tokens:,} and tasks.output_tokens = {tasks.output_tokens:,} together ({longest:,})",
            hint="Not even the bare request fits; raise the limit or shorten the texts.",
        )
    held = constraints.base.context_tokens
    if limits.context_tokens is not None and held is not None and limits.context_tokens > held:
        raise ConfigError(
            f"limits.context_tokens = {limits.context_tokens:,} is more than {constraints.base.name} holds ({held:,})",
            hint=f"Set it to {held} at most, or leave it out.",
        )
    if limits.update_deadline_hours is not None and change.review_hours > limits.update_deadline_hours:
        raise ConfigError(
            f"change.review_hours = {change.review_hours:g} is more than limits.update_deadline_hours = "
            f"{limits.update_deadline_hours:g} hours",
            hint="Even a changed word must be judged and approved: lengthen the deadline or shorten the review.",
        )
    if (
        limits.storage_per_task_bytes is not None
        and limits.storage_total_bytes is not None
        and limits.storage_per_task_bytes > limits.storage_total_bytes
    ):
        raise ConfigError(
            f"limits.storage_per_task_bytes = {limits.storage_per_task_bytes:,.0f} bytes is more than "
            f"limits.storage_total_bytes = {limits.storage_total_bytes:,.0f} bytes for all {tasks.count} tasks",
            hint="Leave out the one that does not bind.",
        )


def read_value(question: Question, value: Any) -> Any:
    """Return a key's value in its unit, from a TOML value or from a typed text. Raises ConfigError."""
    if value is None:
        return None
    try:
        read: Any = _READERS.get(question.unit, _number)(value)
    except ValueError as error:
        why = f": {error}" if str(error) else ""
        raise ConfigError(
            f"{question.path} = {value!r} is not {UNIT_MEANS[question.unit]}{why}", hint=_example(question)
        ) from error
    if question.choices and read not in question.choices:
        raise ConfigError(
            f"{question.path} = {value!r} is none of {', '.join(question.choices)}",
            hint=did_you_mean(str(value), question.choices),
        )
    if question.unit == "score" and not 0 <= float(read) <= 1:
        raise ConfigError(f"{question.path} = {value!r} is not {UNIT_MEANS['score']}", hint="Write 0.85 for 85 %.")
    if question.table == "limits" and read == 0:
        raise ConfigError(
            f"{question.path} = {value!r} leaves no room for anything",
            hint="Leave the key out where there is no limit, or give the smallest amount that is allowed.",
        )
    if question.least is not None and isinstance(read, int | float) and read < question.least:
        raise ConfigError(f"{question.path} = {value!r} is less than {question.least:g}")
    return read


def describe_default(question: Question) -> str:
    """Return the sentence that says which default stands in for a key that was not given."""
    if question.default is None:
        shown = "no limit" if question.table == "limits" else "not known"
        shown = "by the rules of the plan" if question.name == "num_vectors" else shown
    elif isinstance(question.default, bool):
        shown = "yes" if question.default else "no"
    else:
        units = {"hours": " hours", "ms": " ms", "bytes": " bytes", "tokens": " tokens"}
        shown = f"{question.default:g}" if isinstance(question.default, float) else str(question.default)
        shown += units.get(question.unit, "")
    return f"`{question.path}`: {shown}"


def _read_table(name: str, table: Mapping[str, Any], assumed: list[str]) -> Any:
    known = {question.name: question for question in questions() if question.table == name}
    for key in table:
        if key not in known:
            raise ConfigError(f"unknown key {name}.{key}", hint=did_you_mean(key, known))
    values = {}
    for key, question in known.items():
        if key in table:
            values[key] = read_value(question, table[key])
        elif name != "priorities":
            assumed.append(describe_default(question))
    return TABLES[name](**values)


def _read_base(table: Mapping[str, Any], folder: Path) -> BaseShape:
    if not table:
        raise ConfigError(
            "no table [base]", hint='Write [base] and known = "qwen3-32b", folder = "models/base", or its numbers.'
        )
    if "known" in table and "folder" in table:
        raise ConfigError(
            f"base.known = {table['known']!r} and base.folder = {table['folder']!r} both name the base",
            hint="Give one of them.",
        )
    for key in ("known", "folder"):
        if key in table:
            if len(table) > 1:
                other = next(name for name in table if name != key)
                raise ConfigError(f"base.{key} stands beside base.{other}", hint=f"base.{key} says it all; leave it.")
            if not isinstance(table[key], str) or not table[key]:
                raise ConfigError(f"base.{key} = {table[key]!r} is not a name in quotes")
    if "folder" in table:
        return from_folder(folder / table["folder"])
    if "known" in table:
        if table["known"].lower() not in KNOWN:
            raise ConfigError(f"base.known = {table['known']!r}", hint=did_you_mean(table["known"].lower(), KNOWN))
        return KNOWN[table["known"].lower()]
    return from_numbers(table)


def _read_hardware(table: Mapping[str, Any], assumed: list[str]) -> Hardware:
    fields = [item.name for item in dataclasses.fields(Hardware)]
    for key in table:
        if key not in ("known", *fields):
            raise ConfigError(f"unknown key hardware.{key}", hint=did_you_mean(key, ("known", *fields)))
        if key not in ("known", "name", "source") and (not isinstance(table[key], int | float) or table[key] is True):
            raise ConfigError(f"hardware.{key} = {table[key]!r} is not a number")
    if "known" not in table and (missing := {"peak_flops_per_s", "bytes_per_s", "memory_bytes"} - table.keys()):
        if table and "utilisation" not in table:
            raise ConfigError(
                f"hardware.{sorted(missing)[0]} is missing", hint="Give all its numbers, or a known card by its name."
            )
        assumed.append(f"`hardware.known`: {DEFAULT_HARDWARE}")
    elif "known" not in table:
        return Hardware(**{"name": "the hardware given", **table})
    name = table.get("known", DEFAULT_HARDWARE)
    if not isinstance(name, str):
        raise ConfigError(f"hardware.known = {name!r} is not a name in quotes")
    return dataclasses.replace(find_hardware(name), **{key: value for key, value in table.items() if key != "known"})


def _number(value: Any) -> float:
    """A plain number. Raises ValueError."""
    if isinstance(value, str):
        try:
            value = float(value.replace(",", ""))
        except ValueError:
            raise ValueError from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _with_unit(value: Any, unit: str) -> float:
    """A bare number is in the key's own unit; a text carries its own, or is a bare number."""
    if isinstance(value, str):
        try:
            return _number(value)
        except ValueError:
            if unit == "bytes":
                return parse_bytes(value)
            return parse_seconds(value) / (3600 if unit == "hours" else 1e-3)
    return _number(value)


def _flag(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "yes", "y", "false", "no", "n"):
        return value.lower() in ("true", "yes", "y")
    if not isinstance(value, bool):
        raise ValueError
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value.strip()


_READERS = {
    "count": _whole,
    "tokens": _whole,
    "bytes": lambda value: _with_unit(value, "bytes"),
    "hours": lambda value: _with_unit(value, "hours"),
    "ms": lambda value: _with_unit(value, "ms"),
    "flag": _flag,
    "name": _name,
}


def _example(question: Question) -> str:
    examples = {"bytes": '"20 MB"', "hours": '"1 day"', "ms": '"5 ms"', "flag": "true", "score": "0.85", "name": '"…"'}
    return f"For example {question.name} = {examples.get(question.unit, '20')}."
