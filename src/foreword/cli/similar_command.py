"""`foreword similar`: which version to start a new task from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from foreword.cli.options import Base, Device, Dtype, Home, Json
from foreword.cli.output import console, print_json, print_table
from foreword.cli.registry_commands import open_registry
from foreword.cli.tweak_command import base_loader

if TYPE_CHECKING:
    from foreword.recipes.similar import Similar


def register(app: typer.Typer) -> None:
    """Add `similar` to `app`."""
    app.command("similar")(similar)


def similar(
    subject: Annotated[
        str, typer.Argument(help="Task file (TOML), or a version such as triage@2.", show_default=False)
    ],
    base: Base,
    method: Annotated[
        Literal["prompt", "prefix", "kv"] | None,
        typer.Option("--method", help="Of the new task; default the task file's.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", help="Training rows that losses are taken on.")] = 64,
    all_versions: Annotated[bool, typer.Option("--all-versions", help="Not only those that tasks serve.")] = False,
    home: Home = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Rank the registry's versions as starts for a task: by loss on its rows, by outputs, by vectors.

    Example: foreword similar returns.toml --base models/base --method kv
    """
    from foreword.recipes.similar import similar as rank

    with open_registry(home) as registry:
        found = rank(
            registry,
            base_loader(base, dtype, device),
            subject,
            method=method,
            num_rows=rows,
            all_versions=all_versions,
        )
    line = train_line(found, base)
    if as_json:
        print_json(found.to_json() | {"train": line})
    else:
        _show(found, line)


def train_line(found: Similar, base: str) -> str | None:
    """Return the command that trains a task file from the recommended start; None where there is none."""
    if found.recommended is None or not found.subject.endswith(".toml"):
        return None
    start = f"--set train.init=from:{found.recommended}"
    return f"foreword train {found.subject} --base {base} --methods {found.method} {start}"


def _show(found: Similar, line: str | None) -> None:
    def number(value: float | None) -> str | None:
        return None if value is None else f"{value:.4f}"

    rows = [
        [m.reference, m.num_vectors, number(m.loss), number(m.kl), number(m.cosine), number(m.aligned_cosine)]
        for m in found.matches
    ]
    if found.own_loss is not None:
        rows.append([f"its own start ({found.own_init:.40})", None, number(found.own_loss), None, None, None])
    columns = ("start", "P", "loss at start", "KL of outputs", "cosine of means", "cosine by vector")
    print_table(columns, rows, title=f"{found.subject}, {found.method}, ordered by {found.ranked_by}")
    for reason in found.left_out:
        console().print(f"left out {reason}")
    if not found.matches:
        console().print("no version can be a start")
    elif found.recommended is None:
        console().print("no version has less loss than the task's own start: begin from that")
    elif line is None:
        console().print(f"nearest: {found.recommended}")
    else:
        console().print(f"start from {found.recommended}:\n  {line}")
