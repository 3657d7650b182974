"""Options that several commands share."""

from __future__ import annotations

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
