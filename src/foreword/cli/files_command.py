"""`foreword import` and `foreword export`: other libraries' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from foreword.cli.eval_command import find_artefact
from foreword.cli.options import Base, Dtype, Home, Json
from foreword.cli.output import console, print_json


def register(app: typer.Typer) -> None:
    """Add `import` and `export` to `app`."""
    app.command("import")(import_)
    app.command("export")(export)


def import_(
    source: Annotated[Path, typer.Argument(help="PEFT folder, Cartridges .pt, or .npy of [P, D].", show_default=False)],
    base: Base,
    out: Annotated[
        Path, typer.Option("--out", help="The artefact to write; a folder for several.", show_default=False)
    ],
    task: Annotated[str | None, typer.Option("--task", help="Task name to write in.", show_default=False)] = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Make an artefact of vectors that another library trained.

    Example: foreword import adapters/triage --base models/base --out triage.safetensors --task triage
    """
    from foreword.core import interop
    from foreword.core.model import load_base

    frozen = load_base(base, dtype=dtype)
    if source.suffix == ".npy":
        made = [interop.import_npy(source, frozen, task=task, out=out)]
    elif source.is_file():
        made = [interop.import_cartridge_pt(source, frozen, task=task, out=out)]
    elif _is_multitask(source):
        made = interop.import_peft_multitask(source, frozen, out=out)
    else:
        made = [interop.import_peft(source, frozen, task=task, out=out)]
    found = [
        {"path": str(a.path), "method": a.header.method, "P": a.header.num_vectors, "sha256": a.sha256} for a in made
    ]
    if as_json:
        print_json(found)
        return
    for row in found:
        console().print(f"wrote {row['path']}: {row['method']}, P={row['P']}, {str(row['sha256'])[:12]}")


def _is_multitask(folder: Path) -> bool:
    path = folder / "adapter_config.json"
    return path.is_file() and json.loads(path.read_bytes()).get("peft_type") == "MULTITASK_PROMPT_TUNING"


def export(
    vectors: Annotated[str, typer.Argument(help="Artefact file or version.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Needed where the vectors have to be compiled first.", show_default=False),
    ] = None,
    kind: Annotated[Literal["peft"], typer.Option("--format")] = "peft",
    home: Home = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Write an artefact as a folder that HF PEFT loads.

    Example: foreword export triage@prod --out adapters/triage --base models/base
    """
    from foreword.core import interop
    from foreword.core.artefact import load_artefact
    from foreword.core.model import load_base

    artefact = load_artefact(find_artefact(vectors, home))
    frozen = load_base(base, dtype=dtype) if base else None
    folder = interop.export_peft(artefact, out, base_model_name=base or "", base=frozen)
    if as_json:
        print_json({"path": str(folder), "format": kind})
    else:
        console().print(f"wrote {folder}")
