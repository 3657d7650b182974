"""Options that several commands share."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

DtypeName = Literal["auto", "checkpoint", "float32", "bfloat16", "float16"]

Base = Annotated[str, typer.Option("--base", help="Folder or hub id of the frozen base model.", show_default=False)]
Dtype = Annotated[
    DtypeName,
    typer.Option(
        "--dtype", help="Floating point type of the base; auto is its own, or float32 on a CPU without 16-bit products."
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[
    Path | None,
    typer.Option(
        "--home",
        help="Folder of the registry; default FOREWORD_DATABASE_URL and FOREWORD_BLOB_URL, FOREWORD_HOME, ~/.foreword.",
        show_default=False,
    ),
]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-mismatch", help="Use the vectors on another base than they were trained for.")
]
Decoding = Annotated[
    Literal["auto", "free", "labels"],
    typer.Option("--decoding", help="auto scores the labels where the task has a closed set."),
]
Publish = Annotated[bool, typer.Option("--publish/--no-publish", help="Publish as TASK@candidate.")]


def run_folder(out: Path | None, kind: str = "") -> Path:
    """Return the folder for a command's results: the one given, or a new `runs/<kind>-<date-time>`."""
    return out or Path("runs") / (f"{kind}-" * bool(kind) + f"{datetime.datetime.now():%Y%m%d-%H%M%S}")
