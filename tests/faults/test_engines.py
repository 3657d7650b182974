"""Faults 1 and 2: an engine is killed in the middle of its answers, or hangs; another one takes what it can."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator

import pytest

from foreword.registry.access_records import Limits
from foreword.registry.records import Version
from tests.faults.client import Answer, Asker, together, until
from tests.faults.engine import words
from tests.faults.stage import EngineProcess, Gateway, Stage, staged, wait_until

pytestmark = pytest.mark.slow
CONCURRENT = 8


class Pair:
    """A gateway before two engines, one of which is `first` for the task."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.version: Version = stage.publish()
        engines = stage.engine(), stage.engine()
        self.gateway: Gateway = stage.gateway(*engines)
        self.key = stage.tenant("acme", "triage", limits=Limits(concurrent=CONCURRENT))
        wait_until(lambda: self.one().status == 200)
        self.first, self.second = sorted(engines, key=lambda engine: -len(engine.seen))
        assert self.first.seen and not self.second.seen

    def one(self) -> Answer:
        return together(self.gateway, self.key, lambda asker: asker.ask())

    def text(self, count: int) -> str:
        return words(count, self.stage.compiled[self.version.reference])

    def state(self, engine: EngineProcess, state: str) -> bool:
        found = self.gateway.metric(self.stage.admin, "foreword_replica_state", replica=engine.url, state=state)
        return found == 1

    def inflight(self) -> float:
        return self.gateway.metric(self.stage.admin, "foreword_replica_inflight")

    def tokens(self) -> float:
        return self.gateway.metric(self.stage.admin, "foreword_completion_tokens_total", tenant="acme")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with staged(tmp_path_factory.mktemp("engines")) as stage:
        yield Pair(stage)


def test_an_engine_killed_in_the_middle_of_its_answers(pair: Pair) -> None:
    """Proves: an error event where a stream has begun, 502 where a whole answer has, the other engine where no token
    has come; the place given back; the engine left alone while it is gone, and asked again when it is back."""

    async def killed(asker: Asker) -> tuple[list[Answer], list[Answer], list[Answer]]:
        begun = await asker.streams(3, max_tokens=400)
        whole = [asker.begin(max_tokens=400) for _ in range(2)]
        await until(lambda: pair.first.running == 5)
        await asyncio.sleep(0.2)  # the whole ones have tokens, too
        pair.first.told(first_s=60.0)
        waiting = [asker.begin(max_tokens=7, stream=place > 0) for place in range(3)]
        await until(lambda: pair.first.running == 8)
        pair.first.kill()
        return (
            [await task for _, task in begun],
            [await task for _, task in whole],
            [await task for _, task in waiting],
        )

    pair.first.told(interval_s=0.02)
    before = pair.tokens()
    streams, wholes, waiting = together(pair.gateway, pair.key, killed)
    for answer in streams:
        assert answer.status == 200 and not answer.is_whole and answer.usage is None and not answer.broken
        assert answer.error is not None and answer.error["code"] == "backend_failed"
        assert answer.text == pair.text(answer.tokens)
    for answer in wholes:
        assert answer.status == 502 and answer.error is not None and answer.error["code"] == "backend_failed"
    for answer in waiting:
        assert (answer.status, answer.text, answer.is_whole) == (200, pair.text(7), True)
        assert answer.usage is not None and answer.usage["completion_tokens"] == 7
        assert answer.usage["prompt_tokens"] + 7 == answer.usage["total_tokens"]
        assert answer.version == pair.version.reference
    delivered = sum(answer.tokens for answer in (*streams, *waiting))
    whole_tokens = pair.tokens() - before - delivered
    assert 0 < whole_tokens < 2 * 400  # of the two that nobody got; each token once
    assert pair.inflight() == 0
    assert not pair.state(pair.first, "up")  # left alone at once; the probes take seconds to find it down
    again = together(pair.gateway, pair.key, _at_once)
    assert {answer.status for answer in again} == {200}  # all places are free, and the other engine answers
    pair.first = pair.first.restart()
    pair.stage.processes.append(pair.first)
    wait_until(lambda: pair.one().status == 200 and pair.first.seen)
    assert pair.state(pair.first, "up")


async def _at_once(asker: Asker) -> list[Answer]:
    return list(await asyncio.gather(*(asker.ask(max_tokens=20) for _ in range(CONCURRENT))))


def test_an_engine_that_hangs(pair: Pair) -> None:
    """Proves the deadline of a first token or the probes: what waits at a hung engine is answered by the other one."""

    async def hung(asker: Asker) -> list[Answer]:
        waiting = [asker.begin(max_tokens=6, stream=bool(place % 2)) for place in range(4)]
        await until(lambda: pair.first.running == 4)
        pair.first.send(signal.SIGSTOP)
        return [await task for _, task in waiting]

    pair.first.told(first_s=60.0)
    for answer in together(pair.gateway, pair.key, hung):
        assert (answer.status, answer.text, answer.is_whole) == (200, pair.text(6), True)
        assert answer.seconds < 20
    assert not pair.state(pair.first, "up") and pair.state(pair.second, "up")
    started = time.monotonic()
    assert {answer.status for answer in together(pair.gateway, pair.key, _at_once)} == {200}
    assert time.monotonic() - started < 2  # nobody waits for it any more
    pair.first.send(signal.SIGCONT)
    pair.first.told(first_s=0.0)
    count = len(pair.first.seen)
    wait_until(lambda: pair.one().status == 200 and len(pair.first.seen) > count)
    assert pair.state(pair.first, "up") and pair.inflight() == 0
