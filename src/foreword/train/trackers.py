"""Curves to TensorBoard, MLflow or Weights & Biases, through `accelerate`; each run is a run of its own there.

A tracker works on a thread, so that a slow server does not slow training. What it has sent is noted in
`<out>/<tracker>.sent.json`: a resumed training goes on in the same runs, sends what they lack, and no step twice.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from foreword.train.observers import Measures
    from foreword.train.run import Run, Status

NEEDS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""The module that each tracker needs beside accelerate."""
PROJECT = "foreword"
"""Experiment of MLflow, project of W&B; MLFLOW_EXPERIMENT_NAME and WANDB_PROJECT stand above it."""
WAIT_S = 30.0
"""Seconds that the end of a training waits for a tracker that is behind."""


@dataclass(frozen=True, slots=True)
class Sink:
    """One run in one tracker."""

    id: str
    """Under which a resumed training finds the run again; empty where the folder is enough."""
    log: Callable[[dict[str, float], int], None]
    """Send measures of a step."""
    close: Callable[[Status], None]


class Tracker:
    """An observer that sends each run's settings and curves to a tracker, on a thread of its own.

    `folder` is the training's: TensorBoard's files, MLflow's database where no MLFLOW_TRACKING_URI is set, and W&B's
    local files go there. Raises ConfigError for a tracker that is unknown or not installed.
    """

    def __init__(self, name: str, folder: str | Path, *, wait_s: float = WAIT_S) -> None:
        self.name, self._folder, self._wait_s = name, Path(folder), wait_s
        check_tracker(name)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._sinks: dict[str, Sink] = {}
        self._before: dict[str, dict[str, Any]] = {}
        self._sent: dict[str, dict[str, Any]] = {}
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)

    def start(self, run: Run, history: Sequence[Measures]) -> None:
        """Open the run, or go on with it, and send the steps of `history` that it lacks."""
        if not self._thread.is_alive():
            self._before = self._read_sent()
            self._thread.start()
        rows = [dict(row) for row in history]
        self._jobs.put(lambda: self._open(run, rows))

    def step(self, run: Run, measures: Measures) -> None:
        """Send a step's measures soon. Raises what went wrong with earlier ones."""
        self._raise_failure()
        row = dict(measures)
        self._jobs.put(lambda: self._send(run.name, [row]))

    def finish(self, statuses: Mapping[str, Status]) -> None:
        """Close all runs, and wait for that. Raises TimeoutError where the tracker does not come to an end."""
        self._raise_failure()
        self._jobs.put(lambda: self._close(statuses))
        self._jobs.put(None)
        self._thread.join(self._wait_s)
        self._raise_failure()
        if self._thread.is_alive():
            raise TimeoutError(f"it did not take up everything within {self._wait_s:g} s")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                job()
        except Exception as error:  # raised again on the training thread, at the next step
            self._failure = error

    def _open(self, run: Run, history: Sequence[Measures]) -> None:
        known = self._before.get(run.name, {}) if history else {}
        known = self._sent[run.name] = {"id": "", "step": 0, **known}
        sink = OPEN[self.name](self._folder, run.name, known["id"], flat_settings(run))
        self._sinks[run.name], known["id"] = sink, sink.id
        self._send(run.name, history)

    def _send(self, name: str, rows: Sequence[Measures]) -> None:
        sent = self._sent[name]
        new = [row for row in rows if row["step"] > sent["step"]]
        if new:
            sent["step"] = new[-1]["step"]
        self._write_sent()  # before sending: a killed training may leave a gap there, and no step twice
        for row in new:
            numbers = {key: value for key, value in row.items() if key != "step"}
            self._sinks[name].log(numbers, row["step"])

    def _close(self, statuses: Mapping[str, Status]) -> None:
        for name, sink in self._sinks.items():
            sink.close(statuses[name])

    @property
    def _file(self) -> Path:
        return self._folder / f"{self.name}.sent.json"

    def _read_sent(self) -> dict[str, dict[str, Any]]:
        try:
            data: dict[str, dict[str, Any]] = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return data

    def _write_sent(self) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(self._sent))
        new.replace(self._file)


def check_tracker(name: str) -> None:
    """Raise ConfigError for a tracker that is unknown or whose packages are missing."""
    if name not in NEEDS:
        raise ConfigError(f"unknown tracker {name!r}", hint=did_you_mean(name, NEEDS))
    if missing := [module for module in ("accelerate", NEEDS[name]) if find_spec(module) is None]:
        raise ConfigError(
            f"tracker {name!r} needs {' and '.join(missing)}, which is not installed",
            hint=f"pip install {' '.join(missing)}",
        )


def flat_settings(run: Run) -> dict[str, Any]:
    """Return a run's resolved settings as `table.key` to a number, a text or a truth value, and its data's hash."""
    settings = {
        f"{table}.{key}": value for table, values in run.resolved().items() for key, value in dict(values).items()
    }
    plain = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
    return {**plain, "data_sha256": run.data_sha256()}


def _open_tensorboard(folder: Path, name: str, known: str, settings: Mapping[str, Any]) -> Sink:
    from accelerate.tracking import TensorBoardTracker

    tracker = _started(TensorBoardTracker(name, folder / "tensorboard"))
    if not known:
        rows = "".join(f"| {key} | {value} |\n" for key, value in settings.items())
        tracker.log({"settings": f"| setting | value |\n|---|---|\n{rows}"}, step=0)
    return Sink("files", lambda values, step: tracker.log(values, step=step), lambda status: tracker.finish())


def _open_mlflow(folder: Path, name: str, known: str, settings: Mapping[str, Any]) -> Sink:
    import mlflow
    from accelerate.tracking import MLflowTracker

    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is the command's own
    if not (os.environ.get("MLFLOW_TRACKING_URI") or mlflow.is_tracking_uri_set()):
        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').absolute()}")
    tracker = _started(MLflowTracker(experiment_name=PROJECT, run_name=name, run_id=known or None))
    if not known:
        tracker.store_init_configuration(dict(settings))
    run_id = tracker.tracker.info.run_id
    mlflow.end_run("RUNNING")  # mlflow has one active run at a time; steps are sent by the run's id

    def close(status: Status) -> None:
        ends = {"diverged": "FAILED", "running": "KILLED", "stopped": "KILLED"}
        mlflow.MlflowClient().set_terminated(run_id, ends.get(status, "FINISHED"))

    return Sink(run_id, lambda values, step: tracker.log(values, step=step, run_id=run_id), close)


def _open_wandb(folder: Path, name: str, known: str, settings: Mapping[str, Any]) -> Sink:
    from accelerate.tracking import WandBTracker

    tracker = _started(
        WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            group=folder.name,
            dir=str(folder),
            config=dict(settings),
            id=known or None,
            resume="allow",
            reinit="create_new",
        )
    )
    run = tracker.tracker
    return Sink(run.id, lambda values, step: tracker.log(values, step=step), lambda status: run.finish(_code(status)))


def _code(status: Status) -> int:
    return int(status in ("diverged", "running"))


def _started(tracker: Any) -> Any:
    from accelerate import PartialState

    PartialState()  # accelerate's trackers ask it which process they are in
    tracker.start()
    return tracker


OPEN: Mapping[str, Callable[[Path, str, str, Mapping[str, Any]], Sink]] = {
    "tensorboard": _open_tensorboard,
    "mlflow": _open_mlflow,
    "wandb": _open_wandb,
}
