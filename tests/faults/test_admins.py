"""Fault 6: two admins promote at once. One chain of moves, one target of the alias, and the loser hears who won."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from foreword.registry.store import Registry
from tests.faults.stage import Database, Process, Stage, database_url, staged

pytestmark = pytest.mark.slow
BOTH = [pytest.param("sqlite"), pytest.param("postgresql", marks=pytest.mark.postgres)]

PROMOTE = """
import json, os, sys
from foreword.errors import ForewordError
from foreword.registry.store import Registry
reference, who = sys.argv[1:]
def judge(candidate, current):  # both admins have judged before either may move the alias
    print("judged", flush=True)
    sys.stdin.readline()
with Registry.open() as registry:
    try:
        move = registry.promote(reference, who=who, gate=judge)
        print(json.dumps({"from": move.from_number, "to": move.to_number}))
    except ForewordError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""

MANY = """
import random, sys
from foreword.errors import Conflict
from foreword.registry.store import Registry
who, seed = sys.argv[1:]
source = random.Random(int(seed))
with Registry.open() as registry:
    print("ready", flush=True)
    sys.stdin.readline()
    for turn in range(25):
        try:
            if source.random() < 0.6:
                registry.promote(f"triage@{source.randint(1, 6)}", who=who)
            else:
                registry.rollback("triage", who=who)
        except Conflict:
            pass
    print("done", flush=True)
"""


@pytest.fixture(params=BOTH)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    kind: Database = request.param
    with database_url(kind) as url, staged(tmp_path, database_url=url) as stage:
        yield stage


def say(process: Process) -> None:
    assert process.popen.stdin is not None
    process.popen.stdin.write("go\n")
    process.popen.stdin.flush()


def check_chain(registry: Registry) -> None:
    """Each move begins where the one before it ended, the alias is where the last one did; the audit agrees."""
    moves = registry.history("triage", "prod")
    assert [move.from_number for move in moves] == [None, *(move.to_number for move in moves[:-1])]
    assert registry.aliases("triage")["prod"] == moves[-1].to_number
    entries = [
        entry
        for entry in reversed(registry.access.audit(limit=1000, subject="triage@prod"))
        if entry.action in ("promote", "rollback", "tag")
    ]
    assert [(entry.who, entry.details["to"]) for entry in entries] == [(move.who, move.to_number) for move in moves]


def test_of_two_that_judged_at_once_one_wins(stage: Stage) -> None:
    """Proves `expect` in `Registry.promote`: without it the second overwrites a version that it has never looked at."""
    for _ in range(3):
        stage.publish(compiled=False)
    stage.registry.promote("triage@1", who="carol")
    admins = [stage.python(PROMOTE, f"triage@{2 + place}", who) for place, who in enumerate(("alice", "bob"))]
    assert [admin.line for admin in admins] == ["judged", "judged"]
    for admin in admins:
        say(admin)
    told = [json.loads(admin.popen.communicate(timeout=60)[0]) for admin in admins]
    winner = 0 if "to" in told[0] else 1
    assert told[winner] == {"from": 1, "to": 2 + winner}
    lost = told[1 - winner]
    assert lost["error"] == "Conflict"
    assert f"is at triage@{2 + winner}, moved by {('alice', 'bob')[winner]} at " in lost["message"]
    assert "triage@1 was expected" in lost["message"]
    assert stage.registry.resolve("triage").number == 2 + winner
    check_chain(stage.registry)


def test_many_moves_from_two_processes_are_one_chain(stage: Stage) -> None:
    """Proves that a move reads and writes in one transaction of the only writer."""
    for _ in range(6):
        stage.publish(compiled=False)
    stage.registry.promote("triage@1", who="carol")
    admins = [stage.python(MANY, who, seed) for seed, who in enumerate(("alice", "bob"))]
    for admin in admins:
        say(admin)
    for admin in admins:
        assert admin.popen.communicate(timeout=60)[0] == "done\n", admin.errors()
    check_chain(stage.registry)
    assert {move.who for move in stage.registry.history("triage", "prod")} == {"alice", "bob", "carol"}
