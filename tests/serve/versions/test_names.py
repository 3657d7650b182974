"""Model names: what they stand for, how fresh that is, what it costs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from foreword.errors import Conflict, NotFound, RegistryError, Unavailable
from foreword.registry.records import Version
from foreword.serve.versions import names as names_module
from foreword.serve.versions.names import Names
from tests.serve.fakes import FINGERPRINT, OTHER_BASE, FakeRegistry, version


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def test_task_alias_number_and_base() -> None:
    registry = FakeRegistry(version("triage", 1), version("triage", 2), version("clause", 1))
    registry.moved["triage@canary"] = 1

    async def main() -> None:
        names = Names(registry, "base-3m")
        found = {name: await names.resolve(name) for name in ("triage", "triage@canary", "triage@1", "base-3m")}
        assert [target.prefix for target in found.values()] == ["sha-triage-2", "sha-triage-1", "sha-triage-1", None]
        assert found["triage"].headers == {"x-foreword-version": "triage@2", "x-foreword-digest": "sha-triage-2"}
        assert found["base-3m"].headers == {} and found["base-3m"].labels == ("base-3m", "")
        with pytest.raises(NotFound, match="Did you mean triage") as caught:
            await names.resolve("triag")
        assert "The base is base-3m." in caught.value.hint
        with pytest.raises(NotFound):
            await names.resolve("base-3m@1")

    run(main())


def test_a_move_is_seen_after_the_ttl_and_queries_are_shared() -> None:
    registry = FakeRegistry(version("triage", 1), version("triage", 2))

    async def main() -> None:
        names = Names(registry, "base", ttl_s=0.5)
        await asyncio.gather(*(names.resolve("triage") for _ in range(50)))
        assert registry.num_queries == 1
        registry.moved["triage@prod"] = 1
        await asyncio.sleep(0.6)
        assert (await names.resolve("triage")).prefix == "sha-triage-1"
        assert registry.num_queries == 2

    run(main())


def test_a_failure_is_not_kept() -> None:
    registry = FakeRegistry(version("triage", 1))

    async def main() -> None:
        names = Names(registry, "base", ttl_s=60)
        registry.failure = RegistryError("the database is locked")
        with pytest.raises(Unavailable, match="cannot be asked what"):
            await names.resolve("triage")
        assert (await names.resolve("base")).prefix is None  # which needs no registry
        registry.failure = None
        assert (await names.resolve("triage")).prefix == "sha-triage-1"
        with pytest.raises(NotFound):
            await names.resolve("later")
        registry.known["later@1"] = version("later", 1)
        assert (await names.resolve("later")).prefix == "sha-later-1"

    run(main())


def test_a_task_of_the_bases_name_is_refused_not_shadowed() -> None:
    async def main() -> None:
        with pytest.raises(Conflict, match="names the base and the task of base@1"):
            await Names(FakeRegistry(version("base", 1)), "base").resolve("base")

    run(main())


def test_a_waiter_that_goes_away_takes_no_other_with_it() -> None:
    async def main() -> None:
        names = Names(FakeRegistry(version("triage", 1)), "base")
        first = asyncio.create_task(names.resolve("triage"))
        await asyncio.sleep(0)
        first.cancel()
        assert (await names.resolve("triage")).prefix == "sha-triage-1"

    run(main())


def test_list_names_what_this_base_serves() -> None:
    registry = FakeRegistry(version("triage", 1), version("triage", 2), version("foreign", 1, base=OTHER_BASE))
    registry.moved["triage@canary"] = 1
    registry.moved["foreign@prod"] = 1

    async def main() -> None:
        listed = await Names(registry, "base").listed(FINGERPRINT)
        assert [target.name for target in listed] == ["base", "triage", "triage@canary"]

    run(main())


def test_what_was_answered_before_stays_in_use_while_the_registry_fails(caplog: pytest.LogCaptureFixture) -> None:
    registry = FakeRegistry(version("triage", 1))

    async def main() -> None:
        names = Names(registry, "base", ttl_s=0.001, stale_s=60)
        await names.resolve("triage")
        for failure in (RegistryError("the database is locked"), OSError("gone")):
            registry.failure = failure  # type: ignore[assignment]
            for _ in range(3):
                await asyncio.sleep(0.002)
                assert (await names.resolve("triage")).prefix == "sha-triage-1"
            with pytest.raises(Unavailable):
                await names.resolve("clause")
        names.stale_s = 0
        await asyncio.sleep(0.002)
        with pytest.raises(Unavailable):
            await names.resolve("triage")
        registry.failure = None
        assert (await names.resolve("triage")).prefix == "sha-triage-1"

    with caplog.at_level("WARNING", "foreword.serve"):
        run(main())
    assert [record.message for record in caplog.records] == [
        "the registry resolves no names: the database is locked",
        "the registry resolves names again",
    ]


def test_a_registry_that_hangs_holds_up_only_names_that_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_module, "PATIENCE_S", 0.02)
    monkeypatch.setattr(names_module, "TIMEOUT_S", 0.1)
    registry, hangs = FakeRegistry(version("triage", 1), version("clause", 1)), threading.Event()
    answer = registry.resolve

    def resolve(reference: str) -> Version:
        assert hangs.wait(10)
        return answer(reference)

    async def main() -> None:
        names = Names(registry, "base", ttl_s=0.001)
        hangs.set()
        await names.resolve("triage")
        hangs.clear()
        await asyncio.sleep(0.002)
        for _ in range(3):
            assert (await names.resolve("triage")).prefix == "sha-triage-1"
        with pytest.raises(Unavailable, match="has not said within"):
            await names.resolve("clause")
        hangs.set()
        assert (await names.resolve("clause")).prefix == "sha-clause-1"

    registry.resolve = resolve  # type: ignore[method-assign]
    run(main())


def test_a_change_is_seen_at_once_where_it_is_told() -> None:
    registry = FakeRegistry(version("triage", 1), version("triage", 2))

    async def main() -> None:
        names = Names(registry, "base", ttl_s=60)
        assert (await names.resolve("triage")).prefix == "sha-triage-2"
        assert len(await names.listed(FINGERPRINT)) == 2
        registry.moved |= {"triage@prod": 1, "triage@canary": 2}
        assert (await names.resolve("triage")).prefix == "sha-triage-2"
        names.forget()
        assert (await names.resolve("triage")).prefix == "sha-triage-1"
        assert len(await names.listed(FINGERPRINT)) == 4

    run(main())


def test_an_answer_from_before_a_change_is_not_kept() -> None:
    registry = FakeRegistry(version("triage", 1), version("triage", 2))
    asked, goes_on = threading.Event(), threading.Event()
    answer = registry.resolve

    def resolve(reference: str) -> Version:
        found = answer(reference)
        asked.set()
        assert goes_on.wait(10)
        return found

    async def main() -> None:
        names = Names(registry, "base", ttl_s=60)
        first = asyncio.create_task(names.resolve("triage"))
        await asyncio.to_thread(asked.wait, 10)
        registry.moved["triage@prod"] = 1
        names.forget()
        goes_on.set()
        assert (await first).prefix == "sha-triage-2"
        assert (await names.resolve("triage")).prefix == "sha-triage-1"

    registry.resolve = resolve  # type: ignore[method-assign]
    run(main())


def test_names_that_fail_leave_nothing_behind() -> None:
    async def main() -> None:
        names = Names(FakeRegistry(version("triage", 1)), "base")
        for number in range(20):
            with pytest.raises(NotFound):
                await names.resolve(f"guess-{number}")
        assert names._known == {}

    run(main())
