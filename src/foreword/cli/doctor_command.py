"""`foreword doctor` and `foreword version`: is this environment sound, is this artefact?"""

from __future__ import annotations

from typing import Annotated

import typer

from foreword.cli.eval_command import find_artefact
from foreword.cli.options import Device, Dtype, Home, Json
from foreword.cli.output import console, print_json, print_table


def register(app: typer.Typer) -> None:
    """Add `doctor` and `version` to `app`."""
    app.command("doctor")(doctor)
    app.command("version")(version)


def doctor(
    vectors: Annotated[
        str | None, typer.Argument(help="Artefact file or version; none checks the environment.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Check the artefact on this base too.", show_default=False)
    ] = None,
    home: Home = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Check the environment, or an artefact: is the file whole, does it fit the base, does it act as it was trained?

    Example: foreword doctor triage@prod --base models/base
    """
    from foreword.doctor.checks import check_artefact, check_environment

    findings = check_environment(home)
    if vectors is not None:
        findings += check_artefact(find_artefact(vectors, home), base, dtype=dtype, device=device)
    healthy = all(finding.ok for finding in findings)
    if as_json:
        print_json({"ok": healthy, "findings": [finding.to_json() for finding in findings]})
    else:
        rows = [["ok" if f.ok else "FAILED", f.check, f.measured, "" if f.ok else f.fix] for f in findings]
        print_table(["", "check", "measured", "what to do"], rows)
        if vectors is not None and base is None:
            console().print("with --base the vectors are checked on their base too")
    if not healthy:
        raise typer.Exit(3)


def version(as_json: Json = False) -> None:
    """Print the versions of foreword and of what it stands on.

    Example: foreword version
    """
    import importlib.metadata
    import platform

    import foreword

    found = {"foreword": foreword.__version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    if as_json:
        print_json(found)
        return
    for name, number in found.items():
        console().print(f"{name} {number}")
