"""Faults 5, 7, 8 and 16: a version deleted under traffic; a gateway told to end, or killed; two gateways at once."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from foreword.core.compiled import load_compiled
from foreword.registry.access_records import Limits
from foreword.registry.usage import SILENT
from tests.faults.client import Answer, Asker, together, until
from tests.faults.engine import words
from tests.faults.stage import Database, EngineProcess, Gateway, Stage, database_url, staged, wait_until

pytestmark = pytest.mark.slow
BOTH = [pytest.param("sqlite"), pytest.param("postgresql", marks=pytest.mark.postgres)]
SYNC_S = 1.0
"""How often gateways tell each other what their tenants use."""


class Room:
    """One engine and two gateways, on one registry."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        for _ in range(2):
            stage.publish("triage")
        stage.registry.tag("triage@1", "prod")
        self.engine: EngineProcess = stage.engine()
        self.one, self.two = self.gateway(), self.gateway()

    def gateway(self, *options: str) -> Gateway:
        started: Gateway = self.stage.gateway(self.engine, options=options)
        return started

    def tenant(self, name: str, *tasks: str, **limits: int) -> str:
        """Create a tenant; return its key when both gateways know it."""
        key = self.stage.tenant(name, *(tasks or ("triage",)), limits=Limits(**limits))
        for gateway in (self.one, self.two):
            if gateway.popen.poll() is None:
                with gateway.client(key) as client:
                    wait_until(lambda client=client: client.get("/v1/models").status_code == 200)
        return key

    def text(self, reference: str, count: int) -> str:
        return words(count, self.stage.compiled[reference])


@pytest.fixture(scope="module", params=BOTH)
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    kind: Database = request.param
    with database_url(kind) as url, staged(tmp_path_factory.mktemp("gateways"), database_url=url) as stage:
        yield Room(stage)


def ask(gateway: Gateway, key: str, **body: Any) -> Answer:
    return together(gateway, key, lambda asker: asker.ask(**body))


def test_a_promotion_is_seen_by_the_other_gateway(room: Room) -> None:
    """Proves the revision that `Control` polls, and `Names.forget`: within a second the other one answers so, too."""
    key = room.tenant("mover")
    for target in (2, 1):
        with room.one.client(room.stage.admin) as admin:
            done = admin.post("/admin/v1/tasks/triage/promote", json={"version": target, "force": True})
        assert done.status_code == 200, done.text
        assert ask(room.one, key).version == f"triage@{target}"
        assert wait_until(lambda target=target: ask(room.two, key).version == f"triage@{target}") < 1.0


def test_both_gateways_send_a_user_the_same_way(room: Room) -> None:
    """Proves that a canary is decided by a salt of the registry, not by chance or by the gateway."""
    room.stage.registry.access.set_route("triage", "canary", "triage@2", 0.5)
    key = room.tenant("walker")
    wait_until(lambda: ask(room.one, key).headers.get("x-foreword-route"))

    async def routes(asker: Asker) -> list[tuple[str, str]]:
        answers = await asyncio.gather(*(asker.ask(user=f"user-{n}") for n in range(40)))
        assert {answer.status for answer in answers} == {200}
        return [(answer.headers["x-foreword-route"], answer.version) for answer in answers]

    try:
        wait_until(lambda: ask(room.two, key).headers.get("x-foreword-route"))
        first = together(room.one, key, routes)
        assert first == together(room.two, key, routes) == together(room.one, key, routes)
        assert set(first) == {("stable", "triage@1"), ("canary", "triage@2")}
        assert 8 <= Counter(first)[("canary", "triage@2")] <= 32  # 20 ± 4 standard deviations
    finally:
        room.stage.registry.access.clear_route("triage", "canary")


def test_limits_hold_on_both_together(room: Room) -> None:
    """Proves `sync_usage`: what one gateway lets through counts on the other a second later.

    Each gateway may let through, besides, what came there within the last exchange: two each, at four requests a
    second for both, and one more where an exchange comes late.
    """
    limit, pause_s = 12, 0.25
    key = room.tenant("hasty", requests_per_minute=limit)

    async def alternate(asker: Asker) -> list[Answer]:
        other = Asker(room.two, key, asker.session)
        answers = []
        for turn in range(28):
            answers.append(await (asker, other)[turn % 2].ask())
            await asyncio.sleep(pause_s)
        return answers

    answers = together(room.one, key, alternate)
    taken = Counter(answer.status for answer in answers)
    assert taken.keys() == {200, 429}
    assert limit <= taken[200] <= limit + 2 * (SYNC_S / pause_s / 2 + 1)
    assert {answer.status for answer in answers[-6:]} == {429}
    refused = answers[-1]
    assert refused.error is not None and "requests_per_minute" in refused.error["message"]
    assert int(refused.headers["retry-after"]) <= 60


@pytest.mark.parametrize("room", BOTH[1:], indirect=True)
def test_a_killed_gateways_use_counts_no_more(room: Room) -> None:
    """Proves the time limit of usage rows: who is killed gives nothing back, and yet its requests stop counting."""
    key = room.tenant("holder", concurrent=4)
    aborted = room.engine.told(interval_s=0.05)["aborted"]
    third = room.gateway()

    async def fill(asker: Asker) -> None:
        await asker.streams(3, max_tokens=2000)
        on_one = Asker(room.one, key, asker.session)
        await asyncio.sleep(2 * SYNC_S)
        assert [(await on_one.ask()).status for _ in range(2)] == [200, 200]
        begun = await on_one.streams(1, max_tokens=2000)
        assert (await on_one.ask()).status == 429  # three there, one here
        third.kill()
        begun[0][1].cancel()

    together(third, key, fill)
    wait_until(lambda: room.engine.told()["aborted"] >= aborted + 4)
    room.engine.told(interval_s=0.005)

    async def four(asker: Asker) -> list[int]:
        return [answer.status for answer in await asyncio.gather(*(asker.ask(max_tokens=50) for _ in range(4)))]

    took = wait_until(lambda: together(room.one, key, four) == [200] * 4, SILENT.total_seconds() + 2 * SYNC_S + 3)
    assert took > 1


