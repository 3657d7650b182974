"""Train one method of a comparison and measure what it took; in a process of its own where the base is a path.

A process of its own gives every method the same start: its memory is not hidden in what another has freed, its time
has no warm caches, and what the system kills takes nothing else along.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from foreword.compare.lora import train_lora
from foreword.compare.machine import PeakMemory
from foreword.compare.plan import Lora
from foreword.config import TaskConfig, TrainConfig
from foreword.core.artefact import load_artefact, write_atomically
from foreword.core.model import FrozenModel
from foreword.errors import ForewordError
from foreword.eval.tasks import Task
from foreword.train.checkpoint import FILE
from foreword.train.loop import RESULTS, Progress, TrainingInterrupted, fit
from foreword.train.run import Run, RunResult

TRAINED, JOB = "trained.json", "job.json"
INTERRUPTED = 130
STOP_WAIT_S = 30
SHOW_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One method to train."""

    method: str
    task: TaskConfig
    train: TrainConfig
    lora: Lora
    folder: str
    """Where the method's files go."""
    identity: Mapping[str, Any]
    """What a later comparison must share to use the result again."""
    show: bool = False
    """Print a line on standard error now and then."""
    base: str = ""
    """Folder or hub id; empty where the base is at hand."""
    dtype: str = "auto"
    device: str = "cpu"
    threads: int = 1
    parent: int = 0
    """Process that waits for the result; when it is gone, training stops."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_json` is its inverse."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return data | {
            "task": self.task.to_json(),
            "train": self.train.to_json(),
            "lora": dataclasses.asdict(self.lora),
            "identity": dict(self.identity),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """Build the job from `to_json`'s dict."""
        made = {
            "task": TaskConfig.from_mapping(data["task"]),
            "train": TrainConfig.from_mapping(data["train"]),
            "lora": Lora(**data["lora"]),
        }
        return cls(**{**data, **made})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training a method gave and took."""

    method: str
    file: str | None = None
    """Name of the artefact, or of the adapter's weights, in the method's folder."""
    bytes_per_task: int | None = None
    """Of that file."""
    tensor_bytes: int | None = None
    """Of the trained numbers in it, without header."""
    training_s: float | None = None
    """Wall clock from rows to file: encoding, steps, measurements on dev, writing."""
    step_ms: float | None = None
    """Median of the steps after which nothing is measured on dev."""
    peak_bytes: int | None = None
    peak_how: str = ""
    lr: float | None = None
    steps_done: int = 0
    rows_seen: int = 0
    """Training rows over all steps, with repetition."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """step, and by which measure the kept state was the best."""
    loss: float | None = None
    """Of the last step, in nats per target token."""
    error: Mapping[str, str] | None = None
    """type, message, hint: why there is no file."""
    identity: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `Trained(**data)` is its inverse."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


class StepClock:
    """Times between finished steps, and a line now and then for whoever waits."""

    def __init__(self, job: Job, eval_every: int) -> None:
        self._job, self._eval_every = job, eval_every
        self._last, self._shown = time.perf_counter(), time.monotonic()
        self.seconds: list[float] = []

    def tick(self, step: int, loss: float) -> None:
        """Note a finished step. Raises KeyboardInterrupt where the waiting process is gone."""
        now = time.perf_counter()
        steps, measured = self._job.train.steps, step % self._eval_every == 0
        if step > 1 and not measured and step < steps:  # the first waits for rows to be encoded
            self.seconds.append(now - self._last)
        self._last = now
        if self._job.parent and os.getppid() != self._job.parent:
            raise KeyboardInterrupt
        if self._job.show and (step == steps or time.monotonic() - self._shown > SHOW_EVERY_S):
            self._shown = time.monotonic()
            print(f"{self._job.method}: step {step}/{steps} | loss {loss:.3f}", file=sys.stderr, flush=True)

    @property
    def median_ms(self) -> float | None:
        """The median step without measurements on dev; None where there was none."""
        return 1000 * statistics.median(self.seconds) if self.seconds else None


def train_method(base: FrozenModel, job: Job) -> Trained:
    """Train a method on `base` and write its files and `trained.json`; a method that fails is a result too.

    Raises TrainingInterrupted and KeyboardInterrupt, and RuntimeError if a base tensor changed.
    """
    run, folder = Run(Task(job.task), job.train, job.method), Path(job.folder)
    clock = StepClock(job, run.eval_every)
    _prepare(folder)
    _import_ahead(job.method)
    before = base.checksum()  # reads every weight: what lies in memory from here on is the base
    seconds, result = 0.0, None
    memory = PeakMemory(base.device)
    try:
        with memory:
            started = time.monotonic()
            result = _train(base, job, run, folder, clock)
            seconds = time.monotonic() - started
    except TrainingInterrupted:
        raise
    except Exception as error:  # one method's failure is its row in the comparison
        trained = Trained(method=job.method, error=describe_error(error), lr=run.lr, identity=job.identity)
    else:
        trained = _measured(job, run, result, folder, seconds, clock, memory)
    if base.checksum() != before:
        raise RuntimeError(f"a tensor of the base changed while {job.method} trained")
    write_atomically(folder / TRAINED, json.dumps(trained.to_json(), indent=1).encode())
    return trained


def train_apart(job: Job) -> Trained:
    """Train a method in a process of its own; a process that dies is a failed method.

    Raises TrainingInterrupted where either process is interrupted.
    """
    folder = Path(job.folder)
    _prepare(folder)
    job = dataclasses.replace(job, parent=os.getpid())
    write_atomically(folder / JOB, json.dumps(job.to_json()).encode())
    process = subprocess.Popen([sys.executable, "-m", "foreword.compare.worker", str(folder / JOB)])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        try:
            process.wait(STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    if code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    trained = read_trained(folder)
    if trained is None:
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        why = " (out of memory?)" if code == -signal.SIGKILL else ""
        error = {"type": "ProcessEnded", "message": f"the training process ended with {ended}{why}", "hint": ""}
        return Trained(method=job.method, error=error, identity=job.identity)
    return trained


def read_trained(folder: Path) -> Trained | None:
    """Return what `train_method` wrote into `folder`, or None where it has not finished there."""
    try:
        return Trained(**json.loads((folder / TRAINED).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def describe_error(error: BaseException) -> dict[str, str]:
    """Return an error as type, message and hint."""
    if isinstance(error, ForewordError):
        return {"type": type(error).__name__, "message": error.message, "hint": error.hint}
    first = next(iter(str(error).splitlines()), "")
    return {"type": type(error).__name__, "message": first or type(error).__name__, "hint": ""}


def _import_ahead(method: str) -> None:
    """Load what training will import, so that neither its time nor its memory is the method's."""
    for name in ("peft",) if method == "lora" else ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)


