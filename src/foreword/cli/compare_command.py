"""`foreword compare`: every method trained under one budget and measured side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from foreword.cli.options import Base, Device, Dtype, Json, run_folder
from foreword.cli.output import console, print_json
from foreword.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add `compare` to `app`."""
    app.command("compare")(compare)


def compare(
    task: Annotated[Path, typer.Argument(help="Task file (TOML).", show_default=False)],
    base: Base,
    methods: Annotated[str, typer.Option("--methods", help="Comma-separated.")] = "text,few_shot,prompt,prefix,kv,lora",
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps of each.", show_default=False)] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows per step of each.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of data order and start.", show_default=False)] = None,
    train_rows: Annotated[
        int | None, typer.Option("--train-rows", help="Training rows at most, drawn by seed.", show_default=False)
    ] = None,
    rows_limit: Annotated[
        int | None, typer.Option("--rows-limit", help="Judge this many test rows, drawn by seed.", show_default=False)
    ] = None,
    decoding: Annotated[
        Literal["free", "labels"], typer.Option("--decoding", help="Free text, or the most probable label, for all.")
    ] = "free",
    lr: Annotated[
        str | None,
        typer.Option("--lr", help="Peak learning rates such as kv=0.05,lora=0.001.", show_default=False),
    ] = None,
    lora_rank: Annotated[int, typer.Option("--lora-rank", help="Rank of LoRA's updates.")] = 8,
    lora_targets: Annotated[
        str, typer.Option("--lora-targets", help="Modules that LoRA updates, comma-separated.")
    ] = "all-linear",
    timing_rounds: Annotated[int, typer.Option("--timing-rounds", help="Timed requests of each method.")] = 11,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Overrides for all methods, such as train.warmup_steps=10.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder; default runs/compare-<date-time>. A rerun goes on.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Also write the report here: .md, .html, .txt or .json.", show_default=False),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train each method under one budget; compare quality, bytes, training, latency and mixed throughput.

    Example: foreword compare triage.toml --base models/base --steps 400 --out runs/compare
    """
    from foreword.compare.plan import Lora, Settings
    from foreword.compare.run import compare_methods
    from foreword.compare.table import report as make_report
    from foreword.report import FORMATS, render, write

    if report is not None and report.suffix not in FORMATS:
        raise ConfigError(f"{report} has suffix {report.suffix!r}", hint=f"Use one of {', '.join(FORMATS)}.")
    given = {"steps": steps, "batch_size": batch_size, "seed": seed, "max_train_rows": train_rows}
    overrides = [*(settings or []), *(f"train.{key}={value}" for key, value in given.items() if value is not None)]
    folder = run_folder(out, "compare")
    comparison = compare_methods(
        task,
        base,
        out=folder,
        settings=Settings(
            methods=tuple(methods.split(",")),
            rows_limit=rows_limit,
            decoding=decoding,
            lr=parse_rates(lr),
            lora=Lora(rank=lora_rank, targets=lora_targets),
            timing_rounds=timing_rounds,
        ),
        overrides=overrides,
        dtype=dtype,
        device=device,
        tell=None if as_json else lambda line: print(line, file=sys.stderr, flush=True),
    )
    if report is not None:
        write(make_report(comparison), report)
    if as_json:
        print_json(comparison.to_json())
        return
    console().print(render(make_report(comparison), "text"))
    console().print(f"comparison.json, artefacts and judged rows are in {folder}")


def parse_rates(text: str | None) -> dict[str, float]:
    """Return learning rates by method from `kv=0.05,lora=0.001`. Raises ConfigError."""
    rates = {}
    for part in text.split(",") if text else []:
        method, equals, value = part.partition("=")
        try:
            rates[method.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"--lr {part!r} is not of the form method=number", hint="For example kv=0.05,lora=0.001.")
    return rates
