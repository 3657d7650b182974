"""The commands over the registry: publish, list, show, diff, tag, promote, rollback, delete, gc."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.options import Home, Json
from foreword.cli.output import console, plain, print_json, print_table
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.registry.store import Move, Registry, Version

Who = Annotated[str | None, typer.Option("--who", help="Who does it; default your user name.", show_default=False)]
Why = Annotated[str, typer.Option("--why", help="The reason, kept in the history.", show_default=False)]
Expect = Annotated[
    int | None,
    typer.Option("--expect", help="Only if the alias points at this number now; 0: is not set.", show_default=False),
]
Reference = Annotated[
    str, typer.Argument(help="triage@7, triage@canary, or triage: prod, else the newest.", show_default=False)
]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the registry's commands to `app`, at its top level."""
    for command in (publish, show, diff, tag, promote, rollback, delete, gc):
        app.command(command.__name__)(command)
    app.command("list")(list_)


def publish(
    artefact: Annotated[Path, typer.Argument(help="The .safetensors file.", show_default=False)],
    task: Annotated[
        str | None, typer.Option("--task", help="Publish for this task, not the file's own.", show_default=False)
    ] = None,
    alias: Annotated[
        str | None, typer.Option("--alias", help="Point this alias at it, without a gate.", show_default=False)
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--evaluation", help="The report that `foreword eval --out` saved.", show_default=False),
    ] = None,
    why: Why = "",
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Store an artefact as the next version of its task.

    Example: foreword publish runs/triage/best.safetensors --alias canary --why "longer prompt"
    """
    report = _read_report(evaluation) if evaluation else None
    with open_registry(home) as registry:
        version = registry.publish(artefact, task=task, alias=alias, who=who, why=why, evaluation=report)
    if as_json:
        print_json(version.to_json() | {"is_new": version.is_new})
        return
    done = f"published {version.reference}" if version.is_new else f"published before as {version.reference}"
    say(f"{done} ({version.method}, P={version.num_vectors}, {_bytes(version.num_bytes)}, {version.sha256[:12]})")
    if alias is not None:
        say(f"{version.task}@{alias} -> {version.reference}")


def list_(
    task: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="List this task's versions.", show_default=False)
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List the tasks, or the versions of one.

    Example: foreword list triage
    """
    with open_registry(home) as registry:
        if task is None:
            _list_tasks(registry, as_json)
        else:
            _list_versions(registry, task, as_json)


def _list_tasks(registry: Registry, as_json: bool) -> None:
    tasks = registry.tasks()
    if as_json:
        print_json([task.to_json() for task in tasks])
    elif not tasks:
        say("no tasks yet; `foreword publish FILE` makes the first")
    else:
        rows = [
            (task.name, task.num_versions, task.newest, ", ".join(f"{a} -> {n}" for a, n in task.aliases.items()))
            for task in tasks
        ]
        print_table(("task", "versions", "newest", "aliases"), rows)


def _list_versions(registry: Registry, task: str, as_json: bool) -> None:
    versions, aliases = registry.versions(task), registry.aliases(task)
    names = {
        version.number: [alias for alias, number in aliases.items() if number == version.number] for version in versions
    }
    if as_json:
        print_json([version.to_json() | {"aliases": names[version.number]} for version in versions])
        return
    rows = [
        (
            version.number,
            ", ".join(names[version.number]),
            version.method,
            version.num_vectors,
            _bytes(version.num_bytes),
            _score(version.evaluation),
            f"{version.created:%Y-%m-%d %H:%M}",
            version.who,
            version.why,
        )
        for version in versions
    ]
    columns = ("version", "aliases", "method", "P", "file", "score", "created (UTC)", "who", "why")
    print_table(columns, rows, title=task, whole=["version", "created (UTC)"])


def show(reference: Reference, home: Home = None, as_json: Json = False) -> None:
    """Show a version: what it is, where its file lies, and how its task's aliases moved.

    Example: foreword show triage@canary
    """
    with open_registry(home) as registry:
        version = registry.resolve(reference)
        path, aliases = registry.path(version), registry.aliases(version.task)
        history = registry.history(version.task)
    pointing = [alias for alias, number in aliases.items() if number == version.number]
    if as_json:
        moves = [move.to_json() for move in history]
        print_json(version.to_json() | {"aliases": pointing, "path": str(path), "history": moves})
        return
    _show_version(version, pointing, path)
    if history:
        rows = [
            (
                f"{move.when:%Y-%m-%d %H:%M}",
                move.alias,
                move.action + (" (forced)" if move.forced else ""),
                move.from_number,
                move.to_number,
                _score(move.evaluation),
                move.who,
                "; ".join(filter(None, (move.why, move.overruled and f"overruled: {move.overruled}"))),
            )
            for move in history
        ]
        columns = ("when (UTC)", "alias", "action", "from", "to", "score", "who", "why")
        print_table(columns, rows, whole=["when (UTC)"])


def _show_version(version: Version, aliases: list[str], path: Path) -> None:
    facts = {
        "aliases": ", ".join(aliases) or None,
        "method": f"{version.method}, P={version.num_vectors}",
        "file": f"{path} ({_bytes(version.num_bytes)})",
        "sha256": version.sha256,
        "parent": version.parent,
        "base": f"{version.base.model_type} {version.base.weights_sha256[:12]} {version.base.quantisation}".strip(),
        "created": f"{version.created:%Y-%m-%d %H:%M:%S} UTC by {version.who}",
        "why": version.why or None,
        **{f"evaluation.{name}": _short(value) for name, value in version.evaluation.items()},
    }
    say(version.reference)
    for name, value in facts.items():
        say(f"  {name:<24}{plain(value)}")


def diff(
    a: Annotated[str, typer.Argument(help="A version, as triage@6.", show_default=False)],
    b: Annotated[str, typer.Argument(help="The version to compare it with.", show_default=False)],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show in what two versions differ: method, template, training, evaluation, base, bytes.

    Example: foreword diff triage@prod triage@canary
    """
    with open_registry(home) as registry:
        difference = registry.diff(a, b)
    if as_json:
        print_json(difference.to_json())
    elif not difference.changes:
        say(f"{difference.a.reference} and {difference.b.reference} do not differ")
    else:
        rows = [(change.name, _short(change.a), _short(change.b)) for change in difference.changes]
        print_table(("field", difference.a.reference, difference.b.reference), rows)


def tag(
    reference: Reference,
    alias: Annotated[str, typer.Argument(help="The alias, as canary.", show_default=False)],
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias; REFERENCE is the task.")] = False,
    expect: Expect = None,
    why: Why = "",
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Point an alias at a version, without a gate; `promote` is the gated way.

    Example: foreword tag triage@7 canary --why "try it on 5 %"
    """
    with open_registry(home) as registry:
        if remove:
            move = registry.untag(reference, alias, who=who, why=why, expect=expect)
        else:
            move = registry.tag(reference, alias, who=who, why=why, expect=expect)
    _print_move(move, as_json)


def promote(
    reference: Reference,
    alias: Annotated[str, typer.Option("--alias", help="The alias to move.")] = "prod",
    base: Annotated[
        str | None,
        typer.Option("--base", help="Replay the version's conformance probe on this base first.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overrule the gate; the history says so.")] = False,
    why: Why = "",
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Point prod at a version, unless its stored evaluation loses to the current one's or its probe fails on the base.

    Example: foreword promote triage@canary --base models/base --why "won on the dev split"
    """
    with open_registry(home) as registry:

        def conformance(candidate: Version, current: Version | None) -> str | None:
            from foreword.doctor.checks.artefact import check_artefact

            findings = check_artefact(registry.path(candidate), base)
            return next((f"{finding.check}: {finding.measured}" for finding in findings if not finding.ok), None)

        gate = None if base is None else conformance
        move = registry.promote(reference, alias, who=who, why=why, force=force, gate=gate)
    _print_move(move, as_json)


def rollback(
    task: TaskName,
    alias: Annotated[str, typer.Option("--alias", help="The alias to move back.")] = "prod",
    expect: Expect = None,
    why: Why = "",
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Point prod at the version before; again, and it goes further back.

    Example: foreword rollback triage --why "wrong queue for refunds"
    """
    with open_registry(home) as registry:
        move = registry.rollback(task, alias, who=who, why=why, expect=expect)
    _print_move(move, as_json)


def delete(
    reference: Annotated[str, typer.Argument(help="The version with its number, as triage@7.", show_default=False)],
    why: Why = "",
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Delete a version that no alias points at; gc frees its file, its number is not used again.

    Example: foreword delete triage@3
    """
    with open_registry(home) as registry:
        version = registry.delete(reference, who=who, why=why)
    if as_json:
        print_json(version.to_json())
    else:
        say(f"deleted {version.reference}; `foreword gc` frees its file when no other version has it")


def gc(
    grace_s: Annotated[float, typer.Option("--grace-s", help="Leave files younger than this many seconds.")] = 3600,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, only count.")] = False,
    who: Who = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Free the files of deleted versions and of interrupted publishing.

    Example: foreword gc --dry-run
    """
    with open_registry(home) as registry:
        freed = registry.gc(grace_s, dry_run=dry_run, who=who)
    if as_json:
        print_json(freed.to_json() | {"dry_run": dry_run})
    else:
        say(f"{'would free' if dry_run else 'freed'} {freed.num_blobs} files, {_bytes(freed.num_bytes)}")


def open_registry(home: Path | None) -> Registry:
    """Open the registry that an option or the environment names."""
    from foreword.registry.store import Registry

    return Registry.open(home)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="Check the path.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}", hint="Give a report of `foreword eval --out`.") from error
    if not isinstance(report, dict) or "score" not in report:
        raise ConfigError(f"{path} has no score", hint="Give a report of `foreword eval --out`.")
    return report


def say(text: str) -> None:
    """Print one line, in which nothing can control the terminal."""
    console().print(plain(text))


def _print_move(move: Move, as_json: bool) -> None:
    if as_json:
        print_json(move.to_json() | {"is_new": move.is_new})
        return
    names = [f"{move.task}@{number}" if number else "not set" for number in (move.from_number, move.to_number)]
    if not move.is_new:
        since = f"moved by {move.who} at {move.when:%Y-%m-%d %H:%M} UTC"
        say(f"{move.task}@{move.alias} points at {names[1]} already, {since}")
        return
    say(f"{move.task}@{move.alias}: {names[0]} -> {names[1]}")
    if move.overruled:
        say(f"forced, against: {move.overruled}")


def _bytes(count: int) -> str:
    amount, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


def _score(evaluation: Mapping[str, Any]) -> str | None:
    score = evaluation.get("score")
    if not isinstance(score, int | float):
        return None
    return f"{score:.4g}"


def _short(value: Any, num_chars: int = 120) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= num_chars else f"{text[: num_chars - 1]}…"
