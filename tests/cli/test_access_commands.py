"""The commands over tenants, keys, grants and traffic: what they do, what they print and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from foreword.cli import access_commands, app, traffic_commands
from foreword.registry.access import secret_digest
from foreword.registry.store import Registry
from tests.command import Run, command_runner
from tests.registry.conftest import Factory, shadow_pair


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("FOREWORD_DATABASE_URL", raising=False)
    monkeypatch.setenv("FOREWORD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "home"


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; return (exit code, standard output, standard error)."""
    return command_runner(monkeypatch, capsys)


@pytest.fixture
def done(run: Run) -> Callable[..., str]:
    """Run a command line that must succeed; return what it printed."""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert code == 0, err
        return out

    return call


def read_json(done: Callable[..., str], *arguments: object) -> Any:
    return json.loads(done(*arguments, "--json"))


def every_command() -> list[tuple[str, ...]]:
    grouped = [
        (group.typer_instance.info.name, command.name)
        for group in app.registered_groups
        for command in group.typer_instance.registered_commands
        if command.callback.__module__ == access_commands.__name__
    ]
    alone = [
        (command.callback.__name__,)
        for command in app.registered_commands
        if command.callback.__module__ in (access_commands.__name__, traffic_commands.__name__)
    ]
    return [*grouped, *alone]


def test_every_command_is_there_with_an_example(home: Path) -> None:
    names = [" ".join(words) for words in every_command()]
    for named in ("tenant create|list|show|limits|disable|enable|delete", "key create|list|rotate|revoke"):
        group, _, commands = named.partition(" ")
        assert {f"{group} {command}" for command in commands.split("|")} <= set(names)
    assert {"grant", "withdraw", "canary", "shadow", "drain", "undrain", "audit"} <= set(names)
    for words in every_command():
        result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert f"Example: foreword {' '.join(words)}" in result.output
        assert "--json" in result.output and "--home" in result.output


def test_a_tenants_life(done: Callable[..., str], run: Run) -> None:
    assert "no tenants yet" in done("tenant", "list")
    limits = ("--requests-per-minute", 600, "--concurrent", 8)
    assert "created the tenant shop: requests per minute 600, concurrent 8" in done("tenant", "create", "shop", *limits)
    changed = done("tenant", "limits", "shop", "--concurrent", "none", "--max-new-tokens", 64)
    assert changed == "shop: requests per minute 600, max new tokens 64\n"
    assert "no limits" in done("tenant", "create", "bank")
    assert read_json(done, "tenant", "list")[1]["limits"]["requests_per_minute"] == 600
    assert "may do nothing" in done("tenant", "show", "shop")
    assert done("grant", "shop", "triage") == "shop may call triage\n"
    done("grant", "shop", "*", "--right", "manage")
    assert done("withdraw", "shop", "triage") == "shop may not call triage\n"
    assert "disabled shop" in done("tenant", "disable", "shop")
    assert "shop (disabled): requests per minute 600" in (shown := done("tenant", "show", "shop"))
    assert "may manage *" in shown and "no keys" in shown
    assert "disabled" in done("tenant", "list")
    assert read_json(done, "tenant", "enable", "shop")["disabled"] is False
    code, _, err = run("tenant", "delete", "shob")
    assert code == 6 and "Did you mean shop?" in err
    assert "its keys are revoked" in done("tenant", "delete", "shop")
    assert [tenant["name"] for tenant in read_json(done, "tenant", "list")] == ["bank"]


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "", "٣"])
def test_bad_limits(run: Run, value: str) -> None:
    code, _, err = run("tenant", "create", "shop", f"--concurrent={value}")
    assert code == 2 and "concurrent is" in err


def test_a_key_is_printed_once_and_alone(run: Run, done: Callable[..., str], home: Path) -> None:
    done("tenant", "create", "shop")
    code, out, err = run("key", "create", "shop", "--name", "ci", "--expires", "90d")
    assert code == 0
    plaintext = out.removesuffix("\n")
    with Registry.open(home) as registry:
        (key,) = registry.access.keys()
    assert key.secret_sha256 == secret_digest(plaintext)
    assert key.id in err and "shown this once" in err and plaintext not in err
    assert key.expires is not None
    assert abs(key.expires - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=1)
    listed = done("key", "list", "shop")
    assert key.id in listed and "live" in listed and plaintext not in listed
    code, out, err = run("key", "rotate", key.id, "--grace", "1h")
    assert code == 0 and out.startswith("fw_") and out != f"{plaintext}\n"
    assert "revoked" in done("key", "revoke", key.id)
    assert [state["revoked"] is None for state in read_json(done, "key", "list")] == [False, True]
    created = read_json(done, "key", "create", "--admin")
    assert created["plaintext"].startswith(created["key"]["id"]) and created["key"]["tenant"] is None
    assert [state["id"] for state in read_json(done, "key", "list", "--admin")] == [created["key"]["id"]]
    assert "secret" not in json.dumps(read_json(done, "key", "list"))
    for arguments in (("create",), ("create", "shop", "--admin")):
        code, out, err = run("key", *arguments)
        assert (code, out) == (2, "") and "Give TENANT or --admin" in err