@pytest.mark.parametrize("room", ["sqlite"], indirect=True)
def test_a_version_deleted_under_traffic(room: Room) -> None:
    """Proves that a lease outlives its version's row and blob: open answers end whole, later ones are 404."""
    version = room.stage.publish("doomed")
    key = room.tenant("watcher", "doomed", "triage")
    wait_until(lambda: ask(room.one, key, model="doomed").status == 200)
    room.engine.told(interval_s=0.02)

    async def delete(asker: Asker) -> tuple[list[Answer], list[Answer]]:
        begun = await asker.streams(5, model="doomed", max_tokens=150)
        begun += [asker.begin(model=version.reference, max_tokens=150) for _ in range(2)]
        await asyncio.sleep(0.2)
        room.stage.registry.delete(version.reference)
        assert room.stage.registry.gc(0).num_blobs >= 1
        await asyncio.sleep(1.0)
        assert not any(task.done() for _, task in begun)
        late = [await asker.ask(model=name) for name in ("doomed", version.reference, f"sha256:{version.sha256}")]
        late.append(await asker.ask(model="triage"))
        return [await task for _, task in begun], late

    open_, late = together(room.one, key, delete)
    room.engine.told(interval_s=0.005)
    for answer in open_:
        assert (answer.status, answer.is_whole, answer.text) == (200, True, room.text(version.reference, 150))
    assert [answer.status for answer in late] == [404, 404, 404, 200]


@pytest.mark.parametrize("room", ["sqlite"], indirect=True)
def test_a_gateway_killed_while_it_has_a_version_compiled(room: Room) -> None:
    """Proves that a compiled file is named when it is whole: nothing half done is served, another gateway does it."""
    version = room.stage.publish("fresh", compiled=False)
    key = room.tenant("early", "fresh")
    third = room.gateway()

    async def kill(asker: Asker) -> Answer:
        _, task = asker.begin(model="fresh")
        await asyncio.sleep(0.5)
        third.kill()
        return await task

    before = len(room.engine.seen)
    assert together(third, key, kill).broken
    assert room.stage.registry.compiled(version.sha256, "float32") is None and len(room.engine.seen) == before
    answer = ask(room.one, key, model="fresh", max_tokens=3)
    blob = room.stage.registry.compiled(version.sha256, "float32")
    assert blob is not None and (answer.status, answer.text) == (200, words(3, blob.sha256))
    header, _ = load_compiled(room.stage.registry.blobs.fetch(blob.sha256), sha256=blob.sha256)
    assert header.source == version.sha256


class Balancer:
    """A load balancer as there are many: asks each gateway's /ready, and sends to one that says yes."""

    def __init__(self, *gateways: Gateway) -> None:
        self.gateways = list(gateways)
        self.ready = list(gateways)
        self.unready: dict[str, int] = {}

    async def keep_asking(self) -> None:
        async with httpx.AsyncClient(timeout=2, verify=False) as client:
            while True:
                for gateway in self.gateways:
                    try:
                        answer = await client.get(f"{gateway.url}/ready")
                    except httpx.HTTPError:
                        continue
                    if answer.status_code != 200 and gateway in self.ready:
                        self.ready.remove(gateway)
                        self.unready[gateway.url] = answer.status_code
                await asyncio.sleep(0.1)


def listens(gateway: Gateway) -> bool:
    try:
        socket.create_connection(("127.0.0.1", gateway.port)).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize("room", ["sqlite"], indirect=True)
def test_a_gateway_told_to_end_loses_nothing(room: Room) -> None:
    """Proves the drain: /ready says no first, then the port closes, every open answer ends whole, the status is 0."""
    key = room.tenant("steady")
    leaving = room.gateway("--notice", "2", "--drain", "20")
    balancer = Balancer(leaving, room.two)
    room.engine.told(interval_s=0.1)  # of a long answer twenty seconds

    async def leave(asker: Asker) -> tuple[list[Answer], list[tuple[str, Answer]]]:
        watch = asyncio.create_task(balancer.keep_asking())
        begun = await asker.streams(20, max_tokens=200)
        begun += [asker.begin(max_tokens=200) for _ in range(5)]
        over, short = asyncio.Event(), []

        async def keep_sending() -> None:
            while not over.is_set():
                target = balancer.ready[0].url
                short.append((target, await Asker(target, key, asker.session).ask(max_tokens=2)))

        def enough(gateway: Gateway) -> bool:
            return sum(url == gateway.url for url, _ in short) > 10

        senders = [asyncio.create_task(keep_sending()) for _ in range(4)]
        await until(lambda: enough(leaving))
        leaving.send(signal.SIGTERM)
        await until(lambda: enough(room.two))
        await until(lambda: not listens(leaving))
        over.set()
        await asyncio.gather(*senders)
        watch.cancel()
        assert not any(task.done() for _, task in begun)
        room.engine.told(interval_s=0.005)
        return [await task for _, task in begun], short

    long, short = together(leaving, key, leave)
    assert balancer.unready == {leaving.url: 503}
    for answer in long:
        assert (answer.status, answer.is_whole, answer.text) == (200, True, room.text("triage@1", 200)), answer
    assert {(answer.status, answer.is_whole, answer.broken) for _, answer in short} == {(200, True, "")}
    started = time.monotonic()
    assert leaving.wait() == 0 and time.monotonic() - started < 5
    assert "Traceback" not in leaving.errors()
