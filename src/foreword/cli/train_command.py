"""`foreword train`: one or many task files in one pass."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.options import Base, Device, Dtype, Json
from foreword.cli.output import console, print_json, print_table

if TYPE_CHECKING:
    from foreword.train.loop import Progress
    from foreword.train.run import Run, RunResult


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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted training in --out.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train vectors for one or many tasks in one pass over the frozen base.

    Example: foreword train triage.toml clause.toml --base models/base --methods prompt,kv --set train.steps=400
    """
    runs = _runs(tasks, methods, settings or [])
    from foreword.core.model import load_base
    from foreword.train.loop import fit

    folder = out or Path("runs") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    frozen = load_base(base, dtype=dtype, device=device)
    results = fit(frozen, runs, out=folder, resume=resume, on_progress=None if as_json else progress_printer())
    if as_json:
        print_json({"out": str(folder), "results": [result.to_json() for result in results]})
    else:
        _show(results, folder)
    if broken := [result.error for result in results if result.error]:
        raise broken[0]


def _runs(tasks: list[Path], methods: str | None, settings: list[str]) -> list[Run]:
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
    console().print(f"curves, history and results.json are in {folder}")
