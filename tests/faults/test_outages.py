"""Faults 3 and 4: the database goes and comes back under traffic; the blob store goes, and comes back."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from moto.server import ThreadedMotoServer

from foreword.registry.records import Version
from tests.faults.client import Answer, Asker, together
from tests.faults.stage import Gateway, Stage, database_url, staged, wait_until

pytestmark = pytest.mark.slow
TASKS = ("triage", "other")
TWEAK = "from foreword.serve import gateway; gateway.NAMES_TTL_S = 0.3"
"""Names are asked for all the time, so that the outage is felt at once."""


@pytest.mark.postgres
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
def test_the_database_goes_and_comes_back_under_traffic(tmp_path: Path, end: signal.Signals) -> None:
    """Proves that names, keys and grants are answered from memory while the database is away (`Names`, `Control`),
    that connections are made anew, and that admins hear what is wrong."""
    from tests.registry.postgres import server

    with database_url("postgresql") as url, staged(tmp_path, database_url=url) as stage:
        for task in TASKS:
            stage.publish(task)
        gateway = stage.gateway(stage.engine(), tweak=TWEAK)
        key = stage.tenant("acme", *TASKS)
        for task in TASKS:
            wait_until(lambda task=task: _one(gateway, key, task).status == 200)

        async def restart(asker: Asker) -> tuple[list[Answer], list[httpx.Response]]:
            traffic = asyncio.create_task(_traffic(asker, over := asyncio.Event()))
            await asyncio.sleep(0.5)
            await asyncio.to_thread(server().stop, by=end)
            try:
                refused = [await asyncio.to_thread(_create, gateway, stage.admin, f"late{n}") for n in range(2)]
                await asyncio.sleep(2.0)
            finally:
                server().start()  # in this thread: the server ends with the thread that started it
            await asyncio.sleep(1.5)
            over.set()
            return await traffic, refused

        answers, refused = together(gateway, key, restart)
        assert len(answers) > 100 and {answer.status for answer in answers} == {200}, _odd(answers)
        assert max(answer.seconds for answer in answers) < 2
        for response in refused:
            error = response.json()["error"]
            assert response.status_code == 503 and error["code"] == "unavailable" and "registry" in error["message"]
            assert response.elapsed.total_seconds() < 10
            assert stage.database_url.split("@")[0].rpartition(":")[2] not in response.text  # the password
        assert _create(gateway, stage.admin, "later").status_code == 200
        created = {tenant.name for tenant in stage.registry.access.tenants()}
        assert created == {"acme", "later"}
        stage.registry.access.revoke_key(key[:13])
        assert wait_until(lambda: _one(gateway, key, "triage").status == 401) < 1.5
        assert "Traceback" not in gateway.errors()


async def _traffic(asker: Asker, over: asyncio.Event) -> list[Answer]:
    """Ask for both tasks, two at a time for each, until `over`."""

    async def keep_asking(task: str) -> list[Answer]:
        answers = []
        while not over.is_set():
            answers.append(await asker.ask(model=task))
            await asyncio.sleep(0.05)
        return answers

    found = await asyncio.gather(*(keep_asking(task) for task in TASKS * 2))
    return [answer for each in found for answer in each]


def _one(gateway: Gateway, key: str, task: str) -> Answer:
    return together(gateway, key, lambda asker: asker.ask(model=task))


def _create(gateway: Gateway, admin: str, name: str) -> httpx.Response:
    with gateway.client(admin) as client:
        return client.post("/admin/v1/tenants", json={"name": name})


def _odd(answers: list[Answer]) -> list[object]:
    return [(answer.status, answer.error, answer.broken) for answer in answers if answer.status != 200][:3]


class Store:
    """A blob store that can be taken away."""

    def __init__(self, stage: Stage, take: Callable[[], None], give: Callable[[], None]) -> None:
        self.stage = stage
        self.take = take
        self.give = give


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    if request.param == "folder":
        with staged(tmp_path) as stage:
            blobs, away = stage.home / "blobs", stage.home / "blobs.away"
            yield Store(stage, lambda: _move(blobs, away), lambda: _move(away, blobs))
        return
    from tests.registry.s3 import CREDENTIALS

    server = _moto(0)
    host, port = server.get_host_and_port()
    variables = {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    httpx.put(f"http://{host}:{port}/outage", verify=False)
    servers = [server]
    try:
        with staged(tmp_path, blob_url="s3://outage/blobs", environment=variables) as stage:
            yield Store(stage, servers[0].stop, lambda: servers.append(_moto(port)))
    finally:
        servers[-1].stop()


def _move(source: Path, target: Path) -> None:
    source.rename(target)


def _moto(port: int) -> ThreadedMotoServer:
    """Start an S3 server; what it stores lives in this process, so that a later one on the port has it still."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    return server


def _forget(stage: Stage, version: Version) -> None:
    """Remove what this machine has fetched of a version."""
    shutil.rmtree(stage.home / "cache" / version.sha256[:2], ignore_errors=True)


def test_the_blob_store_goes_and_comes_back(store: Store) -> None:
    """Proves that what is loaded needs no store, that a version that cannot be fetched fails alone and is not kept as
    failed, and that it is told as what it is."""
    stage = store.stage
    known, new = stage.publish("triage"), stage.publish("other")
    _forget(stage, new)
    gateway = stage.gateway(stage.engine())
    key = stage.tenant("acme", *TASKS)
    wait_until(lambda: _one(gateway, key, "triage").status == 200)
    store.take()
    try:
        for _ in range(3):

            async def both(asker: Asker) -> tuple[Answer, list[Answer]]:
                _, failing = asker.begin(model="other")
                fine = [await asker.ask(model="triage") for _ in range(10)]
                return await failing, fine

            failed, fine = together(gateway, key, both)
            assert {answer.status for answer in fine} == {200} and max(answer.seconds for answer in fine) < 2
            assert {answer.version for answer in fine} == {known.reference}
            assert failed.status >= 500 and failed.error is not None and failed.seconds < 10
            assert "blob" in failed.error["message"] or "fetch" in failed.error["message"], failed.error
            assert failed.tokens == 0
    finally:
        store.give()
    answer = Answer()

    def is_back() -> bool:
        nonlocal answer
        answer = _one(gateway, key, "other")
        return answer.status == 200

    assert wait_until(is_back) < 5
    assert answer.version == new.reference and answer.text.startswith(stage.compiled[new.reference][:12])
