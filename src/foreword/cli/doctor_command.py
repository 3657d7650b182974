"""`foreword doctor` and `foreword version`: what is wrong, and what proves it?"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli.eval_command import find_artefact
from foreword.cli.options import Device, Dtype, Home, Json
from foreword.cli.output import console, print_json
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.doctor.diagnose import Diagnosis


def register(app: typer.Typer) -> None:
    """Add `doctor` and `version` to `app`."""
    app.command("doctor")(doctor)
    app.command("version")(version)


def doctor(
    what: Annotated[
        str | None,
        typer.Argument(
            help="Artefact, PEFT folder, or version; with --server the name to ask for. None: the environment.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base it was trained for: more is checked with it.", show_default=False),
    ] = None,
    servers: Annotated[
        list[str] | None,
        typer.Option("--server", help="URL of a server; several are replicas of one.", show_default=False),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", envvar="FOREWORD_KEY", help="API key for --server.", show_default=False, show_envvar=False
        ),
    ] = None,
    good: Annotated[
        str | None,
        typer.Option(
            "--good", help="What is still as it should be: a server's URL, or an artefact.", show_default=False
        ),
    ] = None,
    is_bisecting: Annotated[
        bool, typer.Option("--bisect", help="Walk the order of a rollout and stop at the cause.")
    ] = False,
    module: Annotated[
        str | None,
        typer.Option(
            "--module",
            help="package.module:function that returns an Implementation, a TrainingRun or an Evaluation.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write the report: .md, .html, .json or .txt.", show_default=False),
    ] = None,
    home: Home = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find what is wrong with an environment, an artefact, a server, or anybody's implementation or training run.

    Findings name the fault, the measurement that proves it, and the cure. Nothing that is examined is changed.

    Example: foreword doctor triage@prod --base models/base
    Example: foreword doctor --server http://10.0.0.1:8000 --server http://10.0.0.2:8000 --base models/base
    Example: foreword doctor --server http://new:8000 --good http://old:8000 --bisect
    Example: foreword doctor --module mycode.serving:implementation --out report.html
    """
    if out is not None:
        _check_suffix(out)
    _check_options(what, servers, good, is_bisecting, module)
    if module is not None:
        diagnosis = _of_module(module)
    elif servers:
        is_walking = is_bisecting or good is not None
        diagnosis = _of_servers(
            servers, what, good, is_walking, base=base, key=key, home=home, dtype=dtype, device=device
        )
    elif good is not None or is_bisecting:
        diagnosis = _of_pair(str(what), good, base, home, dtype, device)
    else:
        diagnosis = _of_files(what, base, home, dtype, device)
    _tell(diagnosis, out, as_json)
    if what is not None and base is None and not (servers or module or as_json):
        console().print("with --base the vectors are checked on their base too")
    if not diagnosis.ok:
        raise typer.Exit(3)


def _check_options(
    what: str | None, servers: list[str] | None, good: str | None, is_bisecting: bool, module: str | None
) -> None:
    """Raise ConfigError for options that contradict each other."""
    given = {"an artefact or version": what, "--server": servers, "--good": good, "--bisect": is_bisecting}
    if module is not None and (other := next((name for name, value in given.items() if value), None)):
        raise ConfigError(f"--module and {other} are given", hint="Examine one thing at a time.")
    if is_bisecting and not (what or servers):
        raise ConfigError("--bisect has nothing to walk through", hint="Give --server URL, or an artefact and --good.")
    if good is not None and not (what or servers):
        raise ConfigError(f"--good {good} has nothing to compare with", hint="Give --server URL, or an artefact.")
    if servers and len(servers) > 1 and (good is not None or is_bisecting):
        raise ConfigError(f"--bisect walks through one server, {len(servers)} are given", hint="Give one --server.")


def _of_module(reference: str) -> Diagnosis:
    from foreword.doctor.diagnose import diagnose
    from foreword.doctor.load_subject import load_subject

    return diagnose(load_subject(reference))


def _of_files(what: str | None, base: str | None, home: Path | None, dtype: str, device: str) -> Diagnosis:
    """Examine the environment, and an artefact where one is named."""
    from foreword.doctor.checks.environment import check_environment
    from foreword.doctor.diagnose import Diagnosis

    findings = check_environment(home)
    if what is not None:
        from foreword.doctor.checks.artefact import check_artefact

        findings += check_artefact(_place(what, home), base, dtype=dtype, device=device)
    return Diagnosis(findings=tuple(findings), subject=what or "this environment")


def _place(what: str, home: Path | None) -> Path:
    """Return the file or folder that a path or a version means."""
    return Path(what) if Path(what).is_dir() else find_artefact(what, home)


def _of_pair(what: str, good: str | None, base: str | None, home: Path | None, dtype: str, device: str) -> Diagnosis:
    """Walk through an artefact in a rollout's order, beside one that is good."""
    from foreword.core.model import load_base
    from foreword.doctor.pair import bisect_artefacts

    new, old = _place(what, home), None if good is None else _place(good, home)
    loaded = None if base is None else load_base(base, dtype=dtype, device=device)  # type: ignore[arg-type]
    return bisect_artefacts(new, old, loaded, what if good is None else f"{what} against {good}")


def _of_servers(
    urls: list[str],
    name: str | None,
    good: str | None,
    is_walking: bool,
    *,
    base: str | None,
    key: str | None,
    home: Path | None,
    dtype: str,
    device: str,
) -> Diagnosis:
    """Examine servers by the versions of the registry, or walk through one."""
    from foreword.doctor.diagnose import Diagnosis
    from foreword.doctor.server.client import ServerUnderTest
    from foreword.doctor.server.examine import Circumstances, bisect_servers, examine_servers
    from foreword.registry.store import Registry

    known = Circumstances(dtype=dtype)
    if base is not None:
        from foreword.doctor.server.reference import load_tokenizer, plain_logprobs

        trusted = plain_logprobs(base, dtype=dtype, device=device)
        known = Circumstances(dtype=dtype, tokenizer=load_tokenizer(base), base_logprobs=trusted)
    names = [name] if name else []
    with ExitStack() as stack:
        registry = stack.enter_context(Registry.open(home))
        if name is not None:
            registry.resolve(name)  # raises NotFound with near names
        servers = [stack.enter_context(ServerUnderTest(url, key)) for url in urls]
        if not is_walking:
            findings = examine_servers(servers, registry, names, known)
            return Diagnosis(findings=tuple(findings), subject=", ".join(server.url for server in servers))
        other = None if good is None else stack.enter_context(ServerUnderTest(good, key))
        for server in (*servers, *([other] if other else [])):
            server.models()  # a wrong URL or key is said before anything is walked through
        return bisect_servers(servers[0], other, registry, names, known)


def _tell(diagnosis: Diagnosis, out: Path | None, as_json: bool) -> None:
    from foreword.report import render, write

    report = diagnosis.report()
    written = [] if out is None else write(report, out)
    if as_json:
        print_json(diagnosis.to_json())
        return
    console().print(render(report, "text"), end="")
    for path in written:
        console().print(f"written: {path}")


def _check_suffix(out: Path) -> None:
    """Raise ConfigError before minutes of work, not after."""
    from foreword.report.write import FORMATS

    if out.suffix not in FORMATS:
        raise ConfigError(f"{out} has suffix {out.suffix!r}", hint=f"A report is written as {', '.join(FORMATS)}.")


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
