"""Copies for a candidate: after the answer, bounded, never in anybody's way; both answers kept."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from foreword.engine.request import Chunk, Request
from foreword.errors import ArtefactCorrupt
from foreword.registry.access_records import Route, ShadowPair
from foreword.serve.backend import ANYONE, Caller, Timings
from foreword.serve.versions.names import Names
from foreword.serve.versions.residents import Residents
from foreword.serve.versions.shadow import Copy, Shadows
from foreword.serve.watch.metrics import Metrics
from tests.serve.fakes import FakeBackend, FakeRegistry, FakeStream, overloaded, version

ROUTE = Route(task="triage", kind="shadow", number=2, fraction=1.0, salt="s", keep_inputs=False)
CALLER = Caller(scope="team-a", request_id="request-1")
SECRET = "my card number is 4711"


class Stage:
    """Shadows over fakes, in the running loop."""

    def __init__(self, **bounds: float) -> None:
        self.backend = FakeBackend()
        self.residents = Residents(self.backend, lambda version: Path(version.sha256), retry_s=0)
        self.metrics = Metrics(self.backend, self.residents)
        self.kept: list[ShadowPair] = []
        names = Names(FakeRegistry(version("triage", 1), version("triage", 2)), "base")
        self.shadows = Shadows(
            self.backend,
            names,
            self.residents,
            self.metrics,
            self.kept.append,
            **bounds,  # type: ignore[arg-type]
        )

    def offer(self, *, answer: str = "as before", route: Route = ROUTE, **fields: object) -> None:
        request = Request(**{"prompt": SECRET, "prefix": "sha-triage-1", **fields})  # type: ignore[arg-type]
        copy = Copy(route, version("triage", 1), request, CALLER)
        timings = Timings(submitted=10.0)
        for place, word in enumerate(answer.split(" ")):
            chunk = Chunk(index=0, text=(" " if place else "") + word, token_ids=(place,))
            timings.add(chunk, 11.0 + place)
            copy.add(chunk)
        self.shadows.offer(copy, timings)

    def outcomes(self) -> dict[str, float]:
        samples = [sample for family in self.metrics._shadow.collect() for sample in family.samples]
        return {found.labels["outcome"]: found.value for found in samples if found.name.endswith("_total")}

    async def done(self) -> None:
        """Wait for the end of all copies."""
        while self.shadows._workers:
            await asyncio.wait(self.shadows._workers, timeout=30)
        assert all(entry.leases == 0 for entry in self.residents._entries.values())
        assert self.backend.num_running == 0


class Gate(FakeBackend):
    """Streams that wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()
        self.most = 0

    async def submit(self, requests: Sequence[Request], caller: Caller = ANYONE) -> FakeStream:
        stream = await super().submit(requests, caller)
        self.most = max(self.most, self.num_running)
        return _Held(self, requests, stream)


class _Held(FakeStream):
    def __init__(self, backend: Gate, requests: Sequence[Request], stream: FakeStream) -> None:
        self.__dict__ = stream.__dict__

    async def __aiter__(self):  # type: ignore[no-untyped-def]
        await self.backend.event.wait()  # type: ignore[attr-defined]
        async for chunk in FakeStream.__aiter__(self):
            yield chunk


def test_both_answers_are_kept_with_their_times() -> None:
    async def main() -> None:
        stage = Stage()
        stage.backend.answers["sha-triage-2"] = ("as ", "before")
        stage.offer()
        await stage.done()
        stage.backend.answers["sha-triage-2"] = ("not ", "so")
        stage.offer(answer="as before")
        await stage.done()
        same, other = stage.kept
        assert (same.task, same.number, same.candidate, same.request_id) == ("triage", 1, 2, "request-1")
        assert (same.answer, same.candidate_answer, same.agrees) == ("as before", "as before", True)
        assert (other.answer, other.candidate_answer, other.agrees) == ("as before", "not so", False)
        assert same.seconds == 2.0 and 0 < same.candidate_seconds < 30
        assert stage.outcomes() == {"agreed": 1, "differed": 1}

    asyncio.run(main())


