"""`foreword ensemble`: several versions answer in one mixed batch and vote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foreword.cli.options import Base, Decoding, Device, Dtype, Home, Json, run_folder
from foreword.cli.output import console, print_json, print_table
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.eval.report import EvalReport
    from foreword.recipes.ensemble import Ensemble


def register(app: typer.Typer) -> None:
    """Add `ensemble` to `app`."""
    app.command("ensemble")(ensemble)


def ensemble(
    task: Annotated[Path, typer.Argument(help="Task file (TOML).", show_default=False)],
    base: Base,
    versions: Annotated[
        str | None,
        typer.Option("--versions", help="Comma-separated versions or files, two or more.", show_default=False),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", help="Train so many members by seeds instead, in one pass.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --seeds: overrides such as train.steps=800.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="With --seeds: folder; default runs/<date-time>.", show_default=False)
    ] = None,
    split: Annotated[Literal["train", "dev", "test"], typer.Option("--split")] = "dev",
    limit: Annotated[
        int | None, typer.Option("--limit", help="Judge this many rows, drawn by seed.", show_default=False)
    ] = None,
    decoding: Decoding = "auto",
    home: Home = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Let several versions of a task vote; judge members and votes; tell what voting costs.

    Example: foreword ensemble triage.toml --base models/base --versions triage@1,triage@2,triage@3
    """
    if (versions is None) == (seeds is None):
        raise ConfigError(
            f"{'both' if versions else 'neither'} of --versions and --seeds given",
            hint="Name members with --versions, or train some with --seeds 3.",
        )
    from foreword.cli.eval_command import find_artefact
    from foreword.config import load_task
    from foreword.core.artefact import load_artefact
    from foreword.core.model import load_base
    from foreword.eval.tasks import Task
    from foreword.recipes.ensemble import check_members, train_members
    from foreword.recipes.ensemble import ensemble as gather

    config, train = load_task(task, settings or [])
    data = Task(config)
    data.rows(split)
    names = [name.strip() for name in versions.split(",")] if versions else []
    if double := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{double} stands twice in --versions", hint="A member has one vote.")
    check_members(len(names) if seeds is None else seeds)
    members = {name: load_artefact(find_artefact(name, home)) for name in names}
    frozen = load_base(base, dtype=dtype, device=device)
    if seeds is not None:
        from foreword.cli.train_command import progress_printer

        folder = run_folder(out, "ensemble")
        show = None if as_json else progress_printer()
        members = train_members(frozen, data, train, seeds, out=folder, on_progress=show)
    found = gather(frozen, data, members, split=split, limit=limit, decoding=decoding)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
        if seeds is not None:
            console().print(f"the members are in {folder}")


def _show(found: Ensemble) -> None:
    def row(name: str, report: EvalReport) -> list[Any]:
        low, high = report.interval
        return [name, report.metric, f"{report.score:.4f}", f"{low:.4f} to {high:.4f}", report.num_rows]

    members = [row(name, report) for name, report in found.members.items()]
    votes = [row(f"vote: {name}", report) for name, report in found.votes.items()]
    print_table(["what", "metric", "score", "95 % interval", "rows"], [*members, *votes])
    for name, test in found.paired.items():
        console().print(f"vote: {name} against the best member, {found.best_member}: {test.summary()}")
    console().print(
        f"cost: {found.num_requests:.1f} requests a row, the best member alone {found.member_requests:.1f}; "
        f"{found.prefix_bytes / 1024:.1f} KiB of keys and values; all rows answered in {found.seconds:.1f} s"
    )
