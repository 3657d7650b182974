"""Residency: one load for all who wait, failures that pass, bounds that never touch what is in use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from foreword.errors import ArtefactCorrupt, BackendFailed, ForewordError, Overloaded
from foreword.serve.versions.names import Names
from foreword.serve.versions.residents import Residents, keep_loaded, keep_swept
from tests.serve.fakes import FakeBackend, FakeRegistry, version

A, B, C = version("a", 1), version("b", 1), version("c", 1)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def residents(backend: FakeBackend, **options: Any) -> Residents:
    return Residents(backend, FakeRegistry(A, B, C).path, **options)


def test_one_load_however_many_wait() -> None:
    async def main() -> None:
        backend = FakeBackend(load_s=0.02)
        held = residents(backend)
        leases = await asyncio.gather(*(held.acquire(A) for _ in range(20)))
        assert backend.log == ["load sha-a-1"]
        assert (held.num_resident, held.num_bytes, held.counts.num_loads) == (1, 1000, 1)
        for lease in leases:
            lease.release()
            lease.release()  # which changes nothing
        assert A.sha256 in held

    run(main())


def test_a_failure_reaches_all_who_wait_and_is_tried_again_later() -> None:
    async def main() -> None:
        backend = FakeBackend(load_s=0.02, load_errors=[ArtefactCorrupt("bad file")])
        held = residents(backend, retry_s=0.5)
        found = await asyncio.gather(*(held.acquire(A) for _ in range(5)), held.acquire(B), return_exceptions=True)
        assert [type(item).__name__ for item in found] == ["ArtefactCorrupt"] * 5 + ["Lease"]
        with pytest.raises(ArtefactCorrupt):
            await held.acquire(A)
        assert backend.log == ["load sha-a-1", "load sha-b-1"]  # not read again so soon
        await asyncio.sleep(0.6)
        (await held.acquire(A)).release()
        assert held.counts.failures == {"ArtefactCorrupt": 1}

    run(main())


def test_an_unexpected_failure_is_named_by_class_only() -> None:
    async def main() -> None:
        held = residents(FakeBackend(load_errors=[RuntimeError("internal detail")]))
        for _ in range(2):
            with pytest.raises(BackendFailed, match="a@1 cannot be loaded: RuntimeError"):
                await held.acquire(A)
        assert held.num_resident == 0 and A.sha256 not in held

    run(main())


def test_a_lost_blob_fails_its_version_only() -> None:
    async def main() -> None:
        registry = FakeRegistry(A, B)
        registry.lost.add(A.sha256)
        held = Residents(FakeBackend(), registry.path)
        with pytest.raises(ForewordError, match="the blob of a@1 is gone"):
            await held.acquire(A)
        await held.acquire(B)

    run(main())


def test_the_longest_idle_makes_room() -> None:
    async def main() -> None:
        backend = FakeBackend()
        held = residents(backend, max_versions=2)
        for item in (A, B, A):
            (await held.acquire(item)).release()
        await held.acquire(C)
        assert backend.log == ["load sha-a-1", "load sha-b-1", "unload sha-b-1", "load sha-c-1"]
        assert held.counts.num_unloads == 1

    run(main())


def test_what_is_in_use_stays() -> None:
    async def main() -> None:
        backend = FakeBackend()
        held = residents(backend, max_versions=2)
        a, _ = await held.acquire(A), await held.acquire(B)
        with pytest.raises(Overloaded, match="2 versions are resident, and all are in use"):
            await held.acquire(C)
        a.release()
        await held.acquire(C)
        assert backend.loaded == ["sha-b-1", "sha-c-1"]

    run(main())


def test_bytes_are_bounded() -> None:
    async def main() -> None:
        backend = FakeBackend(num_bytes=600)
        held = residents(backend, max_bytes=1000)
        a = await held.acquire(A)
        with pytest.raises(Overloaded, match="need 1200 bytes, 1000 are allowed"):
            await held.acquire(B)
        assert backend.loaded == ["sha-a-1"]
        a.release()
        await held.acquire(B)
        assert (backend.loaded, held.num_bytes) == (["sha-b-1"], 600)

    run(main())


def test_a_full_backend_is_given_room() -> None:
    async def main() -> None:
        backend = FakeBackend()
        held = residents(backend)
        (await held.acquire(A)).release()
        backend.load_errors = [Overloaded("no room")]
        await held.acquire(B)
        assert backend.log == ["load sha-a-1", "load sha-b-1", "unload sha-a-1", "load sha-b-1"]
        backend.load_errors = [Overloaded("no room")] * 2
        for _ in range(2):  # and is asked each time
            with pytest.raises(Overloaded, match="no room"):
                await held.acquire(C)

    run(main())


def test_a_version_asked_for_while_it_is_unloaded_is_loaded_again() -> None:
    async def main() -> None:
        backend = FakeBackend(load_s=0.03)
        held = residents(backend, idle_s=0.0)
        (await held.acquire(A)).release()
        sweep = asyncio.create_task(held.sweep())
        await asyncio.sleep(0.01)
        await held.acquire(A)
        await sweep
        assert backend.log == ["load sha-a-1", "unload sha-a-1", "load sha-a-1"]
        assert backend.loaded == ["sha-a-1"]

    run(main())


def test_waiters_that_go_away_leave_an_idle_version() -> None:
    async def main() -> None:
        backend = FakeBackend(load_s=0.03)
        held = residents(backend, max_versions=1)
        waiting = asyncio.create_task(held.acquire(A))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await until(lambda: held.num_resident == 1)
        await held.acquire(B)
        assert backend.loaded == ["sha-b-1"]

    run(main())


def test_idle_versions_are_swept() -> None:
    async def main() -> None:
        backend = FakeBackend()
        held = residents(backend, idle_s=0.02)
        sweeper = asyncio.create_task(keep_swept(held, 0.01))
        used = await held.acquire(A)
        (await held.acquire(B)).release()
        await until(lambda: backend.loaded == ["sha-a-1"])
        used.release()
        await until(lambda: backend.loaded == [])
        sweeper.cancel()

    run(main())


def test_a_preloaded_name_follows_promotions(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        registry = FakeRegistry(version("t", 1), version("t", 2), version("t", 3))
        registry.moved["t@prod"] = 1
        backend = FakeBackend()
        names = Names(registry, "base", ttl_s=0.01)
        held = Residents(backend, registry.path, idle_s=0.0, retry_s=0.02)
        lease = await held.acquire((await names.resolve("t")).version or A)
        follower = asyncio.create_task(keep_loaded(lease, "t", names, held, 0.01))
        await held.sweep()
        assert backend.loaded == ["sha-t-1"]  # it is held
        registry.moved["t@prod"] = 2
        await until(lambda: "sha-t-2" in backend.loaded)
        await held.sweep()
        assert backend.loaded == ["sha-t-2"]
        backend.load_errors = [ArtefactCorrupt("bad file")] * 1000
        registry.moved["t@prod"] = 3
        await until(lambda: backend.log.count("load sha-t-3") > 2)
        await held.sweep()
        assert backend.loaded == ["sha-t-2"]  # until the new one can be loaded
        backend.load_errors = []
        await until(lambda: "sha-t-3" in backend.loaded)
        follower.cancel()

    run(main())
    assert "preloaded t cannot follow the registry: bad file" in caplog.text
