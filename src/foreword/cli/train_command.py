"""`foreword train`: one or many task files in one pass."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foreword.cli.options import Base, Device, Dtype, Json, run_folder
from foreword.cli.output import console, print_json, print_table

if TYPE_CHECKING:
    from foreword.train.loop import Progress
    from foreword.train.run import Run, RunResult

LayoutName = Literal["auto", "packed", "padded"]


def register(app: typer.Typer) -> None:
    """Add `train` to `app`."""
    app.command("train")(train)


def train(
    tasks: Annotated[list[Path], typer.Argument(help="Task files (TOML).", show_default=False)],
    base: Base,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for results; default runs/<date-time>.", show_default=False)
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Comma-separated: prompt, prefix, kv; one run each.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Overrides such as train.steps=800.", show_default=False)
    ] = None,
    share: Annotated[
        str | None,
        typer.Option("--share", help="Train all tasks over one shared source of this name.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted training in --out.")] = False,
    track: Annotated[
        list[str] | None,
        typer.Option("--track", help="Send curves to tensorboard, mlflow or wandb too.", show_default=False),
    ] = None,
    forward: Annotated[
        LayoutName,
        typer.Option("--forward", help="Rows of a step: packed in one sequence, padded, or what is faster here."),
    ] = "auto",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute layers again in the backward pass: less memory, more time.")
    ] = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep saved activations in the host's memory: less on the GPU.")
    ] = False,
    quantise: Annotated[
        str | None,
        typer.Option("--quantise", help="Hold the base in 8bit or 4bit on a GPU.", show_default=False),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train vectors for one or many tasks in one pass over the frozen base.

    Example: foreword train triage.toml clause.toml --base models/base --methods prompt,kv --set train.steps=400
    """
    runs = runs_of(tasks, methods, settings or [])
    if share is not None:
        from foreword.recipes.multitask import share_source

        runs = share_source(runs, share)
    from foreword.train.trackers import Tracker

    folder = run_folder(out)
    trackers = [Tracker(name, folder) for name in dict.fromkeys(track or [])]
    for run in runs:  # faults of the data are told before a base is loaded
        run.task.rows("train")
        if run.task.config.dev is not None:
            run.task.rows("dev")
    from foreword.train.distributed import load_for_training, world
    from foreword.train.loop import fit
    from foreword.train.strategy import choose_strategy

    frozen = load_for_training(base, dtype=dtype, device=device, quantise=quantise)
    strategy = choose_strategy(frozen, forward, checkpointing=recompute, offload=offload)
    shown = None if as_json else progress_printer()
    folder = world().agreed(folder)
    results = fit(frozen, runs, out=folder, resume=resume, on_progress=shown, observers=trackers, strategy=strategy)
    if not world().is_main:
        return
    if as_json:
        print_json({"out": str(folder), "results": [result.to_json() for result in results]})
    else:
        _show(results, folder)
    if broken := [result.error for result in results if result.error]:
        raise broken[0]


def runs_of(tasks: list[Path], methods: str | None, settings: list[str]) -> list[Run]:
    """Return the runs of task files, one for each of the comma-separated methods. Raises ConfigError."""
    from foreword.config import load_task
    from foreword.eval.tasks import Task
    from foreword.train.run import Run

    runs = []
    for path in tasks:
        for method in methods.split(",") if methods else [None]:
            chosen = [*settings, f'train.method="{method.strip()}"'] if method else settings
            task, config = load_task(path, chosen)
            runs.append(Run(Task(task), config, f"{task.name}-{config.method}"))
    return runs


def progress_printer(every_s: float = 10.0) -> Callable[[Progress], None]:
    """Return a display for `fit`: a live line on a terminal, a line now and then elsewhere."""
    import time

    shown = [0.0]
    live = sys.stderr.isatty()

    def show(progress: Progress) -> None:
        now = time.monotonic()
        last = progress.step == progress.steps
        if now - shown[0] < (0.2 if live else every_s) and not last:
            return
        shown[0] = now
        ends = "\n" if last or not live else ""
        print(("\r\x1b[2K" if live else "") + progress_line(progress), end=ends, file=sys.stderr, flush=True)

    return show


def progress_line(progress: Progress) -> str:
    """Return one line: step, losses, dev measures, text tokens per second, time left."""

    def numbers(named: dict[str, float]) -> str:
        if len(named) > 3:
            return f"{sum(named.values()) / len(named):.3f} (mean of {len(named)})"
        return " ".join(f"{name} {value:.3f}" for name, value in named.items())

    parts = [f"step {progress.step}/{progress.steps}", f"loss {numbers(progress.losses)}"]
    for key in ("dev_loss", "dev_metric"):
        if measured := {name: values[key] for name, values in progress.dev.items() if key in values}:
            parts.append(f"{key.replace('_', ' ')} {numbers(measured)}")
    left = datetime.timedelta(seconds=round(progress.remaining_s))
    return " | ".join([*parts, f"{progress.tokens_per_s:,.0f} tokens/s", f"{left} left"])


def _show(results: list[RunResult], folder: Path) -> None:
    def row(result: RunResult) -> list[Any]:
        value = result.best.get("value")
        best = "-" if value is None else f"{value:.4f}"
        return [result.name, result.status, result.best.get("step"), result.best.get("by"), best, result.artefact]

    print_table(["run", "status", "kept step", "by", "value", "artefact"], [row(result) for result in results])
    console().print(f"reports with curves (<run>.html), history and results.json are in {folder}")
