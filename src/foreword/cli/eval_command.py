"""`foreword eval` and `foreword generate`: judge vectors, or try them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from foreword.cli.options import AllowMismatch, Base, Decoding, Device, Dtype, Home, Json
from foreword.cli.output import console, print_json, print_table
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.engine.engine import Engine

Vectors = Annotated[
    str | None,
    typer.Option("--vectors", help="Artefact file or version, such as triage@2.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add `eval` and `generate` to `app`."""
    app.command("eval")(eval_)
    app.command("generate")(generate)


def eval_(
    task: Annotated[Path, typer.Argument(help="Task file (TOML).", show_default=False)],
    base: Base,
    vectors: Vectors = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="A saved report to compare with.", show_default=False)
    ] = None,
    split: Annotated[Literal["train", "dev", "test"], typer.Option("--split")] = "test",
    limit: Annotated[
        int | None, typer.Option("--limit", help="Judge this many rows, drawn by seed.", show_default=False)
    ] = None,
    decoding: Decoding = "auto",
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Judge the untrained base too.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", help="Save the report (JSON, rows beside it).", show_default=False)
    ] = None,
    home: Home = None,
    allow_mismatch: AllowMismatch = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Judge vectors on a task, beside the base with the hard text alone and with examples.

    Example: foreword eval triage.toml --base models/base --vectors runs/today/triage-kv.safetensors
    """
    from foreword.eval.baselines import evaluate_baselines
    from foreword.eval.paired import compare_reports
    from foreword.eval.report import EvalReport
    from foreword.eval.run import evaluate
    from foreword.eval.tasks import Task

    data = Task.from_toml(task)
    earlier = EvalReport.load(against) if against else None
    engine = open_engine(base, dtype, device)
    reports = []
    if vectors is not None:
        name = add_vectors(engine, vectors, home, allow_mismatch)
        reports.append(evaluate(engine, data, prefix=name, split=split, limit=limit, decoding=decoding, out=out))
    if baselines or vectors is None:
        reports += evaluate_baselines(engine, data, split=split, limit=limit)
    paired = compare_reports(reports[0], earlier) if earlier else None
    if as_json:
        found = {"reports": [report.to_json() for report in reports], "paired": paired.to_json() if paired else None}
        print_json(found)
        return
    rows = [
        [
            r.prefix or r.kind,
            r.decoding,
            r.metric,
            f"{r.score:.4f}",
            f"{r.interval[0]:.4f} to {r.interval[1]:.4f}",
            r.num_rows,
        ]
        for r in reports
    ]
    print_table(["what", "decoding", "metric", "score", "95 % interval", "rows"], rows, title=f"{data.name} {split}")
    if paired:
        console().print(paired.summary())


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts; none reads lines from standard input.", show_default=False)
    ] = None,
    *,
    base: Base,
    vectors: Vectors = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", show_default=False)] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", show_default=False)] = None,
    home: Home = None,
    allow_mismatch: AllowMismatch = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Answer texts with a task's vectors, or with the plain base, in one batch.

    Example: foreword generate "My card was charged twice" --base models/base --vectors triage@prod
    """
    from foreword.engine.request import Request

    texts = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ConfigError("no text to answer", hint="Give texts as arguments, or lines on standard input.")
    engine = open_engine(base, dtype, device)
    name = add_vectors(engine, vectors, home, allow_mismatch) if vectors else None
    requests = [
        Request(prompt=text, prefix=name, max_tokens=max_tokens, temperature=temperature, seed=seed) for text in texts
    ]
    outputs = engine.generate(requests)
    if as_json:
        answers = zip(texts, outputs, strict=True)
        print_json([{"prompt": t, "text": o.text, "finish_reason": o.finish_reason} for t, o in answers])
        return
    for output in outputs:
        console().print(output.text)


def open_engine(base: str, dtype: str, device: str) -> Engine:
    """Load a base and return an engine over it."""
    from foreword.core.model import load_base
    from foreword.engine.engine import Engine

    return Engine(load_base(base, dtype=dtype, device=device))  # type: ignore[arg-type]


def add_vectors(engine: Engine, reference: str, home: Path | None, allow_mismatch: bool) -> str:
    """Compile an artefact file or a registry version into the engine; return its name there."""
    from foreword.core.artefact import load_artefact
    from foreword.core.compile import compile

    path = find_artefact(reference, home)
    artefact = load_artefact(path)
    name = reference if not Path(reference).is_file() else artefact.header.task
    engine.add_prefix(name, compile(engine.base, artefact, allow_mismatch=allow_mismatch))
    return name


def find_artefact(reference: str, home: Path | None) -> Path:
    """Return the file that a path or a registry version means. Raises NotFound naming the nearest."""
    path = Path(reference)
    if path.is_file() or path.suffix == ".safetensors":
        return path
    from foreword.registry.store import Registry

    with Registry.open(home) as registry:
        return registry.path(registry.resolve(reference))
