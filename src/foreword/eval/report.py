"""What an evaluation found: one row per example, the score with its interval, and what is needed to repeat it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from foreword.core.artefact import write_atomically
from foreword.errors import DataError

Decoding = Literal["free", "labels", "choices"]
Kind = Literal["prefix", "hard_text", "few_shot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRow:
    """One judged example."""

    index: int
    """Place among the rows of the data file, from 0."""
    input: str
    target: str
    references: tuple[str, ...]
    output: str
    """The answer, without whitespace at its ends; of label decoding the most probable label."""
    score: float
    """The row's own score; of corpus metrics only for reading."""
    finish_reason: str
    probabilities: Mapping[str, float] | None = None
    """Of each label, in label decoding."""
    residual: float = 0.0
    """Probability spread evenly over labels that were too improbable to be told apart."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_json` is its inverse."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shares = self.probabilities
        rounded = None if shares is None else {label: float(f"{share:.6g}") for label, share in shares.items()}
        return data | {"references": list(self.references), "probabilities": rounded}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvalRow:
        """Build the row from `to_json`'s dict."""
        return cls(**{**data, "references": tuple(data["references"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """A judged split of a task."""

    task: str
    split: str
    metric: str
    score: float
    """0 to 1, higher is better."""
    interval: tuple[float, float]
    """95 % by the bootstrap over rows, seeded."""
    num_rows: int
    kind: Kind
    """What answered: a trained prefix, or the base with the hard text alone or with examples."""
    prefix: str | None
    decoding: Decoding
    """Free greedy text; the most probable label; or greedy text constrained to the labels."""
    others: Mapping[str, float] = field(default_factory=dict)
    """Further metrics of the same answers."""
    per_label: tuple[Mapping[str, Any], ...] = ()
    """label, precision, recall, f1, support: of closed sets."""
    calibration: Mapping[str, float] | None = None
    """ece, confidence (mean), log_loss (nats), max_residual: of label decoding."""
    num_cut: int = 0
    """Answers that ended at max_new_tokens; of free decoding."""
    num_shots: float = 0.0
    """Examples in the prompt, mean over rows; of the few-shot baseline."""
    data_sha256: str
    """Hash of the judged rows; equal hashes may be compared row by row."""
    seed: int
    date: str
    """UTC, ISO 8601."""
    versions: Mapping[str, str]
    seconds: float
    """Wall clock, answers and judging."""
    rows: tuple[EvalRow, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the rows, JSON-ready."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"}
        return data | {"interval": list(self.interval), "per_label": list(self.per_label)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], rows: tuple[EvalRow, ...] = ()) -> EvalReport:
        """Build the report from `to_json`'s dict and its rows."""
        tuples = {"interval": tuple(data["interval"]), "per_label": tuple(data["per_label"])}
        return cls(**{**data, **tuples, "rows": rows})

    def save(self, path: str | Path) -> None:
        """Write the report to `path` (JSON) and its rows beside it (`<stem>.rows.jsonl`), the rows first.

        Raises ArtefactError where the folder cannot be written.
        """
        path = Path(path)
        lines = (json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in self.rows)
        write_atomically(_rows_path(path), "".join(lines).encode())
        write_atomically(path, (json.dumps(self.to_json(), ensure_ascii=False, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> EvalReport:
        """Read what `save` wrote. Raises DataError naming the file."""
        path = Path(path)
        try:
            lines = _rows_path(path).read_bytes().split(b"\n")
            rows = tuple(EvalRow.from_json(json.loads(line)) for line in lines if line.strip())
            return cls.from_json(json.loads(path.read_bytes()), rows)
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}", hint="Check the path.") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is no evaluation report ({type(error).__name__}: {error})") from error

    def summary(self) -> str:
        """Return the report in a few lines of text."""
        low, high = self.interval
        who = {"prefix": f"prefix {self.prefix}", "hard_text": "base with hard text", "few_shot": "base with examples"}
        shots = f", {self.num_shots:.1f} examples" if self.kind == "few_shot" else ""
        lines = [
            f"{self.task} {self.split}, {who[self.kind]}{shots}, {self.decoding} decoding",
            f"{self.metric} {self.score:.4f} [{low:.4f}, {high:.4f}] on {self.num_rows} rows in {self.seconds:.1f} s",
        ]
        if self.others:
            lines.append("also " + ", ".join(f"{name} {value:.4f}" for name, value in self.others.items()))
        if self.calibration:
            lines.append(", ".join(f"{name} {value:.4f}" for name, value in self.calibration.items()))
        if self.num_cut:
            lines.append(f"{self.num_cut} answers were cut at max_new_tokens")
        weakest = sorted(self.per_label, key=lambda line: (line["f1"], line["label"]))[:3]
        if weakest and weakest[0]["f1"] < 1:
            lines.append("weakest labels: " + ", ".join(f"{line['label']} (F1 {line['f1']:.2f})" for line in weakest))
        return "\n".join(lines)


def _rows_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.rows.jsonl")
