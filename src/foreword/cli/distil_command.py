"""`foreword distil`: long contexts become vectors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from foreword.cli.options import Base, Device, Dtype, Json, run_folder
from foreword.cli.output import console, print_json
from foreword.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add `distil` to `app`."""
    app.command("distil")(distil)


def distil(
    contexts: Annotated[
        list[Path],
        typer.Argument(help="Text files, .json with messages, or .toml with a [distil] table.", show_default=False),
    ],
    base: Base,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the artefact; default the file's.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default runs/distil-<date-time>.", show_default=False)
    ] = None,
    vectors: Annotated[int | None, typer.Option("--vectors", help="P, how many.", show_default=False)] = None,
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", help="Context tokens per vector, in place of P; default 4.", show_default=False),
    ] = None,
    method: Annotated[
        Literal["prompt", "prefix", "kv"] | None, typer.Option("--method", help="Default kv.", show_default=False)
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", help="JSONL to learn from; else the model writes them.", show_default=False),
    ] = None,
    self_study: Annotated[
        int | None,
        typer.Option(
            "--self-study", help="Questions the model writes; default 256 without --questions.", show_default=False
        ),
    ] = None,
    seed_types: Annotated[
        str | None,
        typer.Option(
            "--seed-types", help="Kinds of self-study, comma-separated; default all five.", show_default=False
        ),
    ] = None,
    writer: Annotated[
        Literal["turn", "instruction"] | None,
        typer.Option(
            "--writer", help="Self-study by opening the user's turn (default), or by asking.", show_default=False
        ),
    ] = None,
    test: Annotated[
        Path | None, typer.Option("--test", help="JSONL of questions with answers to judge by.", show_default=False)
    ] = None,
    elsewhere: Annotated[
        Path | None,
        typer.Option(
            "--elsewhere", help="Unrelated prompts (JSONL) or task (TOML) to measure harm.", show_default=False
        ),
    ] = None,
    objective: Annotated[
        Literal["kl", "likelihood"] | None,
        typer.Option("--objective", help="The teacher's distribution (default), or its answers.", show_default=False),
    ] = None,
    init: Annotated[
        Literal["auto", "first", "spread", "match"] | None,
        typer.Option("--init", help="Start from the context: matched, first or spread tokens.", show_default=False),
    ] = None,
    place: Annotated[
        Literal["system", "front"] | None,
        typer.Option(
            "--place", help="The teacher's context: a system turn (default), or plain in front.", show_default=False
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option("--chunk-tokens", help="Allow chunks of so many tokens.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Tokens of an answer; default 32.", show_default=False)
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="Score of answers; default exact_match.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of questions and training.", show_default=False)] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps; default 200.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Overrides such as train.lr=0.05.", show_default=False)
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder of the teacher's numbers; default <home>/distil.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Also write the report: .md, .html, .txt or .json.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a killed call left in --out.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Compress long contexts into vectors by knowledge distillation: the teacher is the base with the context.

    Example: foreword distil notes.txt --base models/base --ratio 4 --questions questions.jsonl --test test.jsonl
    """
    given = {
        "name": name, "vectors": vectors, "ratio": ratio, "questions": questions, "self_study": self_study,
        "seed_types": tuple(seed_types.split(",")) if seed_types else None, "writer": writer, "test": test,
        "elsewhere": elsewhere, "objective": objective, "init": init, "place": place, "chunk_tokens": chunk_tokens,
        "max_new_tokens": max_new_tokens, "metric": metric, "seed": seed,
    }  # fmt: skip
    jobs = _jobs(contexts, given, {"method": method, "steps": steps, "seed": seed}, settings or [])
    from foreword.cli.train_command import progress_printer
    from foreword.core.model import load_base
    from foreword.distil.report import report as make_report
    from foreword.distil.run import distil as run_distil
    from foreword.registry.folders import home_folder
    from foreword.report import FORMATS, render, write

    if report is not None and report.suffix not in FORMATS:
        raise ConfigError(f"{report} has suffix {report.suffix!r}", hint=f"Use one of {', '.join(FORMATS)}.")
    folder = run_folder(out, "distil")
    found = run_distil(
        load_base(base, dtype=dtype, device=device),
        jobs,
        out=folder,
        cache=cache or home_folder() / "distil",
        resume=resume,
        on_progress=None if as_json else progress_printer(),
        tell=None if as_json else lambda line: print(line, file=sys.stderr, flush=True),
    )
    made = make_report(found)
    if report is not None:
        write(made, report)
    if as_json:
        print_json({"out": str(folder), **made.data})
    else:
        console().print(render(made, "text"))
        for item in found:
            console().print(f"publish it: foreword publish {item.artefact.path}")
    if broken := [item.error for item in found if item.error]:
        raise broken[0]


def _jobs(contexts: list[Path], given: dict[str, Any], train: dict[str, Any], settings: list[str]) -> list[Any]:
    from foreword.distil.settings import load_job, parse_overrides

    known = {key: str(value) if isinstance(value, Path) else value for key, value in given.items() if value is not None}
    if "name" in known and len(contexts) > 1:
        raise ConfigError(f"--name {known['name']} for {len(contexts)} contexts", hint="Name each in a TOML file.")
    overrides = {key: value for key, value in train.items() if value is not None} | parse_overrides(settings)
    return [load_job(path, known, overrides) for path in contexts]
