"""The commands: parse, one library call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from foreword.cli.output import plain
from foreword.cli.registry_commands import register
from foreword.errors import ConfigError, Conflict, ForewordError, NotFound
from foreword.registry.store import Registry

from .conftest import ON_EACH_DATABASE, Factory, Place, measured

COMMANDS = ["publish", "list", "show", "diff", "tag", "promote", "rollback", "delete", "gc"]


class Shell:
    """Runs commands in one home."""

    def __init__(self, place: Place) -> None:
        self.app = typer.Typer()
        register(self.app)
        self.environment = {"COLUMNS": "200", **place.environment}

    def __call__(self, *arguments: object) -> str:
        result = CliRunner().invoke(self.app, [*map(str, arguments)], env=self.environment)
        if result.exception is not None:
            raise result.exception
        return result.output

    def json(self, *arguments: object) -> Any:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def shell(place: Place) -> Shell:
    return Shell(place)


def test_a_versions_life(shell: Shell, artefact: Factory, place: Place) -> None:
    assert "no tasks yet" in shell("list")
    one = artefact(evaluation=measured(0.8, 0.75, 0.85), training={"lr": 0.3})
    assert shell("publish", one, "--alias", "prod", "--why", "first").startswith("published triage@1 (prompt, P=2, ")
    assert shell("publish", one).startswith("published before as triage@1 ")
    two = artefact(evaluation=measured(0.7, 0.65, 0.74), training={"lr": 0.1})
    published = shell.json("publish", two, "--who", "ann", "--why", "[bold]longer[/] prompt")
    assert (published["number"], published["is_new"], published["who"]) == (2, True, "ann")
    assert "triage@canary: not set -> triage@2" in shell("tag", "triage@2", "canary")
    assert "points at triage@2 already" in shell("tag", "triage@2", "canary")
    listed = shell("list", "triage")
    assert "[bold]longer[/] prompt" in listed
    assert " 0.8 " in listed
    assert [version["aliases"] for version in shell.json("list", "triage")] == [["prod"], ["canary"]]
    assert shell.json("list")[0]["aliases"] == {"canary": 2, "prod": 1}
    assert "canary -> 2, prod -> 1" in shell("list")
    with pytest.raises(Conflict, match=r"its interval ends at 0\.74, below 0\.8"):
        shell("promote", "triage@canary")
    forced = shell("promote", "triage@canary", "--force")
    assert "triage@prod: triage@1 -> triage@2" in forced
    assert "forced, against: triage@2 is worse than triage@1" in forced
    shown = shell("show", "triage")
    assert shown.startswith("triage@2\n  aliases                 canary, prod\n")
    assert "promote (forced)" in shown
    details = shell.json("show", "triage")
    assert Path(details["path"]).parent.parent == place.home / ("cache" if place.blob_url else "blobs")
    assert [move["to"] for move in details["history"]] == [1, 2, 2]
    assert "training.lr" in shell("diff", "triage@1", "triage")
    assert shell.json("diff", "triage@1", "triage@2")["changes"]["training.lr"] == [0.3, 0.1]
    assert "do not differ" in shell("diff", "triage", "triage")
    assert "triage@prod: triage@2 -> triage@1" in shell("rollback", "triage", "--expect", "2")
    with pytest.raises(Conflict, match="in use by the alias canary"):
        shell("delete", "triage@2")
    assert "triage@canary: triage@2 -> not set" in shell("tag", "triage", "canary", "--remove")
    assert "deleted triage@2" in shell("delete", "triage@2")
    assert "would free 1 files" in shell("gc", "--grace-s", "0", "--dry-run")
    assert shell.json("gc", "--grace-s", "0")["num_blobs"] == 1
    assert shell.json("delete", shell.json("publish", two)["task"] + "@3")["number"] == 3


def test_errors_reach_the_caller(shell: Shell, artefact: Factory) -> None:
    shell("publish", artefact())
    for arguments, kind in [
        (("show", "triag"), NotFound),
        (("delete", "triage"), ConfigError),
        (("rollback", "triage"), NotFound),
        (("publish", "/nowhere"), ForewordError),
    ]:
        with pytest.raises(kind):
            shell(*arguments)


def test_publishing_with_a_report(shell: Shell, artefact: Factory, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    for content, message in [(None, "cannot read"), ("{", "is no JSON"), ("[]", "has no score"), ("{}", "no score")]:
        if content is not None:
            report.write_text(content)
        with pytest.raises(ConfigError, match=message):
            shell("publish", artefact(), "--evaluation", report)
    report.write_text(json.dumps(measured(0.9, 0.8, 1.0)))
    assert shell.json("publish", artefact(), "--evaluation", report)["evaluation"]["score"] == 0.9


def test_nothing_in_a_registry_can_write_to_the_terminal(shell: Shell, artefact: Factory) -> None:
    evil = "\x1b[2J\x1b]0;title\x07\rred [/bold]\u202e"
    shell("publish", artefact(evaluation={"metric": evil, "score": 0.5, "note": evil}), "--why", evil, "--who", evil)
    shell("publish", artefact(training={"note": evil}), "--alias", "prod", "--why", evil)
    for command in (("list", "triage"), ("show", "triage@1"), ("show", "triage"), ("diff", "triage@1", "triage")):
        out = shell(*command)
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(out)
        assert "[/bold]" in out
    assert shell.json("show", "triage@1")["why"] == evil
    assert plain("a\n\tb") == "a\\n\\tb"


def test_json_has_no_nan(shell: Shell, artefact: Factory) -> None:
    shell("publish", artefact(training={"loss": float("nan")}))
    shell("publish", artefact(training={"loss": 0.5}))
    assert shell.json("diff", "triage@1", "triage@2")["changes"]["training.loss"] == [None, 0.5]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(home: Path, command: str) -> None:
    result = CliRunner().invoke(Shell(Place(home)).app, [command, "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert f"Example: foreword {command}" in result.output
    for option in ("--json", "--home"):
        assert option in result.output


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
def test_an_explicit_home_goes_before_the_environment(shell: Shell, artefact: Factory, place: Place) -> None:
    other = place.home.parent / "other"
    shell("publish", artefact(), "--home", other)
    with Registry.open(other) as registry:
        assert [task.name for task in registry.tasks()] == ["triage"]
    with place.open() as registry:
        assert registry.tasks() == []
