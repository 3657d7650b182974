"""`foreword explain`: what do these vectors do?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from foreword.cli.eval_command import find_artefact
from foreword.cli.options import AllowMismatch, Base, Device, Dtype, Home, Json
from foreword.cli.output import console, print_json
from foreword.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add `explain` to `app`."""
    app.command("explain")(explain)


def explain(
    vectors: Annotated[str, typer.Argument(help="Artefact file or version, such as triage@2.", show_default=False)],
    base: Base,
    task: Annotated[
        Path | None, typer.Option("--task", help="Task file (TOML) whose rows are measured.", show_default=False)
    ] = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="JSONL of input and target instead.", show_default=False)
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="A text without target instead; may be repeated.", show_default=False),
    ] = None,
    split: Annotated[Literal["train", "dev", "test"], typer.Option("--split", help="Of --task.")] = "dev",
    limit: Annotated[int, typer.Option("--limit", help="Measure at most this many rows, drawn by seed.")] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Draws the rows and the bootstrap's resamples.")] = 0,
    one_by_one: Annotated[
        bool,
        typer.Option("--one-by-one/--no-one-by-one", help="Take out each vector: one pass over the rows each."),
    ] = True,
    nearest: Annotated[int, typer.Option("--nearest", help="Nearest tokens named per vector.", min=1)] = 3,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the report: .html, .md, .txt or .json.", show_default=False)
    ] = None,
    home: Home = None,
    allow_mismatch: AllowMismatch = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Tell what vectors do: prefix mass, what each of them is worth, how far they act, what they look like.

    Without --task, --rows or --text the artefact's own probes are taken; they have no targets, so nothing that needs a
    loss is measured then.

    Example: foreword explain triage@prod --base models/base --task triage.toml --out triage.html
    """
    from foreword.core.artefact import load_artefact
    from foreword.core.model import load_base
    from foreword.eval.tasks import Task
    from foreword.explain.examples import gather
    from foreword.explain.explanation import explain as measure
    from foreword.explain.report import report
    from foreword.report import FORMATS, render, write

    if out is not None and out.suffix not in FORMATS:  # before anything is measured
        raise ConfigError(f"{out} has suffix {out.suffix!r}; a report is written as {', '.join(FORMATS)}")
    artefact = load_artefact(find_artefact(vectors, home))
    data = Task.from_toml(task) if task else None
    frozen = load_base(base, dtype=dtype, device=device)
    sample = gather(
        frozen, artefact.header, task=data, rows=rows, texts=text or (), split=split, limit=limit, seed=seed
    )
    found = measure(
        frozen, artefact, sample, one_by_one=one_by_one, nearest=nearest, seed=seed, allow_mismatch=allow_mismatch
    )
    made = report(found)
    written = write(made, out) if out is not None else []
    if as_json:
        print_json(found.to_json())
    elif out is None:
        console().print(render(made, "text"), end="")
    else:
        console().print(found.verdict.sentence)
        console().print(f"wrote {', '.join(map(str, written))}")
