"""`foreword advise`: which method fits tasks, base and constraints, and why."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.options import Json
from foreword.cli.output import console, print_json
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.advise.constraints import Constraints


def register(app: typer.Typer) -> None:
    """Add `advise` to `app`."""
    app.command("advise")(advise)


def advise(
    constraints: Annotated[
        Path | None, typer.Argument(help="Constraints file (TOML); with --ask its values are the defaults.")
    ] = None,
    ask: Annotated[bool, typer.Option("--ask", help="Ask the questions, one by one.")] = False,
    save: Annotated[
        Path | None, typer.Option("--save", help="Where --ask writes the file it made.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Overrides such as limits.storage_total_bytes='20 MB'.", show_default=False),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option("--measured", help="Rows of `foreword compare` in place of the rules.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the report: .md, .html, .json or .txt.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Weigh every method under your constraints: what fits, what is recommended and why, and what would change it.

    Example: foreword advise constraints.toml --out report.html
    """
    from foreword.advise.decide import decide
    from foreword.advise.essay.write import write_essay
    from foreword.advise.measured import load_measured
    from foreword.report import render, write

    read = _asked(constraints, settings or [], save) if ask else _loaded(constraints, settings or [], save)
    decision = decide(read, load_measured(measured) if measured else None)
    report = write_essay(decision)
    written = write(report, out) if out else []
    if as_json:
        print_json(report.to_json())
    elif out:
        console().print(f"recommended: {decision.recommended or 'nothing fits'}")
        for path in written:
            console().print(f"wrote {path}")
    else:
        console().print(render(report, "text"))


def _loaded(path: Path | None, settings: list[str], save: Path | None) -> Constraints:
    from foreword.advise.constraints import load_constraints

    if path is None:
        raise ConfigError("no constraints file", hint="Give one, or answer questions with --ask.")
    if save is not None:
        raise ConfigError("--save goes with --ask", hint="The file that you gave is there already.")
    return load_constraints(path, settings)


def _asked(path: Path | None, settings: list[str], save: Path | None) -> Constraints:
    """Ask on standard error, so that standard output holds the report alone; leave at Ctrl-C and end of input."""
    from foreword.advise.answers import ask_all, to_toml
    from foreword.advise.constraints import from_tables, read_tables, with_overrides

    given = read_tables(path) if path else {}
    folder = path.parent if path else Path()

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    try:
        tables, constraints = with_overrides(given, settings), None
        while constraints is None:
            tables = ask_all(_ask, say, tables, folder)
            try:
                constraints = from_tables(tables, folder=folder)
            except ConfigError as error:
                say(f"{error.message}\n  {error.hint}\nOnce more, with your answers as defaults:")
        if save is None and (answer := _ask("Save these answers as a file? (Enter: no)", "").strip()):
            save = Path(answer)
    except (KeyboardInterrupt, EOFError):
        say("\nleft; nothing was written")
        raise typer.Exit(130) from None
    if save is not None:
        _write(save, to_toml(_moved(tables, folder, save)))
        say(f"wrote {save}")
    return constraints


def _ask(text: str, default: str) -> str:
    """Ask on standard error and read a line; raise EOFError at the end of input."""
    print(f"{text} [{default}]: " if default else f"{text}: ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not sys.stdin.isatty():
        print(line.rstrip("\n"), file=sys.stderr)  # a pipe shows no echo
    if not line:
        raise EOFError
    return line


def _moved(tables: dict[str, Any], folder: Path, save: Path) -> dict[str, Any]:
    """Return the tables with a base's folder as seen from the new file."""
    base = tables["base"]
    if "folder" not in base or folder.resolve() == save.parent.resolve():
        return tables
    return {**tables, "base": {"folder": str((folder / base["folder"]).resolve())}}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", hint="Check folder, rights and space.") from error
