"""`foreword sweep` and `foreword lr`: settings of one task as runs of one joint pass, and the rate to begin with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from foreword.cli.options import Base, Device, Dtype, Json, run_folder
from foreword.cli.output import console, print_json
from foreword.cli.train_command import progress_printer
from foreword.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add `sweep` and `lr` to `app`."""
    app.command("sweep")(sweep)
    app.command("lr")(find_rate)


def sweep(
    task: Annotated[Path, typer.Argument(help="Task file (TOML).", show_default=False)],
    base: Base,
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid", help="train.lr=0.05,0.1 or lr=0.5x,1x,2x; with --random also lr=0.01:1.0:log.", show_default=False
        ),
    ],
    num_random: Annotated[
        int | None,
        typer.Option("--random", min=2, help="Draw this many settings instead of the whole grid.", show_default=False),
    ] = None,
    sample_seed: Annotated[int, typer.Option("--sample-seed", help="Seed of --random.")] = 0,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each setting, with consecutive seeds.")] = 1,
    rungs: Annotated[
        str, typer.Option("--rungs", help="Parts of the steps at which the worse settings stop, or none.")
    ] = "1/4,1/2",
    keep: Annotated[float, typer.Option("--keep", help="Part of the settings that goes on at each rung.")] = 0.5,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Overrides for all settings, such as train.steps=800.", show_default=False),
    ] = None,
    passes: Annotated[str, typer.Option("--passes", help="Joint passes; auto: as few as fit the memory.")] = "1",
    micro_tokens: Annotated[
        int, typer.Option("--micro-tokens", min=1, help="Padded tokens of one forward at most.")
    ] = 4096,
    judge_rows: Annotated[
        int, typer.Option("--judge-rows", min=0, help="Dev rows that the best two answer; 0 leaves it out.")
    ] = 500,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default runs/sweep-<date-time>.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted sweep in --out.")] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Also write the report here: .md, .html, .txt or .json.", show_default=False),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Try settings of one task in one joint pass; the worse half stops at each rung, the best two are compared.

    Example: foreword sweep triage.toml --base models/base --grid train.method=prompt,kv --grid train.lr=0.5x,1x,2x
    """
    from foreword.recipes.halving import parse_rungs
    from foreword.recipes.sweep import make_candidates
    from foreword.recipes.sweep import sweep as run_sweep
    from foreword.recipes.sweep_report import sweep_report
    from foreword.recipes.sweep_result import Options
    from foreword.report import FORMATS, render, write

    if report is not None and report.suffix not in FORMATS:
        raise ConfigError(f"{report} has suffix {report.suffix!r}", hint=f"Use one of {', '.join(FORMATS)}.")
    if resume and out is None:
        raise ConfigError("--resume needs the folder of the interrupted sweep", hint="Give it with --out.")
    options = Options(
        num_random=num_random,
        sample_seed=sample_seed,
        seeds=seeds,
        rungs=parse_rungs(rungs),
        keep=keep,
        passes=parse_passes(passes),
        micro_tokens=micro_tokens,
        judge_rows=judge_rows,
    )
    candidates = make_candidates(task, grid, options, settings or [])
    from foreword.core.model import load_base

    folder = run_folder(out, "sweep")
    result = run_sweep(
        load_base(base, dtype=dtype, device=device),
        candidates,
        out=folder,
        options=options,
        resume=resume,
        on_progress=None if as_json else progress_printer(),
        tell=None if as_json else lambda line: print(line, file=sys.stderr, flush=True),
    )
    if report is not None:
        write(sweep_report(result), report)
    if as_json:
        print_json({"out": str(folder), **result.to_json()})
        return
    console().print(render(sweep_report(result, curves=False), "text"))
    console().print(f"sweep.html with the curves, sweep.json, artefacts and histories are in {folder}")


def parse_passes(text: str) -> int | None:
    """Return the number of passes, None for `auto`. Raises ConfigError."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--passes {text!r} is neither auto nor a number from 1", hint="For example --passes auto.")
    return int(text)


def find_rate(
    task: Annotated[Path, typer.Argument(help="Task file (TOML).", show_default=False)],
    base: Base,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Comma-separated: prompt, prefix, kv.", show_default=False)
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            "--rates", help="Comma-separated; default: a hundredth to ten times the run's.", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps at each rate.")] = 24,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Overrides such as train.num_vectors=40.", show_default=False)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Write the report with figures here: .md, .html, .txt or .json.", show_default=False
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find a learning rate by relative displacement: a few steps at each of a row of rates, in one joint pass.

    Example: foreword lr triage.toml --base models/base --methods kv --report lr.html
    """
    from foreword.cli.train_command import runs_of
    from foreword.recipes.finder import check_rates, default_rates, find_lr, finder_report, join_reports
    from foreword.report import FORMATS, render, write

    if report is not None and report.suffix not in FORMATS:
        raise ConfigError(f"{report} has suffix {report.suffix!r}", hint=f"Use one of {', '.join(FORMATS)}.")
    runs, tried = runs_of([task], methods, settings or []), parse_numbers(rates)
    for run in runs:
        check_rates(tried or default_rates(run), steps)
    from foreword.core.model import load_base

    frozen = load_base(base, dtype=dtype, device=device)
    findings = [find_lr(frozen, run, rates=tried, steps=steps) for run in runs]
    whole = join_reports([finder_report(finding) for finding in findings])
    if report is not None:
        write(whole, report)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        for finding in findings:
            console().print(render(finder_report(finding, figures=False), "text"))


def parse_numbers(text: str | None) -> list[float]:
    """Return numbers from `0.01,0.1`. Raises ConfigError."""
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ConfigError(f"--rates {text!r} are no numbers: {error}", hint="For example 0.01,0.03,0.1.") from error
