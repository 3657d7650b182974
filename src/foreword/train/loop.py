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
from foreword.report import write
from foreword.train.checkpoint import FILE, load_checkpoint, save_checkpoint
from foreword.train.curves import write_history
from foreword.train.distributed import folder_to_write, world
from foreword.train.export import export, export_shared
from foreword.train.loss import MICRO_TOKENS, PLAIN, mean_losses, step_gradients
from foreword.train.observers import Observer, Watch
from foreword.train.report import Pace, run_report
from foreword.train.run import Controller, Run, RunResult, Standing
from foreword.train.sharing import Group, build_states
from foreword.train.state import RunState
from foreword.train.strategy import Strategy, choose_strategy

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
    controller: Controller | None = None,
    observers: Sequence[Observer] = (),
    reports: bool = True,
    strategy: Strategy | None = None,
) -> list[RunResult]:
    """Train the vectors of one or many runs in one pass over the frozen base; write an artefact for each into `out`.

    Rows of all runs share forwards, each run has its own optimizer, schedule, early stop and best-so-far, and gets the
    vectors it would get alone. `out` receives `<name>.safetensors`, `<name>.history.jsonl`, `<name>.html` (`reports`),
    `results.json`, and while training a checkpoint that `resume` goes on from exactly. A run whose loss is NaN stops
    with its last good vectors kept (status "diverged"), its neighbours go on. `controller` may stop runs between steps,
    which changes nothing for those that go on. Runs of a group (`train.share`) also train a common source, written as
    `<group>.shared.safetensors`. `observers`, such as trackers, are told of every step; one that fails is left out, by
    a warning. `strategy` is how steps run the base (train/strategy.py); None chooses by its device. In a launch of
    several processes (train/distributed.py) all call `fit`, the first one writes.

    Raises ConfigError and DataError before any training, TrainingInterrupted on SIGINT or SIGTERM with the state
    saved, RuntimeError if a base tensor changed.
    """
    folder = Path(out)
    _check_runs(runs, folder, resume)
    strategy = choose_strategy(base) if strategy is None else strategy
    states, groups = build_states(base, runs)
    load_checkpoint(folder, base, states, groups)
    before, watch = base.checksum(), Watch(observers if world().is_main else ())
    watch.start(states)
    world().wait()
    with folder_to_write(folder) as written:
        with _stop_on_signals() as stop:
            try:
                pace = _train(
                    base, states, groups, written, stop, on_progress, micro_tokens, controller, watch, strategy
                )
            finally:
                watch.finish(states)
                if base.checksum() != before:
                    raise RuntimeError("a tensor of the base changed while training; do not use its vectors")
        results = []
        for state in states:
            state.finish()
            results.append(_result(base, state, written))
            results[-1].artefact = folder / f"{state.run.name}.safetensors"
        for group in groups:
            export_shared(base, group, written / f"{group.name}.shared.safetensors")
        write_atomically(written / RESULTS, json.dumps([result.to_json() for result in results], indent=2).encode())
        (written / FILE).unlink(missing_ok=True)
        for state in states if reports else ():
            write(run_report(base, state, pace), written / f"{state.run.name}.html")
        return results


def _train(
    base: FrozenModel,
    states: Sequence[RunState],
    groups: Sequence[Group],
    folder: Path,
    stop: threading.Event,
    on_progress: Callable[[Progress], None] | None,
    micro_tokens: int,
    controller: Controller | None,
    watch: Watch,
    strategy: Strategy,
) -> Pace:
    started, last_save, tokens = time.monotonic(), time.monotonic(), 0
    every = min(state.run.config.checkpoint_every_s for state in states)
    first = sum(state.step for state in states)
    while active := [state for state in states if state.is_running]:
        tokens += one_step(base, active, groups, micro_tokens, strategy)
        _evaluate_due(base, active)
        watch.step(active)
        if controller is not None:
            _stop_by(controller, states)
        now = time.monotonic()
        if on_progress is not None and world().is_main:
            on_progress(_progress(states, tokens, now - started, first))
        if world().any(stop.is_set()):
            save_checkpoint(folder, base, states, groups)
            raise TrainingInterrupted(
                f"stopped after step {max(state.step for state in states)}; the state is in {folder / FILE}",
                hint="Run the same command with --resume to go on.",
            )
        if now - last_save > every:
            _save_if_possible(folder, base, states, groups)
            last_save = time.monotonic()
    return Pace(time.monotonic() - started, tokens, sum(state.step for state in states) - first, len(states))


def one_step(
    base: FrozenModel,
    active: Sequence[RunState],
    groups: Sequence[Group],
    micro_tokens: int,
    strategy: Strategy = PLAIN,
) -> int:
    """Take one step of every active run; return the text tokens seen."""
    batches = [state.step_batch() for state in active]
    losses = step_gradients(base, batches, micro_tokens, strategy)
    total = 0
    for state, batch, loss in zip(active, batches, losses, strict=True):
        count = sum(len(row.ids) for row in batch.rows)
        total += count
        state.update(loss, count)
    for group in groups:
        group.update(active)
    for state in active:
        if state.step >= state.run.config.steps and state.is_running:
            state.status = "done"
    return total


def _stop_by(controller: Controller, states: Sequence[RunState]) -> None:
    standings = [Standing(state.run, state.step, state.status, state.history) for state in states]
    names = controller(standings)
    for state in states:
        if state.is_running and state.run.name in names:
            state.status = "stopped"


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


def _save_if_possible(folder: Path, base: FrozenModel, states: Sequence[RunState], groups: Sequence[Group]) -> None:
    """Write a checkpoint; a full disk now may be free again later, and the vectors in memory are still good."""
    import warnings

    try:
        save_checkpoint(folder, base, states, groups)
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