def test_the_candidate_is_asked_the_very_same() -> None:
    async def main() -> None:
        stage = Stage()
        asked: list[Caller] = []
        submit = stage.backend.submit

        async def note(requests: Sequence[Request], caller: Caller = ANYONE) -> FakeStream:
            asked.append(caller)
            return await submit(requests, caller)

        stage.backend.submit = note  # type: ignore[method-assign]
        stage.offer(temperature=0.7, seed=11, max_tokens=9, stop=("x",))
        await stage.done()
        (request,) = stage.backend.requests
        assert request == Request(
            prompt=SECRET, prefix="sha-triage-2", temperature=0.7, seed=11, max_tokens=9, stop=("x",)
        )
        assert asked == [CALLER]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, SECRET),
        ({"prompt": None, "prompt_ids": [1, 2]}, "[1, 2]"),
        ({"prompt": None, "messages": [{"role": "user", "content": "é"}]}, '[{"role": "user", "content": "é"}]'),
    ],
)
def test_inputs_are_kept_only_where_the_route_says_so(fields: dict[str, object], expected: str) -> None:
    async def main() -> None:
        stage = Stage()
        stage.offer(**fields)
        stage.offer(route=dataclasses.replace(ROUTE, keep_inputs=True), **fields)
        await stage.done()
        assert sorted((pair.input for pair in stage.kept), key=bool) == [None, expected]

    asyncio.run(main())


def test_tokens_of_copies_are_counted_apart() -> None:
    async def main() -> None:
        stage = Stage()
        stage.offer()
        await stage.done()
        samples = [sample for family in stage.metrics._shadow_tokens.collect() for sample in family.samples]
        found = {sample.labels["kind"]: sample.value for sample in samples if sample.name.endswith("_total")}
        assert found == {"prompt": 5, "completion": 4}

    asyncio.run(main())


def test_nothing_starts_while_others_wait_for_the_engine() -> None:
    async def main() -> None:
        stage = Stage()
        stage.backend.num_queued = 1
        stage.offer()
        await stage.done()
        stage.backend.num_queued = 0
        stage.backend.submit_error = overloaded()
        stage.offer()
        await stage.done()
        assert stage.outcomes() == {"dropped_busy": 2}
        assert stage.kept == [] and stage.backend.requests == []

    asyncio.run(main())


def test_few_run_some_wait_the_rest_is_dropped() -> None:
    async def main() -> None:
        stage = Stage(max_running=2, max_waiting=3)
        gate = stage.shadows.backend = Gate()
        stage.residents.backend = gate
        for _ in range(4):
            stage.offer()  # nothing has begun yet: three wait, one is too many
        while gate.num_running < 2:
            await asyncio.sleep(0)
        assert stage.shadows.num_waiting == 1
        for _ in range(4):
            stage.offer()
        assert stage.shadows.num_waiting == 3 and stage.outcomes() == {"dropped_full": 3}
        gate.event.set()
        await stage.done()
        assert gate.most == 2 and len(stage.kept) == 5

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["load", "submit", "engine", "dead", "version", "keep"])
def test_a_failing_candidate_harms_nobody(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        stage = Stage()
        route = ROUTE
        if fault == "load":
            stage.backend.load_errors = [ArtefactCorrupt("bad file")]
        elif fault == "submit":
            stage.backend.submit_error = ValueError(SECRET)
        elif fault == "engine":
            stage.backend.fail_after = 1
        elif fault == "dead":
            stage.backend.is_dead = True
        elif fault == "version":
            route = dataclasses.replace(ROUTE, number=9)
        else:
            stage.shadows.keep = lambda pair: [][0]
        stage.offer(route=route)
        await stage.done()
        assert stage.outcomes() == {"failed": 1} and stage.kept == []
        stage.backend.submit_error = stage.backend.fail_after = None
        stage.backend.is_dead = False
        stage.shadows.keep = stage.kept.append
        stage.offer()
        await stage.done()
        assert len(stage.kept) == 1

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
    assert "a shadow of triage@" in caplog.text
    assert SECRET not in caplog.text


def test_a_copy_that_hangs_is_given_up() -> None:
    async def main() -> None:
        stage = Stage(timeout_s=0.5)
        stage.shadows.backend = stage.residents.backend = stage.backend = Gate()
        stage.offer()
        await stage.done()
        assert stage.outcomes() == {"failed": 1} and stage.backend.num_aborted == 1

    asyncio.run(main())


def test_closing_ends_what_runs_and_gives_its_lease_back() -> None:
    async def main() -> None:
        stage = Stage(max_running=1)
        gate = stage.shadows.backend = stage.residents.backend = stage.backend = Gate()
        for _ in range(3):
            stage.offer()
        while gate.num_running < 1:
            await asyncio.sleep(0)
        started = time.monotonic()
        await stage.shadows.aclose()
        await stage.done()
        assert time.monotonic() - started < 5 and gate.num_aborted == 1
        assert stage.kept == [] and stage.shadows.num_waiting == 0
        stage.offer()
        assert stage.outcomes() == {"dropped_full": 1}

    asyncio.run(main())
