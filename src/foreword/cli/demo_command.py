"""`foreword demo`: the tour on the bundled base."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli.options import Json
from foreword.cli.output import console, print_json, print_table
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.demo.tour import Tour


def register(app: typer.Typer) -> None:
    """Add `demo` to `app`."""
    app.command("demo")(demo)


def demo(
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to keep; default a temporary one.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Train, judge, publish, serve, promote and roll back four small tasks, offline, in a few minutes.

    Example: foreword demo --out .demo
    """
    if out is not None and out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", hint="Choose another folder, or remove it.")
    from foreword.cli.train_command import progress_printer
    from foreword.demo.tour import take_tour

    with tempfile.TemporaryDirectory(prefix="foreword-demo-") as temporary:
        if as_json:
            print_json(take_tour(out or Path(temporary), say=lambda text: None).to_json())
            return
        tour = take_tour(out or Path(temporary), say=console().print, on_progress=progress_printer())
        _show(tour)


def _show(tour: Tour) -> None:
    answers = [[answer.model, answer.served, answer.text] for answer in tour.answers]
    print_table(["asked", "served by", "answer"], answers)
    stages = zip(("prod = 1", "promoted", "rolled back"), tour.switched, strict=True)
    print_table(["triage", "served by", "answer"], [[stage, answer.served, answer.text] for stage, answer in stages])
    rows = [
        [
            row.task,
            row.method,
            f"{row.num_bytes:,}",
            row.metric,
            f"{row.baseline:.3f}",
            f"{row.score:.3f}",
            f"{row.interval[0]:.3f} to {row.interval[1]:.3f}",
        ]
        for row in tour.rows
    ]
    print_table(["task", "method", "bytes", "metric", "hard text", "score", "95 % interval"], rows)
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in tour.seconds.items())
    console().print(f"times: {times}\n")
    console().print("Your own data, on any Hugging Face causal model:")
    console().print("  foreword train my_task.toml --base Qwen/Qwen3-0.6B --methods prompt,kv --out runs/first")
    console().print("  foreword publish runs/first/my_task-kv.safetensors --alias prod")
    console().print("  foreword serve --base Qwen/Qwen3-0.6B --preload my_task")
