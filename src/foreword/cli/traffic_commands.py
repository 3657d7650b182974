"""The commands over where a task's traffic goes besides prod, and which replicas get none: canary, shadow, drain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.options import Home, Json
from foreword.cli.output import print_json, print_table
from foreword.cli.registry_commands import Who, open_registry, say
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.registry.access_records import Route, RouteKind, ShadowReport
    from foreword.registry.store import Registry

Candidate = Annotated[
    str,
    typer.Argument(metavar="TASK[@N]", help="The candidate; the bare task with --off and such.", show_default=False),
]
Off = Annotated[bool, typer.Option("--off", help="Send it no more traffic.")]
Replica = Annotated[str, typer.Argument(metavar="URL", help="The replica's, as http://host:port.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`, at its top level."""
    for command in (canary, shadow, drain, undrain):
        app.command(command.__name__)(command)


def canary(
    reference: Candidate,
    weight: Annotated[
        float | None, typer.Option("--weight", help="Percent of the task's requests, to 100.", show_default=False)
    ] = None,
    off: Off = False,
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let a version answer some percent of a task's requests; without an option, show what is set.

    Example: foreword canary triage@8 --weight 10
    """
    _only_one({"--weight": weight is not None, "--off": off})
    with open_registry(home) as registry:
        fraction = None if weight is None else weight / 100
        _route(registry, "canary", reference, fraction, off=off, keep_inputs=False, who=who, as_json=as_json)


def shadow(
    reference: Candidate,
    fraction: Annotated[
        float | None, typer.Option("--fraction", help="Of the task's requests, to 1.", show_default=False)
    ] = None,
    keep_inputs: Annotated[bool, typer.Option("--keep-inputs", help="Keep the inputs beside the answers.")] = False,
    off: Off = False,
    report: Annotated[bool, typer.Option("--report", help="Show how often the answers agree.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Remove the answers and inputs kept.")] = False,
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Send a copy of a task's requests to a version, whose answers are compared and never returned.

    Example: foreword shadow triage@8 --fraction 0.1
    """
    _only_one({"--fraction": fraction is not None, "--off": off, "--report": report, "--forget": forget})
    with open_registry(home) as registry:
        if report:
            _print_report(registry.access.shadow_report(reference), reference, as_json)
        elif forget:
            num_pairs = registry.access.forget_shadow_pairs(reference, who=who)
            _print({"forgotten": num_pairs}, as_json, f"removed {num_pairs} pairs of answers of {reference}")
        else:
            _route(registry, "shadow", reference, fraction, off=off, keep_inputs=keep_inputs, who=who, as_json=as_json)


def drain(url: Replica, who: Who = None, home: Home = None, as_json: Json = False) -> None:
    """Give a replica no new requests; those that run end there.

    Example: foreword drain http://replica-1:8000
    """
    with open_registry(home) as registry:
        registry.access.drain(url, who=who)
    _print({"draining": url}, as_json, f"{url} gets no new requests")


def undrain(url: Replica, who: Who = None, home: Home = None, as_json: Json = False) -> None:
    """Give a replica requests again.

    Example: foreword undrain http://replica-1:8000
    """
    with open_registry(home) as registry:
        registry.access.undrain(url, who=who)
    _print({"undrained": url}, as_json, f"{url} gets requests again")


def _route(
    registry: Registry,
    kind: RouteKind,
    reference: str,
    fraction: float | None,
    *,
    off: bool,
    keep_inputs: bool,
    who: str | None,
    as_json: bool,
) -> None:
    task = reference.partition("@")[0]
    if off:
        registry.access.clear_route(task, kind, who=who)
        _print({"task": task, kind: None}, as_json, f"{task} has no {kind} any more")
        return
    if fraction is not None:
        if task == reference:
            raise ConfigError(f"which version of {task}?", hint=f"Give its number, as {task}@2.")
        route: Route | None = registry.access.set_route(
            task, kind, reference, fraction, keep_inputs=keep_inputs, who=who
        )
    else:
        registry.aliases(task)  # raises NotFound
        routes = registry.access.snapshot().routes.get(task, ())
        route = next((route for route in routes if route.kind == kind), None)
    if route is None:
        _print({"task": task, kind: None}, as_json, f"{task} has no {kind}")
        return
    kept = ", inputs are kept" if route.keep_inputs else ""
    verb = "answers" if kind == "canary" else "gets a copy of"
    share = f"{100 * route.fraction:.6g}% of {task}'s requests"
    _print(route.to_json(), as_json, f"{task}@{route.number} {verb} {share}{kept}")


def _print_report(report: ShadowReport | None, task: str, as_json: bool) -> None:
    if as_json:
        print_json(report and report.to_json())
    elif report is None:
        say(f"{task} has no pairs of answers yet")
    else:
        say(
            f"{task}@{report.candidate} agrees in {report.num_agreeing} of {report.num_pairs} answers "
            f"({report.agreement:.1%}); median {report.candidate_median_s:.3f} s, the served version's "
            f"{report.median_s:.3f} s"
        )
        rows = [
            (
                f"{pair.when:%Y-%m-%d %H:%M}",
                pair.request_id,
                pair.input,
                f"@{pair.number}: {pair.answer}",
                pair.candidate_answer,
            )
            for pair in report.disagreements
        ]
        if rows:
            print_table(
                ("when (UTC)", "request", "input", "served", f"@{report.candidate}"), rows, whole=["when (UTC)"]
            )


def _only_one(options: dict[str, bool]) -> None:
    if len(given := [name for name, is_given in options.items() if is_given]) > 1:
        raise ConfigError(f"{' and '.join(given)} do not go together", hint="Give one of them.")


def _print(data: Any, as_json: bool, text: str) -> None:
    if as_json:
        print_json(data)
    else:
        say(text)
