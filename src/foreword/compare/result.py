"""What a comparison found: a row per method, paired tests, and what is needed to repeat it. JSON in and out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from foreword.core.artefact import write_atomically
from foreword.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRow:
    """One method, measured. What could not be measured is None; `error` says why where the method failed."""

    method: str
    score: float | None = None
    """0 to 1, higher is better."""
    interval: tuple[float, float] | None = None
    """95 % of the score, by the bootstrap over rows."""
    metric: str = ""
    decoding: str = ""
    num_rows: int = 0
    """Test rows judged."""
    num_cut: int = 0
    """Answers that ended at max_new_tokens."""
    num_shots: float = 0.0
    """Examples in the prompt, mean over rows."""
    bytes_per_task: int | None = None
    """File on disk: the artefact, or the adapter's weights; of text its UTF-8 bytes."""
    tensor_bytes: int | None = None
    """Of that the trained numbers alone."""
    prompt_positions: float | None = None
    """Positions before the first answer token, block and text together: median over the timed requests."""
    training_s: float | None = None
    """Wall clock from rows to file; 0 for text."""
    step_ms: float | None = None
    """Median optimizer step."""
    training_peak_bytes: int | None = None
    """Peak memory of training on top of the base; 0 for text."""
    training_peak_how: str = ""
    first_token_ms: float | None = None
    """Median of one request alone on the engine."""
    latency_ms: float | None = None
    """Median of the whole answer of one request alone on the engine, as many tokens for every method."""
    first_token_cached_ms: float | None = None
    """Of text methods: with the prompt's constant start kept as keys and values, as the others keep theirs."""
    latency_cached_ms: float | None = None
    throughput_tokens_per_s: float | None = None
    """New tokens per second when half of the requests are the task's and half are plain."""
    lr: float | None = None
    steps_done: int = 0
    rows_seen: int = 0
    """Training rows over all steps, with repetition."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """step, and by which measure on dev the kept state was the best."""
    error: Mapping[str, str] | None = None
    """type, message, hint."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_json` is its inverse."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return data | {"interval": None if self.interval is None else list(self.interval), "kept": dict(self.kept)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MeasuredRow:
        """Build the row from `to_json`'s dict."""
        interval = data.get("interval")
        return cls(**{**data, "interval": None if interval is None else tuple(interval)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """One method against another on the same rows; the verdict is on `method`."""

    method: str
    against: str
    role: str
    """What `against` is here: `best` or `hard_text`."""
    difference: float
    interval: tuple[float, float]
    """Of the difference, at the level of the verdict."""
    p_value: float | None
    """McNemar's exact test, unadjusted; None where rows are not right or wrong."""
    only_method: int | None
    only_against: int | None
    alpha: float
    """Level of the verdict: 5 % shared among the tests of this role."""
    verdict: str
    """better, worse, no difference."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_json` is its inverse."""
        return dataclasses.asdict(self) | {"interval": list(self.interval)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Paired:
        """Build the result from `to_json`'s dict."""
        return cls(**{**data, "interval": tuple(data["interval"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Methods on one task and one base. Its JSON is what `foreword advise --measured` reads."""

    base: str
    """Name of the base, not its place."""
    base_sha256: str
    """Of the base's sampled weights."""
    dtype: str
    task: str
    metric: str
    rows: tuple[MeasuredRow, ...]
    paired: tuple[Paired, ...]
    budget: Mapping[str, Any]
    """What every trained method got: steps, batch size, rows, seed, schedule, choice on dev."""
    settings: Mapping[str, Any]
    """How it was judged and timed."""
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    data: Mapping[str, str]
    """sha256 of the splits' rows."""
    date: str
    """UTC, ISO 8601."""

    @property
    def judged(self) -> list[MeasuredRow]:
        """The rows with a score, best first; of equals the one with fewer bytes."""
        rows = [row for row in self.rows if row.score is not None]
        return sorted(rows, key=lambda row: (-(row.score or 0.0), row.bytes_per_task or 0))

    @property
    def best(self) -> MeasuredRow | None:
        """The row with the highest score."""
        return next(iter(self.judged), None)

    def level_with_best(self) -> list[MeasuredRow]:
        """Return the best row and those that the paired tests cannot tell from it, in the order of `judged`."""
        if self.best is None:
            return []
        level = {test.method for test in self.paired if test.role == "best" and test.verdict == "no difference"}
        return [row for row in self.judged if row is self.best or row.method in level]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_json` is its inverse."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return data | {
            "rows": [row.to_json() for row in self.rows],
            "paired": [test.to_json() for test in self.paired],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        """Build the comparison from `to_json`'s dict. Raises DataError naming what is wrong with it."""
        try:
            rows = tuple(MeasuredRow.from_json(row) for row in data["rows"])
            paired = tuple(Paired.from_json(test) for test in data["paired"])
            return cls(**{**data, "rows": rows, "paired": paired})
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not a comparison ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path) -> None:
        """Write the comparison as JSON. Raises ArtefactError where the folder cannot be written."""
        write_atomically(path, (json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n").encode())


def save_all(comparisons: Sequence[Comparison], path: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write several tasks' comparisons into one file, under `tasks`, with `extra` keys beside it."""
    data = {**(extra or {}), "tasks": [comparison.to_json() for comparison in comparisons]}
    write_atomically(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def load_comparisons(path: str | Path) -> list[Comparison]:
    """Read a comparison, or several under `tasks`. Raises DataError naming the file."""
    path = Path(path)
    try:
        data = json.loads(path.read_bytes())
        parts = data["tasks"] if "tasks" in data else [data]
        return [Comparison.from_json(part) for part in parts]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="Check the path.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} holds no comparison ({type(error).__name__}: {error})") from error
    except DataError as error:
        raise DataError(f"{path}: {error.message}", hint="Make it with foreword compare.") from error


def pareto_front(items: Sequence[T], cost: Callable[[T], float], gain: Callable[[T], float]) -> list[T]:
    """Return the items that no other beats: none costs as little and gains as much and is better in one of both.

    In the order given; items equal in both stand or fall together. Quadratic: meant for methods, not for millions.
    """

    def beats(a: T, b: T) -> bool:
        no_worse = cost(a) <= cost(b) and gain(a) >= gain(b)
        return no_worse and (cost(a) < cost(b) or gain(a) > gain(b))

    return [item for item in items if not any(beats(other, item) for other in items)]
