"""The pool of replicas: who is asked for which key, who is left alone, what a deadline does."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from foreword.errors import BackendFailed, ConfigError, Overloaded
from foreword.serve.engines import breaker as breaker_module
from foreword.serve.engines import replicas as replicas_module
from foreword.serve.engines.breaker import BREAK_AFTER, MAX_REST_S, REST_S, Breaker
from foreword.serve.engines.replicas import DOWN_AFTER, FREE_LOAD, Attempt, Busy, Facts, Lost, Pool, Replica, Timeouts

KEYS = [f"key-{number}" for number in range(600)]


class Probes:
    """Answers probes as it is told."""

    def __init__(self) -> None:
        self.sick: set[str] = set()
        self.num_asked: Counter[str] = Counter()
        self.asked = asyncio.Event()

    async def __call__(self, replica: Replica) -> Facts:
        self.num_asked[replica.url] += 1
        self.asked.set()
        if replica.url in self.sick:
            raise Lost("sick")
        return Facts(model="base", max_model_len=100 if replica.url.endswith("0") else 200)

    async def rounds(self, count: int) -> None:
        """Wait until each replica has been asked `count` times more."""
        target = {url: asked + count for url, asked in self.num_asked.items()}
        async with asyncio.timeout(10):
            while any(self.num_asked[url] < wanted for url, wanted in target.items()):
                self.asked.clear()
                await self.asked.wait()
        await asyncio.sleep(0)


def urls(count: int) -> list[str]:
    return [f"http://engine-{number}" for number in range(count)]


def run(
    scenario: Callable[[Pool, Probes], Coroutine[Any, Any, None]],
    count: int = 3,
    sick: tuple[str, ...] = (),
    **options: Any,
) -> None:
    async def main() -> None:
        probes = Probes()
        probes.sick.update(sick)
        pool = Pool(urls(count), probes, **({"probe_every_s": 0.01} | options))
        await pool.start()
        try:
            await scenario(pool, probes)
        finally:
            await pool.aclose()

    asyncio.run(main())


def home(pool: Pool, key: str) -> str:
    return pool.attempt(key).replica.url


def hold(pool: Pool, attempt: Attempt) -> None:
    """Put a request in flight that stays."""
    attempt.replica.inflight += 1


def test_a_key_has_one_home_and_keys_spread_evenly() -> None:
    async def scenario(pool: Pool, probes: Probes) -> None:
        homes = {key: home(pool, key) for key in KEYS}
        assert homes == {key: home(pool, key) for key in KEYS}
        share = len(KEYS) / 3
        assert all(abs(count - share) < 5 * math.sqrt(share) for count in Counter(homes.values()).values())

    run(scenario)


def test_a_replica_that_comes_moves_only_its_own_keys() -> None:
    found: list[dict[str, str]] = []

    async def scenario(pool: Pool, probes: Probes) -> None:
        found.append({key: home(pool, key) for key in KEYS})

    run(scenario, 4)
    run(scenario, 5)
    before, after = found
    moved = [key for key in KEYS if before[key] != after[key]]
    assert moved and {after[key] for key in moved} == {urls(5)[4]}


def test_a_loaded_home_passes_requests_on_and_takes_its_share() -> None:
    async def scenario(pool: Pool, probes: Probes) -> None:
        counts: Counter[str] = Counter()
        for _ in range(300):
            attempt = pool.attempt("one key")
            hold(pool, attempt)
            counts[attempt.replica.url] += 1
        assert len(counts) == 3 and max(counts.values()) <= 1.25 * 301 / 3 + 1
        few = [replica.inflight for replica in pool.replicas]
        assert max(few) > min(few)  # the home has more than the others

    run(scenario, max_inflight=1000)

    async def free(pool: Pool, probes: Probes) -> None:
        taken = [pool.attempt("one key") for _ in range(FREE_LOAD)]
        for attempt in taken:
            hold(pool, attempt)
        assert len({attempt.replica.url for attempt in taken}) == 1

    run(free)


def test_full_replicas_refuse_with_the_numbers() -> None:
    async def scenario(pool: Pool, probes: Probes) -> None:
        for _ in range(6):
            hold(pool, pool.attempt("key"))
        assert [replica.inflight for replica in pool.replicas] == [2, 2, 2]
        with pytest.raises(Overloaded, match="3 replicas take 2 each"):
            pool.attempt("key")
        pool.replicas[1].inflight -= 1
        assert pool.attempt("key").replica is pool.replicas[1]

    run(scenario, max_inflight=2)


def test_draining_replicas_get_nothing_new() -> None:
    draining: set[str] = set()

    async def scenario(pool: Pool, probes: Probes) -> None:
        draining.add(first := home(pool, "key"))
        assert all(home(pool, key) != first for key in KEYS)
        assert [state.url for state in pool.states() if state.is_draining] == [first]
        draining.update(urls(3))
        with pytest.raises(BackendFailed, match="3 drain"):
            pool.attempt("key")
        with pytest.raises(BackendFailed):
            pool.check()
        draining.clear()
        pool.check()
        assert home(pool, "key") == first

    run(scenario, draining=lambda: draining)


def test_a_replica_goes_down_after_failed_probes_and_comes_back() -> None:
    async def scenario(pool: Pool, probes: Probes) -> None:
        first = home(pool, "key")
        probes.sick.add(first)
        await probes.rounds(DOWN_AFTER + 1)
        assert home(pool, "key") != first
        assert [state.is_up for state in pool.states() if state.url == first] == [False]
        probes.sick.clear()
        await probes.rounds(2)
        assert home(pool, "key") == first
        probes.sick.update(urls(3))
        await probes.rounds(DOWN_AFTER + 1)
        with pytest.raises(BackendFailed, match="of 3 replicas 3 are down"):
            pool.attempt("key")

    run(scenario)


def test_a_replica_that_was_never_up_is_not_asked() -> None:
    async def scenario(pool: Pool, probes: Probes) -> None:
        assert {home(pool, key) for key in KEYS} == set(urls(3)[1:])
        assert pool.max_model_len == 200  # of those that have told

    run(scenario, sick=("http://engine-0",))
    run_all: list[int | None] = []

    async def all_up(pool: Pool, probes: Probes) -> None:
        run_all.append(pool.max_model_len)

    run(all_up)
    assert run_all == [100]


def test_start_does_not_wait_long_for_one_that_hangs() -> None:
    async def main() -> None:
        async def probe(replica: Replica) -> Facts:
            if replica.url.endswith("0"):
                await asyncio.Event().wait()
            return Facts(model="base", max_model_len=None)

        pool = Pool(urls(2), probe, timeouts=Timeouts(probe_s=0.05))
        async with asyncio.timeout(5):
            await pool.start()
            assert home(pool, "key") == urls(2)[1] and pool.max_model_len is None
            await pool.aclose()

    asyncio.run(main())


def test_one_that_lost_a_request_is_not_asked_again_first() -> None:
    async def scenario(pool: Pool, probes: Probes) -> None:
        tried: list[Replica] = []
        for _ in range(3):
            attempt = pool.attempt("key", tried)
            assert attempt.replica not in tried
            tried.append(attempt.replica)
        assert pool.attempt("key", tried).replica is tried[0]
        assert sum(state.retries for state in pool.states()) == 3

    run(scenario)


async def lose(pool: Pool, key: str, error: Exception) -> Replica:
    attempt = pool.attempt(key)
    with pytest.raises(type(error)):
        with attempt:
            raise error
    return attempt.replica


def test_losses_open_the_breaker_and_one_request_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker_module, "REST_S", 0.05)

    async def scenario(pool: Pool, probes: Probes) -> None:
        first = pool.attempt("key").replica
        for _ in range(BREAK_AFTER):
            assert await lose(pool, "key", Lost("broken pipe")) is first
        assert first.breaker.state(asyncio.get_running_loop().time()) == "open"
        assert home(pool, "key") != first.url
        assert [state.failures for state in pool.states() if state.url == first.url] == [BREAK_AFTER]
        await asyncio.sleep(0.08)  # the longest first rest
        trial = pool.attempt("key")
        assert trial.replica is first
        with trial:
            assert home(pool, "key") != first.url  # one at a time
            trial.token(1e9)
        assert home(pool, "key") == first.url

    run(scenario)


def test_what_is_not_the_replicas_fault_does_not_open_the_breaker() -> None:
    async def scenario(pool: Pool, probes: Probes) -> None:
        first = pool.attempt("key").replica
        for error in (Busy("full"), BackendFailed("500"), ValueError("ours")):
            for _ in range(BREAK_AFTER + 1):
                assert await lose(pool, "key", error) is first
        assert first.failures == 0

    run(scenario)


def test_a_trial_that_ends_undecided_lets_another_try() -> None:
    breaker = Breaker()
    for _ in range(BREAK_AFTER):
        breaker.fail(0.0)
    assert not breaker.allows(0.4) and breaker.allows(1.6)
    assert breaker.begin(1.6) and not breaker.allows(1.6)
    breaker.end_trial()
    assert breaker.allows(1.6)


def test_many_requests_lost_at_once_are_one_reason_to_rest() -> None:
    breaker = Breaker()
    for _ in range(50):
        breaker.fail(0.0)
    assert not breaker.allows(REST_S * 0.49) and breaker.allows(REST_S * 1.51)


def test_rests_grow_up_to_a_limit_and_differ() -> None:
    breaker, now, rests = Breaker(), 0.0, []
    for _ in range(BREAK_AFTER - 1):
        breaker.fail(now)
    for number in range(12):
        breaker.fail(now)
        step = min(REST_S * 2**number, MAX_REST_S)
        assert not breaker.allows(now + step * 0.49) and breaker.allows(now + step * 1.51)
        rests.append(breaker.rest_until - now)
        now += step * 2
    assert len(set(rests)) == len(rests)
    breaker.succeed()
    assert breaker.state(now) == "closed" and breaker.allows(0.0)


def test_a_deadline_loses_the_request_wherever_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "WATCH_S", 0.01)

    async def scenario(pool: Pool, probes: Probes) -> None:
        async with asyncio.timeout(5):
            with pytest.raises(Lost, match="no answer came in time"):
                with pool.attempt("key"):
                    await asyncio.Event().wait()
            with pytest.raises(Lost, match="no token came in time"):
                with pool.attempt("key") as attempt:
                    attempt.head()
                    attempt.token(asyncio.get_running_loop().time())
                    await asyncio.Event().wait()
        assert pool.num_inflight == 0 and asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]

    run(scenario, timeouts=Timeouts(head_s=0.02, token_s=0.02))


def test_tokens_put_the_deadline_off_but_the_whole_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "WATCH_S", 0.01)

    async def scenario(pool: Pool, probes: Probes) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        with pytest.raises(Lost, match="the whole answer took too long"):
            with pool.attempt("key") as attempt:
                attempt.head()
                while True:
                    attempt.token(loop.time())
                    await asyncio.sleep(0.005)
        assert loop.time() - started >= 0.8

    run(scenario, timeouts=Timeouts(head_s=0.3, first_token_s=0.3, token_s=0.3, whole_s=0.8))


def test_a_whole_answer_is_not_lost_by_its_end() -> None:
    async def scenario(pool: Pool, probes: Probes) -> None:
        with pool.attempt("key") as attempt:
            attempt.token(asyncio.get_running_loop().time())
            attempt.end_within(0.0)
            await asyncio.Event().wait()
        assert attempt.replica.failures == 0 and attempt.replica.inflight == 0

    run(scenario)


def test_a_caller_that_cancels_is_cancelled() -> None:
    async def scenario(pool: Pool, probes: Probes) -> None:
        async def work() -> None:
            with pool.attempt("key"):
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        assert pool.num_inflight == pool.num_waiting == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.num_inflight == 0 and all(state.failures == 0 for state in pool.states())

    run(scenario)


def test_going_down_frees_who_waits_for_a_first_token_only() -> None:
    async def scenario(pool: Pool, probes: Probes) -> None:
        async def work(has_token: bool) -> None:
            with pool.attempt("key") as attempt:
                if has_token:
                    attempt.token(asyncio.get_running_loop().time())
                await asyncio.Event().wait()

        waiting, running = asyncio.create_task(work(False)), asyncio.create_task(work(True))
        await asyncio.sleep(0)
        assert (pool.num_inflight, pool.num_waiting) == (2, 1)
        probes.sick.update(urls(3))
        with pytest.raises(Lost, match="it is down"):
            async with asyncio.timeout(5):
                await waiting
        assert not running.done()
        await pool.aclose()
        with pytest.raises(Lost, match="the server ends"):
            await running

    run(scenario)


def test_late_probes_of_one_that_sends_tokens_do_not_take_it_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "BUSY_S", 0.2)

    async def main() -> None:
        hangs, num_asked = False, 0

        async def probe(replica: Replica) -> Facts:
            nonlocal num_asked
            num_asked += 1
            if hangs:
                await asyncio.Event().wait()
            return Facts(model="base", max_model_len=None)

        pool = Pool(urls(1), probe, timeouts=Timeouts(probe_s=0.01), probe_every_s=0.01)
        loop = asyncio.get_running_loop()
        await pool.start()
        hangs = True
        with pool.attempt("key") as attempt:
            asked = num_asked
            while num_asked < asked + 2 * DOWN_AFTER:
                attempt.token(loop.time())
                await asyncio.sleep(0.005)
            assert pool.replicas[0].is_up
            async with asyncio.timeout(5):
                while pool.replicas[0].is_up:
                    await asyncio.sleep(0.005)
            assert loop.time() - pool.replicas[0].last_token > 0.2
        await pool.aclose()

    asyncio.run(main())


def test_is_well_asks_now() -> None:
    async def scenario(pool: Pool, probes: Probes) -> None:
        assert await pool.is_well(pool.replicas[0])
        probes.sick.add(pool.replicas[0].url)
        assert not await pool.is_well(pool.replicas[0])

    run(scenario)


def test_urls_are_checked() -> None:
    pool = Pool(["http://a/", "https://b"], Probes())
    assert [replica.url for replica in pool.replicas] == ["http://a", "https://b"]
    for wrong, what in (
        ([], "no replica is given"),
        (["a:8000"], "'a:8000' is no URL"),
        (["http://a", "http://a/"], "http://a is given twice"),
    ):
        with pytest.raises(ConfigError, match=what):
            Pool(wrong, Probes())