@pytest.mark.parametrize("text", ["90", "d", "0d", "-1d", "1w", "1d2h", "٣d"])
def test_bad_durations(run: Run, text: str) -> None:
    code, out, err = run("key", "create", "--admin", f"--expires={text}")
    assert (code, out) == (2, "") and "is no duration" in err


def test_canary_and_drain(run: Run, done: Callable[..., str], home: Path, tmp_path: Path) -> None:
    artefact = Factory(tmp_path)
    with Registry.open(home) as registry:
        registry.publish(artefact(), alias="prod")
        registry.publish(artefact())
    assert done("canary", "triage") == "triage has no canary\n"
    assert done("canary", "triage@2", "--weight", 10) == "triage@2 answers 10% of triage's requests\n"
    assert read_json(done, "canary", "triage")["fraction"] == 0.1
    assert done("canary", "triage@2", "--weight", 12.5) == "triage@2 answers 12.5% of triage's requests\n"
    for arguments, message in [
        (("triage", "--weight", 10), "which version of triage?"),
        (("triage@2", "--weight", 0), "a fraction of 0"),
        (("triage@2", "--weight", 101), "a fraction of 1.01"),
        (("triage@2", "--weight", 10, "--off"), "--weight and --off do not go together"),
    ]:
        code, _, err = run("canary", *arguments)
        assert code == 2 and message in err
    assert run("canary", "nothing")[0] == run("delete", "triage@2")[0] == 6
    assert done("canary", "triage", "--off") == "triage has no canary any more\n"
    done("drain", "http://replica-1:8000/")
    with Registry.open(home) as registry:
        assert registry.access.snapshot().draining == {"http://replica-1:8000"}
    done("undrain", "http://replica-1:8000")
    assert run("undrain", "http://replica-1:8000")[0] == 6
    entries = read_json(done, "audit", "--limit", 5)
    assert [entry["action"] for entry in entries] == ["undrain", "drain", "canary.clear", "canary.set", "canary.set"]
    table = done("audit", "--action", "canary.set", "--subject", "triage")
    assert "fraction 0.125" in table and "drain" not in table


def test_shadow_and_its_report(run: Run, done: Callable[..., str], home: Path, tmp_path: Path) -> None:
    artefact = Factory(tmp_path)
    with Registry.open(home) as registry:
        for _ in range(3):
            registry.publish(artefact())
        assert "inputs are kept" in done("shadow", "triage@2", "--fraction", 0.5, "--keep-inputs")
        assert "no pairs of answers yet" in done("shadow", "triage", "--report")
        assert read_json(done, "shadow", "triage", "--report") is None
        registry.access.add_shadow_pair(shadow_pair(candidate=3, agrees=False))  # an earlier candidate's
        for number in range(4):
            registry.access.add_shadow_pair(shadow_pair(request_id=f"r-{number}"))
        evil = "\x1b[2Jorders"
        odd = shadow_pair(request_id="r-4", agrees=False, candidate_answer=evil, input="Where is it?", seconds=2.0)
        registry.access.add_shadow_pair(odd)
    report = done("shadow", "triage", "--report")
    assert "triage@2 agrees in 4 of 5 answers (80.0%)" in report
    assert "median 0.500 s, the served version's 0.250 s" in report
    assert "r-4" in report and "Where is it?" in report and "r-3" not in report
    assert "\x1b" not in report and "orders" in report
    data = read_json(done, "shadow", "triage", "--report")
    assert (data["agreement"], data["num_pairs"]) == (0.8, 5)
    assert [pair["candidate_answer"] for pair in data["disagreements"]] == [evil]
    assert "removed 6 pairs" in done("shadow", "triage", "--forget")
    assert done("shadow", "triage", "--off") == "triage has no shadow any more\n"
    assert run("shadow", "triage", "--off", "--report")[0] == 2


def test_the_commands_are_registered_on_any_app() -> None:
    other = typer.Typer()
    for module in (access_commands, traffic_commands):
        module.register(other)
    assert {group.typer_instance.info.name for group in other.registered_groups} == {"tenant", "key"}
