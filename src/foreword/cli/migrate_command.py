"""`foreword migrate`: the base was updated; every task follows, in one joint pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.options import Base, Device, Dtype, Home, Json, Publish, run_folder
from foreword.cli.output import console, print_json, print_table
from foreword.cli.registry_commands import Who, Why, open_registry
from foreword.cli.tweak_command import base_loader

if TYPE_CHECKING:
    from foreword.recipes.migrate import Migrated


def register(app: typer.Typer) -> None:
    """Add `migrate` to `app`."""
    app.command("migrate")(migrate)


def migrate(
    base: Base,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Comma-separated; default all with an alias prod.", show_default=False)
    ] = None,
    old_base: Annotated[
        str | None,
        typer.Option("--old-base", help="The base until now: for a paired test against it.", show_default=False),
    ] = None,
    task_files: Annotated[
        list[Path] | None,
        typer.Option("--task", help="Task file where a version does not name its rows; may be repeated."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps; default each recipe's.", show_default=False)
    ] = None,
    lr_factor: Annotated[float, typer.Option("--lr-factor", help="Of each recipe's learning rate.")] = 0.25,
    eval_rows: Annotated[int, typer.Option("--eval-rows", help="Dev rows judged at most; 0 judges all.")] = 200,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default runs/migrate-<date-time>.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the migration in --out.")] = False,
    publish: Publish = True,
    why: Why = "",
    who: Who = None,
    home: Home = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train every task's live version on for an updated base, in one pass; compare; publish candidates.

    Example: foreword migrate --base models/base-v2 --old-base models/base
    """
    from foreword.cli.train_command import progress_printer
    from foreword.recipes.migrate import migrate as move

    folder = run_folder(out, "migrate")
    with open_registry(home) as registry:
        found = move(
            registry,
            base_loader(base, dtype, device),
            out=folder,
            tasks=[name.strip() for name in tasks.split(",")] if tasks else None,
            task_files=task_files or (),
            old_base=base_loader(old_base, dtype, device) if old_base else None,
            steps=steps,
            lr_factor=lr_factor,
            eval_rows=eval_rows or None,
            publish=publish,
            resume=resume,
            who=who,
            why=why,
            on_progress=None if as_json else progress_printer(),
        )
    if as_json:
        print_json({"out": str(folder), "tasks": [each.to_json() for each in found]})
    else:
        _show(found, base)


def _show(found: list[Migrated], base: str) -> None:
    columns = ("task", "outcome", "start", "rows", "old base", "untrained", "candidate", "candidate is", "published")
    print_table(columns, [_row(each) for each in found])
    for each in found:
        if each.error:
            console().print(f"{each.current}: {each.error}")
    published = [each.version.reference for each in found if each.version is not None]
    if published:
        console().print("A candidate belongs to the new base: promote it when that base serves.")
        for reference in published:
            console().print(f"  foreword promote {reference} --base {base}")


def _row(each: Migrated) -> list[Any]:
    def score(value: float | None) -> str | None:
        return None if value is None else f"{value:.4f}"

    verdict = each.paired.verdict if each.paired else "not paired" if each.is_stored else None
    return [
        each.current,
        each.outcome,
        each.start or None,
        f"{each.num_rows} {each.split}" if each.num_rows else None,
        score(each.old_score) if not each.is_stored else f"{score(each.old_score)} (stored)",
        score(each.untrained.score if each.untrained else None),
        score(each.report.score if each.report else None),
        verdict,
        each.version.reference if each.version else None,
    ]
