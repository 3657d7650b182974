"""`foreword tweak`: a change of behaviour from a few rows, or from other hard text, judged and ready to promote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.options import Base, Decoding, Device, Dtype, Home, Json, Publish, run_folder
from foreword.cli.output import console, print_json, print_table
from foreword.cli.registry_commands import Who, Why, open_registry
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.eval.paired import PairedResult
    from foreword.recipes.tweak import TweakResult


def register(app: typer.Typer) -> None:
    """Add `tweak` to `app`."""
    app.command("tweak")(tweak)


def tweak(
    task: Annotated[str, typer.Argument(help="The task's name in the registry.", show_default=False)],
    base: Base,
    add: Annotated[
        Path | None, typer.Option("--add", help="Rows that show the new behaviour.", show_default=False)
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="No training: another template around the same slots.", show_default=False),
    ] = None,
    hard_text: Annotated[
        str | None,
        typer.Option("--hard-text", help="No training: this text between the slots and the input.", show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="With --template: another system turn.", show_default=False)
    ] = None,
    new_dev: Annotated[
        Path | None,
        typer.Option(
            "--new-dev", help="Rows to judge the new behaviour on; default a part of --add.", show_default=False
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Start from this version, not from prod.", show_default=False)
    ] = None,
    task_file: Annotated[
        Path | None, typer.Option("--task", help="Task file with the old rows.", show_default=False)
    ] = None,
    old_dev: Annotated[
        Path | None, typer.Option("--old-dev", help="Dev rows of the old behaviour.", show_default=False)
    ] = None,
    rehearsal: Annotated[float, typer.Option("--rehearsal", help="Share of old rows in a batch.")] = 0.75,
    drop_target: Annotated[
        list[str] | None,
        typer.Option(
            "--drop-target", help="An old answer that is no longer right; may be repeated.", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps at most.")] = 60,
    lr_factor: Annotated[float, typer.Option("--lr-factor", help="Of the version's own learning rate.")] = 0.25,
    eval_rows: Annotated[int, typer.Option("--eval-rows", help="Old dev rows judged at most; 0 judges all.")] = 200,
    decoding: Decoding = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Draws what is held out and rehearsed.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default runs/tweak-<date-time>.", show_default=False)
    ] = None,
    publish: Publish = True,
    why: Why = "",
    who: Who = None,
    home: Home = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Change the live version's behaviour: train on from it with a few rows, or edit its hard text; judge; publish.

    Example: foreword tweak triage --add new_rows.jsonl --base models/base
    """
    given = [name for name, value in (("--add", add), ("--template", template), ("--hard-text", hard_text)) if value]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(given) or 'neither --add nor --template'} given",
            hint="Give one: --add with rows to train on, or --template or --hard-text to change the text alone.",
        )
    if system is not None and template is None:
        raise ConfigError("--system goes with --template", hint="Give the template too, changed or not.")
    from foreword.recipes.origin import live_version, open_origin
    from foreword.recipes.retouch import retouch, with_hard_text
    from foreword.recipes.tweak import TweakSettings
    from foreword.recipes.tweak import tweak as train_on

    folder = run_folder(out, "tweak")
    limit = eval_rows or None
    where: dict[str, Any] = {"start": start, "task_file": task_file, "old_dev": old_dev, "new_dev": new_dev}
    said: dict[str, Any] = {"publish": publish, "who": who, "why": why, "out": folder, **where}
    load = base_loader(base, dtype, device)
    with open_registry(home) as registry:
        if add is not None:
            settings = TweakSettings(
                rehearsal=rehearsal,
                drop_targets=tuple(drop_target or ()),
                steps=steps,
                lr_factor=lr_factor,
                eval_rows=limit,
                decoding=decoding,
                seed=seed,
            )
            from foreword.cli.train_command import progress_printer

            show = None if as_json else progress_printer()
            result = train_on(registry, load, task, add, settings=settings, on_progress=show, **said)
        else:
            if hard_text is not None:
                version = live_version(registry, task, start)
                template = with_hard_text(open_origin(registry, version, task_file=task_file).template, hard_text)
            assert template is not None
            result = retouch(registry, load, task, template, system=system, eval_rows=limit, decoding=decoding, **said)
    if as_json:
        print_json(result.to_json() | {"promote": promote_line(result, base)})
    else:
        _show(result, base)


def base_loader(base: str, dtype: str, device: str) -> Callable[[], FrozenModel]:
    """Return a function that loads the base, so that cheaper checks come first."""

    def load() -> FrozenModel:
        from foreword.core.model import load_base

        return load_base(base, dtype=dtype, device=device)  # type: ignore[arg-type]

    return load


def promote_line(result: TweakResult, base: str) -> str | None:
    """Return the command that makes the candidate live; None where nothing was published."""
    if result.version is None:
        return None
    force = " --force" if result.lost else ""
    return f"foreword promote {result.version.reference} --base {base}{force}"


def paired_row(name: str, test: PairedResult) -> list[Any]:
    """Return one line of a table of paired tests, columns as in PAIRED_COLUMNS."""
    p = "-" if test.p_value is None else f"{test.p_value:.3g}"
    change = f"{test.difference:+.4f} [{test.interval[0]:+.4f}, {test.interval[1]:+.4f}]"
    return [name, test.num_rows, test.metric, f"{test.score_b:.4f}", f"{test.score_a:.4f}", change, p, test.verdict]


PAIRED_COLUMNS = ("on", "rows", "metric", "current", "candidate", "difference, 95 %", "p", "candidate is")


def _show(result: TweakResult, base: str) -> None:
    print_table(PAIRED_COLUMNS, [paired_row(name, test) for name, test in result.paired.items()])
    for note in result.notes:
        console().print(note)
    if result.version is None:
        console().print(f"the artefact is {result.artefact}; nothing was published")
        return
    console().print(f"{result.version.reference} (candidate) against {result.current}; make it live with")
    console().print(f"  {promote_line(result, base)}")
    if result.lost:
        console().print(f"It lost on {' and '.join(result.lost)}: the gate refuses it without --force.")
