"""Fault 9: the gateway's wall clock jumps by hours, forwards and back. Nothing that it measures or grants moves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest

from foreword.registry.access_records import Limits
from tests.faults.client import Answer, Asker, together, until
from tests.faults.stage import Database, Stage, database_url, staged, wait_until

pytestmark = pytest.mark.slow
HOURS = 5
BOTH = [pytest.param("sqlite"), pytest.param("postgresql", marks=pytest.mark.postgres)]


JUMPY = """
import datetime, time
from pathlib import Path
file, wall, real = Path(FILE), time.time, datetime.datetime
def jumped():
    return wall() + float(file.read_text())
time.time, time.time_ns = jumped, lambda: int(jumped() * 10**9)
class Kind(type):
    def __instancecheck__(cls, thing):
        return isinstance(thing, real)
class Jumpy(real, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return real.fromtimestamp(jumped(), tz)
datetime.datetime = Jumpy
"""
"""A wall clock that is off by the seconds in a file, for all that Python runs. libfaketime would be nearer to the
kernel's, but it moves timed waits too, which a clock that is set leaves alone."""


class Room:
    """A gateway whose wall clock is set by a file; that of the database and of this process stay right."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        stage.publish()
        stage.publish()
        stage.registry.tag("triage@1", "prod")
        self.engine = stage.engine()
        self.file = stage.folder / "clock"
        self.set(0)
        self.gateway = stage.gateway(self.engine, tweak=JUMPY.replace("FILE", repr(str(self.file))))

    def set(self, hours: float) -> None:
        """Set the gateway's clock to this many hours from now."""
        draft = self.file.with_suffix(".draft")
        draft.write_text(f"{hours * 3600}")
        os.replace(draft, self.file)

    def ask(self, key: str) -> Answer:
        return together(self.gateway, key, lambda asker: asker.ask())

    def jumped(self, hours: float) -> bool:
        """Return whether the gateway's own clock, as its answers' dates show it, stands there."""
        shown = parsedate_to_datetime(httpx.get(f"{self.gateway.url}/health", verify=False).headers["date"])
        return abs(shown - datetime.now(UTC) - timedelta(hours=hours)) < timedelta(minutes=1)


@pytest.fixture(params=BOTH)
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Room]:
    kind: Database = request.param
    with database_url(kind) as url, staged(tmp_path, database_url=url) as stage:
        yield Room(stage)


def test_a_clock_that_jumps(room: Room) -> None:
    """Proves that limits, timeouts and lifetimes of answers go by monotonic clocks, and expiry by the database's clock;
    and where that is this host's (SQLite), that `_Clock` tells a jump from time that went by."""
    stage, now = room.stage, datetime.now(UTC)
    lasting = stage.tenant("lasting", "triage")
    in_an_hour = stage.tenant("hour", "triage", expires=now + timedelta(hours=1))
    limited = stage.tenant("limited", "triage", limits=Limits(requests_per_minute=4))
    soon = stage.tenant("soon", "triage", expires=now + timedelta(seconds=12))
    for key in (lasting, in_an_hour, soon):
        wait_until(lambda key=key: room.ask(key).status == 200)
    assert [room.ask(limited).status for _ in range(5)] == [200, 200, 200, 200, 429]
    room.engine.told(interval_s=0.05)

    async def jump(asker: Asker) -> list[Answer]:
        begun = await asker.streams(3, max_tokens=200)
        for hours in (HOURS, -HOURS, 0, HOURS):
            await asyncio.to_thread(room.set, hours)
            await until(lambda hours=hours: room.jumped(hours))
            await asyncio.sleep(0.5)
            answers = {name: await Asker(room.gateway, key, asker.session).ask(max_tokens=2) for name, key in keys}
            assert {name: answer.status for name, answer in answers.items()} == {
                "lasting": 200,
                "hour": 200,  # not expired by a jump forwards
                "limited": 429,  # no new minute
            }
            assert 0 < int(answers["limited"].headers["retry-after"]) <= 60
        return [await task for _, task in begun]

    keys = (("lasting", lasting), ("hour", in_an_hour), ("limited", limited))
    for answer in together(room.gateway, lasting, jump):
        assert (answer.status, answer.is_whole, answer.tokens) == (200, True, 200)
    room.engine.told(interval_s=0.005)
    wait_until(lambda: datetime.now(UTC) > now + timedelta(seconds=13))
    assert room.ask(soon).status == 401
    for hours in (-HOURS, HOURS):
        room.set(hours)
        wait_until(lambda hours=hours: room.jumped(hours))
        assert room.ask(soon).status == 401  # no clock brings it back
        for number in (2, 1):
            stage.registry.tag(f"triage@{number}", "prod")
            assert wait_until(lambda number=number: room.ask(lasting).version == f"triage@{number}") < 1.0
    stage.registry.access.revoke_key(lasting[:13])
    assert wait_until(lambda: room.ask(lasting).status == 401) < 1.5
    assert "Traceback" not in room.gateway.errors()
