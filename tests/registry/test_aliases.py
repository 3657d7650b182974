"""Moving aliases: tag, promote and its gate, rollback, history."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foreword.errors import Conflict, NotFound
from foreword.registry.aliases import evaluation_refusal
from foreword.registry.store import Move, Registry, Version

from .conftest import ON_EACH_DATABASE, Factory, measured


def steps(history: list[Move]) -> list[tuple[str, int | None, int | None]]:
    return [(move.action, move.from_number, move.to_number) for move in history]


def test_every_move_is_written_down(registry: Registry, artefact: Factory) -> None:
    registry.publish(artefact(evaluation=measured(0.8, 0.7, 0.9)), alias="prod", who="ann", why="first")
    registry.publish(artefact(evaluation=measured(0.9, 0.8, 1.0)))
    registry.promote("triage@2", who="bob", why="better")
    registry.rollback("triage", who="eve", why="refunds go wrong")
    registry.tag("triage@2", "canary", who="bob")
    registry.untag("triage", "canary", who="ann")
    history = registry.history("triage")
    assert [(move.alias, *step, move.who, move.why) for move, step in zip(history, steps(history), strict=True)] == [
        ("prod", "tag", None, 1, "ann", "first"),
        ("prod", "promote", 1, 2, "bob", "better"),
        ("prod", "rollback", 2, 1, "eve", "refunds go wrong"),
        ("canary", "tag", None, 2, "bob", ""),
        ("canary", "untag", 2, None, "ann", ""),
    ]
    assert [move.evaluation.get("score") for move in history] == [0.8, 0.9, 0.8, 0.9, None]
    assert sorted(history, key=lambda move: move.when) == history
    assert registry.history("triage", "canary") == history[3:]
    assert registry.aliases("triage") == {"prod": 1}


def test_moving_to_where_it_is_writes_nothing(registry: Registry, artefact: Factory) -> None:
    registry.publish(artefact())
    first = registry.tag("triage@1", "prod", who="ann")
    assert first.is_new
    for again in (registry.tag("triage@1", "prod", who="bob"), registry.promote("triage@1", who="bob")):
        assert again == first
        assert not again.is_new
    assert len(registry.history("triage")) == 1


def test_expect(registry: Registry, artefact: Factory) -> None:
    for _ in range(3):
        registry.publish(artefact())
    registry.tag("triage@1", "prod", expect=0, who="ann")
    registry.tag("triage@2", "prod", expect=1, who="ann")
    with pytest.raises(Conflict, match=r"triage@prod is at triage@2, moved by ann at .* UTC; triage@1 was expected"):
        registry.tag("triage@3", "prod", expect=1)
    with pytest.raises(Conflict, match="no version was expected"):
        registry.tag("triage@3", "prod", expect=0)
    with pytest.raises(Conflict, match="triage@canary is not set; triage@1 was expected"):
        registry.tag("triage@3", "canary", expect=1)
    with pytest.raises(Conflict):
        registry.rollback("triage", expect=3)
    with pytest.raises(Conflict):
        registry.untag("triage", "prod", expect=3)
    assert registry.aliases("triage") == {"prod": 2}
    assert registry.rollback("triage", expect=2).to_number == 1


def test_rolling_back_twice_goes_further_back(registry: Registry, artefact: Factory) -> None:
    for _ in range(4):
        registry.tag(registry.publish(artefact()).reference, "prod")
    assert [registry.rollback("triage").to_number for _ in range(2)] == [3, 2]
    registry.promote("triage@4")
    assert [registry.rollback("triage").to_number for _ in range(2)] == [2, 1]
    with pytest.raises(Conflict, match="triage@prod has no earlier version to go back to"):
        registry.rollback("triage")
    assert registry.resolve("triage").number == 1


def test_rollback_skips_deleted_versions_and_brings_back_a_removed_alias(registry: Registry, artefact: Factory) -> None:
    for _ in range(3):
        registry.tag(registry.publish(artefact()).reference, "prod")
    registry.delete("triage@2")
    registry.untag("triage", "prod")
    assert steps([registry.rollback("triage"), registry.rollback("triage")]) == [
        ("rollback", None, 3),
        ("rollback", 3, 1),
    ]


def test_rollback_never_leads_to_where_it_is(registry: Registry, artefact: Factory) -> None:
    for _ in range(3):
        registry.publish(artefact())
    for number in (1, 2, 3, 2):
        registry.tag(f"triage@{number}", "prod")
    registry.delete("triage@3")
    assert registry.rollback("triage").to_number == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "is_refused"),
    [
        (measured(0.70, 0.65, 0.75), measured(0.80, 0.75, 0.85), True),
        (measured(0.70, 0.65, 0.80), measured(0.80, 0.75, 0.85), False),  # touches it
        (measured(0.90, 0.85, 0.95), measured(0.80, 0.75, 0.85), False),
        (measured(0.70, 0.65, 0.75, metric="f1"), measured(0.80, 0.75, 0.85), False),
        (measured(0.70, 0.65, 0.75, split="test"), measured(0.80, 0.75, 0.85), False),
        (measured(0.70, 0.65, 0.75, data_sha256="e" * 64), measured(0.80, 0.75, 0.85), False),
        (measured(0.70, 0.65, 0.75, decoding="labels"), measured(0.80, 0.75, 0.85, decoding="free"), False),
        (measured(0.70, 0.65, 0.75, decoding="free"), measured(0.80, 0.75, 0.85, decoding="free"), True),
        (measured(0.70, 0.65, 0.75, data_sha256=None), measured(0.80, 0.75, 0.85, data_sha256=None), False),
        (measured(0.70, 0.65, 0.75, interval=None), measured(0.80, 0.75, 0.85), False),
        (measured(0.70, 0.65, 0.75, interval=[0.65, "0.75"]), measured(0.80, 0.75, 0.85), False),
        (measured(0.70, 0.65, 0.75), measured(0.80, 0.75, 0.85) | {"score": None}, False),
        (measured(0, 0, 0), measured(1, 1, 1), True),
        ({}, measured(0.80, 0.75, 0.85), False),
        (measured(0.70, 0.65, 0.75), {}, False),
        ({}, {}, False),
    ],
)
def test_the_gate_on_stored_evaluations(
    registry: Registry, artefact: Factory, ours: dict[str, Any], theirs: dict[str, Any], is_refused: bool
) -> None:
    registry.publish(artefact(evaluation=theirs), alias="prod")
    registry.publish(artefact(evaluation=ours))
    if not is_refused:
        move = registry.promote("triage@2")
        assert (move.forced, move.overruled) == (False, "")
        return
    with pytest.raises(
        Conflict, match=r"triage@2 is not promoted to prod: triage@2 is worse than triage@1 on exact_match"
    ):
        registry.promote("triage@2")
    assert registry.resolve("triage").number == 1
    move = registry.promote("triage@2", force=True)
    assert move.forced
    assert move.overruled.startswith("triage@2 is worse than triage@1 on exact_match (dev): its interval ends at")
    assert move.evaluation == ours


def test_the_callers_gate(registry: Registry, artefact: Factory) -> None:
    seen: list[tuple[str, str | None]] = []

    def gate(candidate: Version, current: Version | None) -> str | None:
        seen.append((candidate.reference, current and current.reference))
        return "the conformance probe differs" if candidate.number == 2 else None

    for _ in range(3):
        registry.publish(artefact())
    registry.promote("triage@1", gate=gate)
    with pytest.raises(Conflict, match="the conformance probe differs"):
        registry.promote("triage@2", gate=gate)
    registry.promote("triage@3", gate=gate)
    assert seen == [("triage@1", None), ("triage@2", "triage@1"), ("triage@3", "triage@1")]
    assert registry.promote("triage@2", gate=gate, force=True).forced  # a broken gate must not stand in the way
    registry.promote("triage@2", gate=gate)  # there already
    assert len(seen) == 3


def test_a_gate_that_raises_moves_nothing(registry: Registry, artefact: Factory) -> None:
    def gate(candidate: Version, current: Version | None) -> str | None:
        raise RuntimeError("out of memory")

    registry.publish(artefact())
    with pytest.raises(RuntimeError, match="out of memory"):
        registry.promote("triage@1", gate=gate)
    assert registry.aliases("triage") == {}


def test_what_happens_while_the_gate_judges(registry: Registry, artefact: Factory) -> None:
    for _ in range(3):
        registry.publish(artefact())
    registry.tag("triage@1", "prod")

    def slow(candidate: Version, current: Version | None) -> str | None:
        registry.tag("triage@3", "prod", who="bob")  # also: no lock is held
        return None

    with pytest.raises(Conflict, match=r"triage@prod is at triage@3, moved by bob .*; triage@1 was expected"):
        registry.promote("triage@2", gate=slow)

    def deletes(candidate: Version, current: Version | None) -> str | None:
        registry.delete(candidate.reference)
        return None

    with pytest.raises(NotFound, match="triage@2 was deleted"):
        registry.promote("triage@2", gate=deletes)
    assert registry.resolve("triage").number == 3


def test_no_version_is_judged_against_itself(registry: Registry, artefact: Factory) -> None:
    odd = measured(0.5, 0.1, 0.2)  # an interval that misses its own score
    version = registry.publish(artefact(evaluation=odd))
    assert evaluation_refusal(version, version) is None
    assert evaluation_refusal(version, None) is None


@dataclass
class Model:
    """What an alias is, told with a list: the targets so far, the last of which is now."""

    trail: list[int | None] = field(default_factory=list)
    live: set[int] = field(default_factory=lambda: {1, 2, 3, 4})

    @property
    def now(self) -> int | None:
        return self.trail[-1] if self.trail else None

    def set(self, number: int | None) -> None:
        if number != self.now:
            self.trail.append(number)

    def back(self) -> bool:
        for position in range(len(self.trail) - 2, -1, -1):
            if self.trail[position] in self.live and self.trail[position] != self.now:
                del self.trail[position + 1 :]
                return True
        return False


_actions = st.one_of(
    st.tuples(st.sampled_from(["tag", "promote", "delete"]), st.integers(1, 4)),
    st.tuples(st.sampled_from(["untag", "rollback"]), st.just(0)),
)
_names = itertools.count()


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(_actions, max_size=14))
def test_an_alias_does_what_a_list_does(
    registry: Registry, four_files: list[Path], actions: list[tuple[str, int]]
) -> None:
    task, model = f"task-{next(_names)}", Model()
    for path in four_files:
        registry.publish(path, task=task)
    for action, number in actions:
        reference = f"{task}@{number}"
        if action == "rollback":
            if model.back():
                assert registry.rollback(task).to_number == model.now
            else:
                with pytest.raises(NotFound if not model.trail else Conflict):
                    registry.rollback(task)
        elif action == "untag":
            if model.now is None:
                with pytest.raises(NotFound):
                    registry.untag(task, "prod")
            else:
                registry.untag(task, "prod")
                model.set(None)
        elif action == "delete":
            if number not in model.live:
                with pytest.raises(NotFound):
                    registry.delete(reference)
            elif number == model.now:
                with pytest.raises(Conflict):
                    registry.delete(reference)
            else:
                registry.delete(reference)
                model.live.remove(number)
        elif number not in model.live:
            with pytest.raises(NotFound):
                registry.tag(reference, "prod")
        else:
            registry.tag(reference, "prod") if action == "tag" else registry.promote(reference)
            model.set(number)
        assert registry.aliases(task).get("prod") == model.now
        newest = max(model.live, default=None)
        if (expected := model.now or newest) is not None:
            assert registry.resolve(task).number == expected
    history = registry.history(task)
    for before, after in itertools.pairwise(history):
        assert before.to_number == after.from_number
        assert after.from_number != after.to_number


@pytest.fixture
def four_files(artefact: Factory) -> list[Path]:
    return [artefact() for _ in range(4)]
