"""`fit`: the only training loop. One run, twelve tasks together and a sweep are the same call with a longer list."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from foreword.core.artefact import write_atomically
from foreword.core.compile import compile
from foreword.core.model import FrozenModel
from foreword.core.prompt import vectors_from_tensors
from foreword.errors import ArtefactError, ConfigError, ForewordError
from foreword.train.checkpoint import FILE, load_checkpoint, save_checkpoint
from foreword.train.curves import write_history
from foreword.train.export import export
from foreword.train.loss import MICRO_TOKENS, mean_losses, step_gradients
from foreword.train.run import Run, RunResult
from foreword.train.state import RunState

RESULTS = "results.json"


class TrainingInterrupted(ForewordError):
    """Training stopped on a signal; everything up to the last finished step is in the checkpoint."""

    exit_code = 130


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress display gets after each step."""

    step: int
    steps: int
    losses: dict[str, float]
    """Loss of each run still going, in nats per target token."""
    dev: dict[str, dict[str, float]]
    """Newest dev measures by run."""
    tokens_per_s: float
    remaining_s: float


def fit(
    base: FrozenModel,
    runs: Sequence[Run],
    *,
    out: str | Path,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    micro_tokens: int = MICRO_TOKENS,
) -> list[RunResult]:
    """Train the vectors of one or many runs in one pass over the frozen base; write an artefact for each into `out`.

    Rows of all runs share forwards, each run has its own optimizer, schedule, early stop and best-so-far, and gets the
    vectors it would get alone. `out` receives `<name>.safetensors`, `<name>.history.jsonl`, `<name>.png`,
    `results.json`, and while training a checkpoint that `resume` goes on from exactly. A run whose loss is NaN stops
    with its last good vectors kept (status "diverged"), its neighbours go on.

    Raises ConfigError and DataError before any training, TrainingInterrupted on SIGINT or SIGTERM with the state
    saved, RuntimeError if a base tensor changed.
    """
    folder = Path(out)
    _check_runs(runs, folder, resume)
    states = [RunState(base, run) for run in runs]
    load_checkpoint(folder, base, states)
    before = base.checksum()
    with _stop_on_signals() as stop:
        try:
            _train(base, states, folder, stop, on_progress, micro_tokens)
        finally:
            if base.checksum() != before:
                raise RuntimeError("a tensor of the base changed while training; do not use its vectors")
    results = []
    for state in states:
        state.finish()
        results.append(_result(base, state, folder))
    write_atomically(folder / RESULTS, json.dumps([result.to_json() for result in results], indent=2).encode())
    (folder / FILE).unlink(missing_ok=True)
    return results


def _train(
    base: FrozenModel,
    states: Sequence[RunState],
    folder: Path,
    stop: threading.Event,
    on_progress: Callable[[Progress], None] | None,
    micro_tokens: int,
) -> None:
    started, last_save, tokens = time.monotonic(), time.monotonic(), 0
    every = min(state.run.config.checkpoint_every_s for state in states)
    first = sum(state.step for state in states)
    while active := [state for state in states if state.is_running]:
        tokens += _step(base, active, micro_tokens)
        _evaluate_due(base, active)
        now = time.monotonic()
        if on_progress is not None:
            on_progress(_progress(states, tokens, now - started, first))
        if stop.is_set():
            save_checkpoint(folder, base, states)
            raise TrainingInterrupted(
                f"stopped after step {max(state.step for state in states)}; the state is in {folder / FILE}",
                hint="Run the same command with --resume to go on.",
            )
        if now - last_save > every:
            _save_if_possible(folder, base, states)
            last_save = time.monotonic()


def _step(base: FrozenModel, active: Sequence[RunState], micro_tokens: int) -> int:
    """Take one step of every active run; return the text tokens seen."""
    batches = [state.step_batch() for state in active]
    losses = step_gradients(base, batches, micro_tokens)
    total = 0
    for state, batch, loss in zip(active, batches, losses, strict=True):
        count = sum(len(row.ids) for row in batch.rows)
        total += count
        state.update(loss, count)
        if state.step >= state.run.config.steps and state.is_running:
            state.status = "done"
    return total


def _evaluate_due(base: FrozenModel, active: Sequence[RunState]) -> None:
    """Measure the runs whose evaluation is due: dev loss of all in shared forwards, then the metric where asked."""
    due = [
        state
        for state in active
        if state.dev and state.status != "diverged" and (state.step % state.run.eval_every == 0 or not state.is_running)
    ]
    if not due:
        return
    prefixes = [
        compile(base, vectors_from_tensors(state.snapshot(), state.block), name=state.run.name) for state in due
    ]
    losses = mean_losses(base, [(prefix, state.dev) for prefix, state in zip(prefixes, due, strict=True)])
    for state, prefix, loss in zip(due, prefixes, losses, strict=True):
        measures = {"dev_loss": loss}
        if state.run.config.best_by == "metric":
            measures["dev_metric"] = state.dev_metric(base, prefix)
        state.note(measures)


def _result(base: FrozenModel, state: RunState, folder: Path) -> RunResult:
    name = state.run.name
    path = folder / f"{name}.safetensors"
    export(base, state, path)
    write_history(folder, name, state.history)
    return RunResult(name, state.status, path, state.best, state.history, state.error)


def _progress(states: Sequence[RunState], tokens: int, elapsed: float, first: int) -> Progress:
    done = sum(state.step for state in states) - first
    left = sum(state.run.config.steps - state.step for state in states if state.is_running)
    dev = {}
    for state in states:
        newest = next((row for row in reversed(state.history) if "dev_loss" in row), None)
        if newest:
            dev[state.run.name] = {key: newest[key] for key in ("dev_loss", "dev_metric") if key in newest}
    return Progress(
        step=max(state.step for state in states),
        steps=max(state.run.config.steps for state in states),
        losses={state.run.name: state.history[-1]["loss"] for state in states if state.history},
        dev=dev,
        tokens_per_s=tokens / max(elapsed, 1e-9),
        remaining_s=elapsed / max(done, 1) * left,
    )


def _check_runs(runs: Sequence[Run], folder: Path, resume: bool) -> None:
    names = [run.name for run in runs]
    if not runs:
        raise ConfigError("fit needs at least one run")
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two runs are named {double!r}", hint="Give each run its own name.")
    if (folder / FILE).exists() and not resume:
        raise ConfigError(f"{folder} holds an interrupted training", hint="Go on with --resume, or use another folder.")
    if (folder / RESULTS).exists():
        raise ConfigError(f"{folder} holds finished results", hint="Train into another folder, or remove it.")
    if resume and not folder.is_dir():
        raise ConfigError(f"there is nothing to resume in {folder}", hint="Check --out, or train without --resume.")
    folder.mkdir(parents=True, exist_ok=True)


def _save_if_possible(folder: Path, base: FrozenModel, states: Sequence[RunState]) -> None:
    """Write a checkpoint; a full disk now may be free again later, and the vectors in memory are still good."""
    import warnings

    try:
        save_checkpoint(folder, base, states)
    except ArtefactError as error:
        warnings.warn(f"no checkpoint was written: {error}", stacklevel=2)


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Set an event on SIGINT and SIGTERM instead of dying in mid-step; a second SIGINT interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
