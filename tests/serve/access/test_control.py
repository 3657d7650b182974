"""The snapshot: how fresh it is, what a failing database does to it, and the clock."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

import pytest

from foreword.errors import Unavailable
from foreword.serve.access import control as control_module
from foreword.serve.access.control import Control
from tests.serve.fakes_access import START, FakeAccess, broken


class Clock:
    """Real time and the wall clock, apart."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.wall = 1.9e9

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds
        self.wall += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(control_module, "_monotonic", lambda: found.seconds)
    monkeypatch.setattr(time, "time", lambda: found.wall)
    return found


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_change_is_seen_and_told_once() -> None:
    access = FakeAccess()

    async def main() -> None:
        control = Control(access, poll_s=0.01)
        seen: list[tuple[int, int]] = []
        changed = asyncio.Event()
        control.on_change(lambda old, new: (seen.append((old.revision, new.revision)), changed.set()))
        await control.refresh()
        keeper = asyncio.create_task(control.keep_fresh())
        changed.clear()
        access.add_tenant("acme")
        await asyncio.wait_for(changed.wait(), 5)
        assert "acme" in control.snapshot.tenants
        assert seen == [(-1, 0), (0, 1)]
        assert access.num_snapshots == 2
        keeper.cancel()
        control.close()

    run(main())


def test_a_listener_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    access = FakeAccess()

    def fail(*snapshots: object) -> None:
        raise ZeroDivisionError("its value")

    async def main() -> None:
        control = Control(access, poll_s=0.001)
        ticks, changes = asyncio.Semaphore(0), asyncio.Semaphore(0)
        control.on_tick(fail)
        control.on_tick(ticks.release)
        control.on_change(fail)
        control.on_change(lambda old, new: changes.release())
        keeper = asyncio.create_task(control.keep_fresh())
        for number in range(3):
            access.add_tenant(f"tenant-{number}")
            await asyncio.wait_for(changes.acquire(), 5)
            await asyncio.wait_for(ticks.acquire(), 5)
        keeper.cancel()
        control.close()

    run(main())
    assert "a listener failed: ZeroDivisionError at" in caplog.text and "its value" not in caplog.text


def test_an_old_snapshot_is_read_again_though_nothing_changed(clock: Clock) -> None:
    access = FakeAccess()

    async def main() -> None:
        control = Control(access, refresh_s=30)
        for _ in range(3):
            await control.refresh()
        assert access.num_snapshots == 1
        clock.pass_by(31)
        await control.refresh()
        assert access.num_snapshots == 2
        control.close()

    run(main())


def test_a_failing_database_is_endured_for_a_while_and_no_longer(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    access = FakeAccess()
    access.add_tenant("acme")

    async def rounds(control: Control, count: int) -> None:
        ticks = asyncio.Semaphore(0)
        control.on_tick(ticks.release)
        keeper = asyncio.create_task(control.keep_fresh())
        for _ in range(count):
            await asyncio.wait_for(ticks.acquire(), 5)
        keeper.cancel()

    async def main() -> None:
        control = Control(access, poll_s=0.001, stale_s=60)
        with pytest.raises(Unavailable):
            control.fresh()
        await control.refresh()
        access.failure = broken()
        clock.pass_by(59)
        await rounds(control, 3)
        assert "acme" in control.fresh().tenants
        clock.pass_by(2)
        await rounds(control, 3)
        with pytest.raises(Unavailable, match="has not answered for more than 60 s"):
            control.fresh()
        access.failure, access.now = None, START + timedelta(seconds=61)
        await rounds(control, 3)
        assert "acme" in control.fresh().tenants
        control.close()

    with caplog.at_level(logging.WARNING, "foreword.serve"):
        run(main())
    assert [record.message for record in caplog.records] == [
        "the registry does not answer; what it said last is used: the registry's database failed: it is gone",
        "keys are refused: the registry has not answered for 60 s",
        "the registry answers again",
    ]


def test_a_database_that_hangs_is_one_that_fails(clock: Clock) -> None:
    access = FakeAccess()

    async def main() -> None:
        control = Control(access, poll_s=0.001, stale_s=60)
        await control.refresh()
        access.hangs.clear()
        keeper = asyncio.create_task(control.keep_fresh())
        await asyncio.sleep(0.01)
        clock.pass_by(61)
        with pytest.raises(Unavailable):
            control.fresh()
        access.hangs.set()
        keeper.cancel()
        control.close()

    run(main())


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_setting_the_wall_clock_changes_nothing(clock: Clock, jump_s: float) -> None:
    """The database is another machine's."""
    access = FakeAccess()

    async def main() -> None:
        control = Control(access, refresh_s=30)
        await control.refresh()
        clock.wall += jump_s
        clock.pass_by(31)
        access.now = START + timedelta(seconds=31)
        assert control.now() == START + timedelta(seconds=31)
        await control.refresh()
        assert control.now() == START + timedelta(seconds=31)
        control.close()

    run(main())


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_setting_the_wall_clock_changes_nothing_where_the_database_has_no_other(clock: Clock, jump_s: float) -> None:
    access = FakeAccess()

    async def main() -> None:
        control = Control(access, refresh_s=30)
        await control.refresh()
        clock.wall += jump_s
        for round in range(1, 4):
            clock.pass_by(31)
            access.now = START + timedelta(seconds=31 * round + jump_s)
            await control.refresh()
            assert control.now() == START + timedelta(seconds=31 * round)
        control.close()

    run(main())


def test_the_databases_clock_is_followed(clock: Clock) -> None:
    """This machine stood still for an hour, and nobody counted it."""
    access = FakeAccess()

    async def main() -> None:
        control = Control(access, refresh_s=30)
        await control.refresh()
        clock.pass_by(31)
        access.now = START + timedelta(hours=1)
        await control.refresh()
        assert control.now() == START + timedelta(hours=1)
        control.close()

    run(main())
