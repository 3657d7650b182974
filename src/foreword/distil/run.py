"""`distil`: one or many contexts compressed in one joint pass of `fit`, judged, and written as artefacts."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreword.core.artefact import Artefact, load_artefact, save_artefact, write_atomically
from foreword.core.model import FrozenModel
from foreword.distil.ground import Desk
from foreword.distil.judge import Judged, judge_student
from foreword.distil.prepare import Prepared, prepare
from foreword.distil.questions import count_by_type
from foreword.distil.settings import Job
from foreword.engine.engine import Engine
from foreword.errors import ConfigError, ForewordError
from foreword.train.loop import RESULTS, Progress, fit
from foreword.train.run import RunResult

REPORT = "{name}.distil.json"


@dataclass(frozen=True, slots=True, eq=False)
class Distilled:
    """A compressed context: its artefact and what was found out about it."""

    prepared: Prepared
    artefact: Artefact
    status: str
    judged: Judged
    error: ForewordError | None
    """Why a diverged training stopped; what is judged are its last good vectors."""
    seconds: float
    """From reading the context to the end of judging; of several contexts together."""

    def to_json(self) -> dict[str, Any]:
        """Return every number, JSON-ready."""
        ground, config, base = self.prepared.ground, self.prepared.job.distil, self.artefact.header.spec
        dtype = str(self.artefact.header.training["dtype"])
        itemsize = 4 if dtype == "float32" else 2
        return {
            "name": config.name,
            "artefact": str(self.artefact.path),
            "sha256": self.artefact.sha256,
            "status": self.status,
            "method": self.artefact.header.method,
            "num_vectors": ground.num_vectors,
            "num_context_tokens": len(ground.whole),
            "ratio": len(ground.whole) / ground.num_vectors,
            "num_chunks": len(ground.chunks),
            "bytes": {
                "file": self.artefact.path.stat().st_size if self.artefact.path else None,
                "vectors": sum(tensor.numel() * tensor.element_size() for tensor in self.artefact.tensors.values()),
                "kv_dtype": dtype,
                "kv_of_vectors": base.kv_bytes(ground.num_vectors, itemsize),
                "kv_of_context": base.kv_bytes(len(ground.whole), itemsize),
            },
            "questions": {
                "learned": len(self.prepared.train),
                "held_back": len(self.prepared.dev),
                "judged": len(self.prepared.test),
                "by_type": count_by_type(lesson.question for lesson in self.prepared.train),
                "held_out": self.judged.held_out,
                "right_is": self.judged.against,
            },
            "gap_closed": self.judged["student"].gap_closed,
            "retained": self.judged.retained,
            "standings": [standing.to_json() for standing in self.judged.standings],
            "elsewhere": [damage.to_json() for damage in self.judged.damage],
            "seconds": round(self.seconds, 1),
        }


def distil(
    base: FrozenModel,
    jobs: Sequence[Job],
    *,
    out: str | Path,
    cache: str | Path | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Distilled]:
    """Compress contexts into vectors: the teacher is the base with the context, the student has the vectors instead.

    All contexts train in one pass; each gets the vectors that it would get alone. `out` receives what `fit` writes, the
    questions and answers, and `<name>.distil.json`. `cache`, a folder, keeps the teacher's distributions for later
    calls. With `resume` a killed call goes on where it was: nothing that was computed is computed again.

    Raises ConfigError, DataError and IncompatibleModel before any training, TrainingInterrupted on a signal.
    """
    folder, started = Path(out), time.monotonic()
    _check(jobs, folder, resume)
    desk = Desk(base, Engine(base), folder, None if cache is None else Path(cache), tell or (lambda line: None))
    prepared = [prepare(desk, job) for job in jobs]
    results = _trained(desk, prepared, resume, on_progress)
    found = []
    for item, result in zip(prepared, results, strict=True):
        assert result.artefact is not None
        artefact = load_artefact(result.artefact)
        judged = judge_student(desk, item, artefact)
        sealed = _seal(artefact, item, judged)
        made = Distilled(item, sealed, result.status, judged, result.error, time.monotonic() - started)
        data = json.dumps(made.to_json(), indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / REPORT.format(name=item.job.distil.name), data.encode())
        found.append(made)
    return found


def _trained(
    desk: Desk, prepared: Sequence[Prepared], resume: bool, on_progress: Callable[[Progress], None] | None
) -> list[RunResult]:
    """Train, or take what an earlier call has finished."""
    runs, path = [item.run for item in prepared], desk.out / RESULTS
    if not path.exists():
        return fit(desk.base, runs, out=desk.out, resume=resume, on_progress=on_progress)
    known = {entry["name"]: entry for entry in json.loads(path.read_text())}
    if missing := [run.name for run in runs if run.name not in known]:
        raise ConfigError(
            f"{path} holds {', '.join(known)}, and not {missing[0]!r}", hint="Resume with the same contexts."
        )
    results = []
    for run in runs:
        result = RunResult(run.name, known[run.name]["status"], Path(known[run.name]["artefact"]))
        header = load_artefact(desk.out / f"{run.name}.safetensors").header
        if header.training.get("data_sha256") != run.data_sha256() or header.num_vectors != run.template.num_left:
            raise ConfigError(
                f"{path} holds {run.name!r} trained on other questions, teacher or number of vectors",
                hint="Use another --out.",
            )
        result.artefact = desk.out / f"{run.name}.safetensors"
        results.append(result)
    return results


def _seal(artefact: Artefact, prepared: Prepared, judged: Judged) -> Artefact:
    """Write into the header what the vectors stand for, and how they were judged; the vectors stay as they are.

    Answers are open: repeated answers of the teacher's are no closed set of labels.
    """
    config, ground, student = prepared.job.distil, prepared.ground, judged["student"]
    distillation = {
        "objective": config.objective,
        "learn": config.learn,
        "top_k": config.top_k if config.objective == "kl" else None,
        "context": ground.context.name,
        "context_sha256": ground.context.sha256(),
        "context_tokens": len(ground.whole),
        "ratio": round(len(ground.whole) / ground.num_vectors, 3),
        "chunks": len(ground.chunks),
        "teacher": f"the same base with the context, {'turns' if ground.context.turns else ground.context.place}",
        "questions": count_by_type(lesson.question for lesson in prepared.train),
    }
    header = dataclasses.replace(
        artefact.header,
        labels=(),
        training={**artefact.header.training, "distil": distillation},
        evaluation={
            "metric": config.metric,
            "score": student.report.score,
            "interval": list(student.report.interval),
            "num_rows": student.report.num_rows,
            "held_out": judged.held_out,
            "full_context": judged["full"].report.score,
            "no_context": judged["none"].report.score,
            "kl_gap_closed": student.gap_closed,
        },
    )
    assert artefact.path is not None
    return save_artefact(artefact.path, header, artefact.tensors)


def _check(jobs: Sequence[Job], folder: Path, resume: bool) -> None:
    names = [job.distil.name for job in jobs]
    if not jobs:
        raise ConfigError("distil needs at least one context")
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two contexts are named {double!r}", hint="Give each its own name.")
    if (folder / RESULTS).exists() and not resume:
        raise ConfigError(
            f"{folder} holds finished results", hint="Use another folder, or --resume to judge them again."
        )
