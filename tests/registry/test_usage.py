"""What gateways tell each other: use of the present minute, and pairs of shadow answers."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from foreword.errors import ConfigError
from foreword.registry.access import Access
from foreword.registry.access_records import Usage
from foreword.registry.database import Database
from foreword.registry.store import Registry

from .conftest import ON_EACH_DATABASE, Factory, Place, shadow_pair

pytestmark = pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)


class Clock:
    """The database's clock, moved by hand."""

    def __init__(self) -> None:
        self.now = datetime(2026, 5, 17, 12, 30, 10, tzinfo=UTC)

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(Database, "now", lambda self, session: clock.now)
    return clock


@pytest.fixture
def access(registry: Registry) -> Access:
    return registry.access


def use(requests: int, tokens: int = 0, running: int = 0) -> Usage:
    return Usage(requests=requests, tokens=tokens, running=running)


def test_each_gateway_learns_what_the_others_use(access: Access, clock: Clock) -> None:
    assert access.sync_usage("a", {"shop": use(3, 100, 2), "bank": use(1, 10, 1)}) == {}
    assert access.sync_usage("b", {"shop": use(5, 50, 4)}) == {"shop": use(3, 100, 2), "bank": use(1, 10, 1)}
    assert access.sync_usage("c", {}) == {"shop": use(8, 150, 6), "bank": use(1, 10, 1)}
    clock.forward(0.5)
    assert access.sync_usage("a", {"shop": use(4, 120, 1)}) == {"shop": use(5, 50, 4)}  # replaced, and bank left out
    clock.forward(0.5)
    assert access.sync_usage("c", {}) == {"shop": use(9, 170, 5)}


def test_a_silent_gateway_counts_no_more(access: Access, clock: Clock) -> None:
    access.sync_usage("a", {"shop": use(3, 100, 2)})
    clock.forward(4.9)
    assert access.sync_usage("b", {}) == {"shop": use(3, 100, 2)}
    clock.forward(0.2)
    assert access.sync_usage("b", {}) == {}


def test_a_new_minute_begins_at_zero(access: Access, clock: Clock) -> None:
    clock.forward(47)  # 12:30:57
    access.sync_usage("a", {"shop": use(3, 100, 2)})
    clock.forward(4)
    assert access.sync_usage("b", {}) == {"shop": use(0, 0, 2)}  # what runs still runs


def test_old_rows_are_removed_in_passing(access: Access, clock: Clock, registry: Registry) -> None:
    access.sync_usage("a", {"shop": use(3), "bank": use(1)})
    clock.forward(121)
    access.sync_usage("b", {"shop": use(1)})
    with registry._database.reading() as session:
        rows = session.connection().exec_driver_sql("SELECT gateway, tenant FROM usage").all()
    assert [tuple(row) for row in rows] == [("b", "shop")]


def test_usage_is_no_admin_action(access: Access, registry: Registry, artefact: Factory) -> None:
    registry.publish(artefact())
    before = access.audit(), access.revision()
    access.sync_usage("a", {"shop": use(1)})
    access.add_shadow_pair(shadow_pair())
    assert (access.audit(), access.revision()) == before


@pytest.mark.parametrize("name", ["", "x" * 201, "\0", "\ud800"])
def test_bad_gateway_names(access: Access, name: str) -> None:
    with pytest.raises(ConfigError, match="the gateway's name"):
        access.sync_usage(name, {})


def test_the_real_clock(access: Access) -> None:
    access.sync_usage("a", {"shop": use(0, 0, 7)})
    assert access.sync_usage("b", {}) == {"shop": use(0, 0, 7)}


def test_many_gateways_at_once(place: Place, access: Access) -> None:
    """No deadlock, no lost update, and each gateway's last word stands."""
    tenants = [f"t{number}" for number in range(20)]
    failures: list[BaseException] = []

    def gateway(name: str) -> None:
        order, source = list(tenants), random.Random(name)
        try:
            with place.open() as registry:
                for turn in range(10):
                    source.shuffle(order)
                    known = order[: source.randint(1, len(order))] if turn < 9 else order
                    registry.access.sync_usage(name, {tenant: use(0, 0, turn) for tenant in known})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=gateway, args=(f"g{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert access.sync_usage("late", {}) == {tenant: use(0, 0, 36) for tenant in tenants}


def test_shadow_pairs(access: Access, registry: Registry, artefact: Factory) -> None:
    registry.publish(artefact())
    registry.publish(artefact("mail"))
    assert access.shadow_pairs("triage") == []
    hostile = "a\0b\ud800c\n🙂"
    given = [
        shadow_pair(request_id="r-1", input="Where is my money?"),
        shadow_pair(request_id="r-2", agrees=False, candidate_answer="orders", seconds=1e-4),
        shadow_pair(request_id=hostile, answer=hostile, candidate_answer=hostile, input=hostile),
    ]
    for pair in given:
        access.add_shadow_pair(pair)
    access.add_shadow_pair(shadow_pair("mail"))
    third, second, first = access.shadow_pairs("triage")
    assert third.answer == third.input == third.request_id == "a\ufffdb\ufffd\ufffd\ufffdc\n🙂"
    for pair, kept in zip(given[:2], (first, second), strict=True):
        assert kept.id > 0
        assert (kept.to_json() | {"id": 0}) == pair.to_json()
    assert access.shadow_pairs("triage", limit=1) == [third]
    with pytest.raises(ConfigError, match="a limit of 0"):
        access.shadow_pairs("triage", limit=0)
    assert access.forget_shadow_pairs("triage", who="ann") == 3
    assert access.forget_shadow_pairs("triage", who="ann") == 0
    assert access.shadow_pairs("triage") == [] and len(access.shadow_pairs("mail")) == 1
    (entry,) = access.audit(action="shadow.forget")
    assert (entry.who, entry.subject, entry.details) == ("ann", "triage", {"pairs": 3})


def test_only_the_newest_pairs_are_kept(
    access: Access, registry: Registry, artefact: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreword.registry.usage.MAX_PAIRS", 3)
    for task in ("triage", "mail"):
        registry.publish(artefact(task))
    for number, task in itertools.product(range(5), ("triage", "mail")):
        access.add_shadow_pair(shadow_pair(task, request_id=str(number)))
    for task in ("triage", "mail"):
        assert [pair.request_id for pair in access.shadow_pairs(task)] == ["4", "3", "2"]


def test_pairs_from_many_threads(access: Access, registry: Registry, artefact: Factory, monkeypatch: Any) -> None:
    monkeypatch.setattr("foreword.registry.usage.MAX_PAIRS", 5)
    registry.publish(artefact())
    threads = [
        threading.Thread(target=lambda: [access.add_shadow_pair(shadow_pair()) for _ in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    access.add_shadow_pair(shadow_pair())
    assert len(access.shadow_pairs("triage")) == 5