def _train(base: FrozenModel, job: Job, run: Run, folder: Path, clock: StepClock) -> RunResult:
    if job.method == "lora":
        return train_lora(base, run, job.lora, folder, clock.tick)

    def on_progress(progress: Progress) -> None:
        clock.tick(progress.step, progress.losses.get(run.name, float("nan")))

    return fit(base, [run], out=folder, on_progress=on_progress)[0]


def _measured(
    job: Job, run: Run, result: RunResult, folder: Path, seconds: float, clock: StepClock, memory: PeakMemory
) -> Trained:
    if result.error is not None:
        return Trained(method=job.method, error=describe_error(result.error), lr=run.lr, identity=job.identity)
    assert result.artefact is not None
    config = run.config
    per_step = min(config.batch_size, _num_rows(run)) * config.accumulate
    size = result.artefact.stat().st_size
    return Trained(
        method=job.method,
        file=result.artefact.relative_to(folder).as_posix(),
        bytes_per_task=size,
        tensor_bytes=_tensor_bytes(job.method, result.artefact),
        training_s=round(seconds, 3),
        step_ms=clock.median_ms,
        peak_bytes=memory.peak_bytes,
        peak_how=memory.how + ("" if job.device.startswith("cuda") or not job.base else ", in a process of its own"),
        lr=run.lr,
        steps_done=len(result.history),
        rows_seen=len(result.history) * per_step,
        kept={key: result.best.get(key) for key in ("step", "by", "value")},
        loss=result.history[-1]["loss"] if result.history else None,
        identity=job.identity,
    )


def _num_rows(run: Run) -> int:
    rows = len(run.task.rows("train"))
    return rows if run.config.max_train_rows is None else min(rows, run.config.max_train_rows)


def _tensor_bytes(method: str, path: Path) -> int:
    if method != "lora":
        return load_artefact(path).num_bytes
    from safetensors.torch import load_file

    return sum(tensor.numel() * tensor.element_size() for tensor in load_file(path).values())


def _prepare(folder: Path) -> None:
    """Make the method's folder and take away what an interrupted or failed attempt has left there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TRAINED, FILE, RESULTS):
        (folder / name).unlink(missing_ok=True)


def load_for(job: Job) -> FrozenModel:
    """Load the base that a job names, with its number of threads."""
    from foreword.core.model import load_base

    torch.set_num_threads(job.threads)
    return load_base(job.base, dtype=job.dtype, device=job.device)  # type: ignore[arg-type]
