"""`foreword prune`: take out vectors that do harm, train the rest on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli.options import Base, Decoding, Device, Dtype, Home, Json, Publish, run_folder
from foreword.cli.output import console, print_json, print_table
from foreword.cli.registry_commands import Who, Why, open_registry
from foreword.cli.tweak_command import PAIRED_COLUMNS, base_loader, paired_row

if TYPE_CHECKING:
    from foreword.recipes.prune import Pruned


def register(app: typer.Typer) -> None:
    """Add `prune` to `app`."""
    app.command("prune")(prune)


def prune(
    version: Annotated[str, typer.Argument(help="A version, such as triage@2 or triage.", show_default=False)],
    base: Base,
    task_file: Annotated[
        Path | None,
        typer.Option("--task", help="Task file, where the version does not name its rows.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", help="Dev rows on which each vector is left out.", min=5)] = 100,
    only_certain: Annotated[
        bool, typer.Option("--only-certain", help="Only vectors that harm beyond chance (5 %, Bonferroni).")
    ] = False,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps at most.")] = 60,
    lr_factor: Annotated[float, typer.Option("--lr-factor", help="Of the version's own learning rate.")] = 0.5,
    eval_rows: Annotated[int, typer.Option("--eval-rows", help="Rows judged at most; 0 judges all.")] = 200,
    decoding: Decoding = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Draws rows and data order.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default runs/prune-<date-time>.", show_default=False)
    ] = None,
    publish: Publish = True,
    why: Why = "",
    who: Who = None,
    home: Home = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Leave out each vector, take out those that do harm, train the rest on, compare, publish a candidate.

    Example: foreword prune triage@prod --base models/base
    """
    from foreword.cli.train_command import progress_printer
    from foreword.recipes.prune import PruneSettings
    from foreword.recipes.prune import prune as take_out

    settings = PruneSettings(
        rows=rows,
        only_certain=only_certain,
        steps=steps,
        lr_factor=lr_factor,
        eval_rows=eval_rows or None,
        decoding=decoding,
        seed=seed,
    )
    with open_registry(home) as registry:
        found = take_out(
            registry,
            base_loader(base, dtype, device),
            version,
            out=run_folder(out, "prune"),
            settings=settings,
            task_file=task_file,
            publish=publish,
            who=who,
            why=why,
            on_progress=None if as_json else progress_printer(),
        )
    if as_json:
        print_json(found.to_json())
    else:
        _show(found, base)


def _show(found: Pruned, base: str) -> None:
    effects = sorted(found.one_by_one.effects, key=lambda effect: effect.loss_change.value)
    rows = [
        [e.index, e.position, str(e.loss_change), e.verdict, "taken out" if e.index in found.removed else None]
        for e in effects
    ]
    columns = ("vector", "position", "loss without it less loss with all, 95 %", "by itself it", "")
    print_table(columns, rows, title=f"{found.current}: loss {found.loss:.4f} nats per answer token")
    if not found.removed:
        console().print("no vector does harm: nothing was trained or published")
        return
    console().print(
        f"{len(found.removed)} of {found.num_vectors} taken out, loss change before training {found.loss_change}"
    )
    tests = {"candidate against current": found.paired, "all vectors, trained on, against current": found.control}
    tests["candidate against these"] = found.candidate_against_control
    lines = [paired_row(name, test) for name, test in tests.items() if test is not None]
    print_table(("what", "rows", "metric", "the second", "the first", *PAIRED_COLUMNS[5:7], "the first is"), lines)
    if found.split == "dev":
        console().print(
            "Judged on dev rows, which chose the vectors too: this flatters. A task with test rows does not."
        )
    if found.version is not None:
        console().print(
            f"{found.version.reference} (candidate) has {found.version.num_vectors} vectors; make it live with"
        )
        console().print(f"  foreword promote {found.version.reference} --base {base}")
