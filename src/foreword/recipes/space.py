"""What a sweep varies: keys of `[train]` with values or ranges, as a grid or drawn at random. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foreword.config import TrainConfig
from foreword.errors import ConfigError, did_you_mean

JUDGING = ("best_by", "eval_every", "eval_rows", "patience", "checkpoint_every_s", "share")
"""Keys that say how a run is judged or kept, not what it learns: equal in all runs of a sweep."""
KEYS = tuple(field.name for field in dataclasses.fields(TrainConfig))
NUMBER = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"({NUMBER}):({NUMBER})(:log)?")
TIMES = re.compile(rf"({NUMBER})x")
FORM = "For example train.lr=0.05,0.1,0.2, or train.lr=0.01:1.0:log with --random."

Setting = dict[str, Any]
"""Values by key of `[train]`; `lr` may be text such as "2x", that many times the default of the run's method."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, whole ones where both ends are whole, evenly or evenly in their logarithms."""

    low: float
    high: float
    is_log: bool = False

    def draw(self, generator: random.Random) -> float | int:
        """Return a number from the range."""
        if self.is_log:
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = generator.uniform(self.low, self.high)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return min(self.high, max(self.low, round(value)))
        return float(f"{value:.3g}")


@dataclass(frozen=True, slots=True)
class Axis:
    """One key of `[train]` and what it may be."""

    key: str
    values: tuple[Any, ...] | Range

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Read `train.lr=0.05,0.1`, `train.init=["text:a, b", "vocab"]`, `train.lr=0.01:1.0:log` or `lr=0.5x,1x,2x`.

        Raises ConfigError naming the part that is wrong, and the nearest known key.
        """
        name, equals, right = text.partition("=")
        table, dot, key = name.strip().rpartition(".")
        if not equals or not right.strip():
            raise ConfigError(f"--grid {text!r} is not of the form train.key=values", hint=FORM)
        if dot and table != "train":
            raise ConfigError(f"--grid {text!r}: a sweep varies keys of [train], not of [{table}]", hint=FORM)
        if key not in KEYS:
            raise ConfigError(f"--grid {text!r}: unknown key train.{key}", hint=did_you_mean(key, KEYS))
        if key == "seed":
            raise ConfigError("a sweep does not choose the seed", hint="Use --seeds 3: every setting with each seed.")
        if key in JUDGING:
            raise ConfigError(
                f"--grid {text!r}: train.{key} says how runs are judged, which is the same for all",
                hint=f"Set it for all runs with --set train.{key}=….",
            )
        return cls(key, _range(text, right.strip()) or _values(text, right.strip()))


def grid_settings(axes: Sequence[Axis]) -> list[Setting]:
    """Return every combination of the axes' values. Raises ConfigError for a range."""
    for axis in axes:
        if isinstance(axis.values, Range):
            raise ConfigError(
                f"train.{axis.key} has a range from {axis.values.low} to {axis.values.high}, and a grid takes values",
                hint="Add --random N to draw settings from ranges, or list the values.",
            )
    listed = [axis.values for axis in axes if not isinstance(axis.values, Range)]
    return [dict(zip((axis.key for axis in axes), values, strict=True)) for values in itertools.product(*listed)]


def random_settings(axes: Sequence[Axis], count: int, seed: int = 0) -> list[Setting]:
    """Return `count` different settings drawn by `seed`: numbers from ranges, values from lists with equal chances.

    Fewer where the space has fewer. Source: Bergstra and Bengio 2012, random search.
    """
    generator = random.Random(seed)
    found: dict[str, Setting] = {}
    for _ in range(50 * count):
        if len(found) == count:
            break
        drawn = {
            axis.key: axis.values.draw(generator) if isinstance(axis.values, Range) else generator.choice(axis.values)
            for axis in axes
        }
        found.setdefault(json.dumps(drawn), drawn)
    return list(found.values())


def check_axes(axes: Sequence[Axis]) -> None:
    """Raise ConfigError where a key is given twice."""
    keys = [axis.key for axis in axes]
    if double := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"train.{double[0]} is given twice", hint="Write all its values behind one --grid.")


def show_setting(setting: Setting) -> str:
    """Return a setting as text: `lr=0.1 method=kv`."""
    return " ".join(f"{key}={value}" for key, value in setting.items())


def setting_toml(setting: Setting) -> str:
    """Return a setting as lines to paste into a task file."""
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in setting.items())
    return "\n".join(["[train]", *lines])


def _range(text: str, right: str) -> Range | None:
    match = RANGE.fullmatch(right)
    if match is None:
        return None
    low, high = (float(end) if re.search(r"[.eE]", end) else int(end) for end in match.group(1, 2))
    if low >= high:
        raise ConfigError(f"--grid {text!r}: the range goes from {low} to {high}", hint="Write the smaller end first.")
    if match.group(3) and low <= 0:
        raise ConfigError(f"--grid {text!r}: a range in logarithms begins at {low}", hint="Begin above 0.")
    return Range(low, high, bool(match.group(3)))


def _values(text: str, right: str) -> tuple[Any, ...]:
    if right.startswith("["):
        try:
            values = tomllib.loads(f"values = {right}")["values"]
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"--grid {text!r}: no TOML list: {error}", hint="Text needs quotes.") from error
    else:
        values = [_value(part.strip()) for part in right.split(",")]
    if "" in values or not values:
        raise ConfigError(f"--grid {text!r} holds an empty value", hint=FORM)
    if len({json.dumps(value) for value in values}) < len(values):
        raise ConfigError(f"--grid {text!r} holds a value twice", hint="List each value once.")
    return tuple(values)


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text
