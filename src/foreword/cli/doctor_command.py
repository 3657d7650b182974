"""`foreword doctor` and `foreword version`: is this environment sound, is this artefact?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli.eval_command import find_artefact
from foreword.cli.options import Device, Dtype, Home, Json
from foreword.cli.output import console, print_json, print_table

if TYPE_CHECKING:
    from foreword.core.artefact import ArtefactHeader
    from foreword.doctor.finding import Finding


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
    server: Annotated[
        str | None,
        typer.Option(
            "--server", help="Replay conformance through this server; all its tasks, or one.", show_default=False
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", envvar="FOREWORD_KEY", help="API key for --server.", show_default=False, show_envvar=False
        ),
    ] = None,
    home: Home = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Check the environment, an artefact, or a server: is it whole, does it fit, does it act as it was trained?

    Example: foreword doctor triage@prod --base models/base
    Example: foreword doctor --server http://127.0.0.1:8000
    """
    from foreword.doctor.checks.artefact import check_artefact
    from foreword.doctor.checks.environment import check_environment

    findings = check_environment(home)
    if server is not None:
        findings += _check_server(server, key, vectors, home, dtype)
    elif vectors is not None:
        findings += check_artefact(find_artefact(vectors, home), base, dtype=dtype, device=device)
    healthy = all(finding.ok for finding in findings)
    if as_json:
        print_json({"ok": healthy, "findings": [finding.to_json() for finding in findings]})
    else:
        rows = [["ok" if f.ok else "FAILED", f.check, f.measured, "" if f.ok else f.fix] for f in findings]
        print_table(["", "check", "measured", "what to do"], rows)
        if vectors is not None and base is None and server is None:
            console().print("with --base the vectors are checked on their base too")
    if not healthy:
        raise typer.Exit(3)


def _check_server(url: str, key: str | None, reference: str | None, home: Path | None, dtype: str) -> list[Finding]:
    """Check one version, or every task of the server that this registry has."""
    from foreword.core.artefact import read_header
    from foreword.doctor.finding import Finding
    from foreword.doctor.server import ServerUnderTest, check_version
    from foreword.registry.store import Registry

    findings = []
    with Registry.open(home) as registry, ServerUnderTest(url, key) as server:
        names = [reference] if reference else [card["id"] for card in server.models() if "root" in card]
        findings.append(Finding(check="server", ok=True, measured=f"{server.url}: {len(names)} names to check"))
        for name in names:
            version = registry.resolve(name)
            header = read_header(registry.path(version))
            findings += check_version(server, name, version.sha256, header, header_dtype(header, dtype))
    return findings


def header_dtype(header: ArtefactHeader, dtype: str) -> str:
    """Return the dtype that the server's base runs in: as given, else the one that the version was trained in."""
    return dtype if dtype != "auto" else str(header.training.get("dtype", "bfloat16"))


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
