"""Limits: what is admitted, what it is charged, what others' gateways add, and that every place is given back."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.engine.request import Request
from foreword.errors import BadRequest, ForewordError, RateLimited
from foreword.registry.access_records import Limits, Usage
from foreword.serve.access.control import Control
from foreword.serve.access.limits import (
    WINDOW_S,
    Limiter,
    Window,
    check_new_tokens,
    check_prompt_tokens,
    estimated_tokens,
)
from foreword.serve.gateway import create_app
from tests.serve.fakes import FakeBackend, FakeRegistry, version
from tests.serve.fakes_access import FakeAccess, broken


class Time:
    def __init__(self) -> None:
        self.seconds = 5000.25

    def __call__(self) -> float:
        return self.seconds


def admitted(limiter: Limiter, limits: Limits, count: int) -> int:
    """Return how many of `count` requests are admitted."""
    for done in range(count):
        try:
            limiter.admit("acme", limits)
        except RateLimited:
            return done
    return count


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), max_size=60))
def test_a_window_holds_at_least_the_last_minute_and_at_most_a_second_more(steps: list[tuple[float, int]]) -> None:
    now, used, window = 1000.0, [], Window(1000.0)
    for wait, amount in steps:
        now += wait
        window.add(amount, now, now)
        used.append((now, amount))
        least = sum(amount for at, amount in used if at > now - WINDOW_S + 1)
        most = sum(amount for at, amount in used if at > now - WINDOW_S - 1)
        assert least <= window.total <= most


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 50)), min_size=1, max_size=30), st.integers(1, 300))
def test_waiting_as_long_as_told_is_enough(steps: list[tuple[float, int]], amount: int) -> None:
    now, window = 1000.0, Window(1000.0)
    for wait, used in steps:
        now += wait
        window.add(used, now, now)
    before = window.total
    now += window.seconds_until_less(amount, now)
    window.roll(now)
    assert window.total <= max(before - amount, 0)


def test_requests_per_minute() -> None:
    time, limits = Time(), Limits(requests_per_minute=3)
    limiter = Limiter(clock=time)
    assert admitted(limiter, limits, 5) == 3
    with pytest.raises(
        RateLimited, match="3 requests in the last minute, requests_per_minute of this tenant is 3"
    ) as it:
        limiter.admit("acme", limits)
    assert it.value.limit == "requests_per_minute"
    limiter.admit("other", limits)
    time.seconds += it.value.retry_after_s
    assert admitted(limiter, limits, 5) == 3


def test_requests_at_once() -> None:
    time, limits = Time(), Limits(concurrent=2)
    limiter = Limiter(clock=time)
    slots = [limiter.admit("acme", limits) for _ in range(2)]
    with pytest.raises(RateLimited, match="2 requests run, concurrent of this tenant is 2"):
        limiter.admit("acme", limits)
    slots[0].release()
    slots[0].release()
    assert admitted(limiter, limits, 5) == 1


def test_tokens_are_charged_as_they_come() -> None:
    time, limits = Time(), Limits(tokens_per_minute=100)
    limiter = Limiter(clock=time)
    slot = limiter.admit("acme", limits)
    slot.settle(60, 0)
    assert admitted(limiter, limits, 1) == 1
    slot.settle(40, 0)  # the estimate was too high
    slot.settle(40, 50)
    assert limiter.usage()["acme"].tokens == 90
    assert admitted(limiter, limits, 1) == 1
    slot.settle(40, 60)
    with pytest.raises(
        RateLimited, match="100 tokens in the last minute, tokens_per_minute of this tenant is 100"
    ) as it:
        limiter.admit("acme", limits)
    time.seconds += it.value.retry_after_s
    assert admitted(limiter, limits, 1) == 1


def test_a_correction_counts_where_the_estimate_did() -> None:
    time = Time()
    limiter = Limiter(clock=time)
    slot = limiter.admit("acme", Limits())
    slot.settle(1000, 0)
    time.seconds += 59
    slot.settle(10, 5)
    assert limiter.usage()["acme"].tokens == 15
    time.seconds += 2
    assert limiter.usage()["acme"].tokens == 5


def test_others_use_counts_until_they_fall_silent() -> None:
    access, time = FakeAccess(), Time()
    limits = Limits(requests_per_minute=10, concurrent=5)

    async def main() -> None:
        control, limiter = Control(access), Limiter(clock=time)
        limiter.admit("acme", limits)
        access.others = {
            "acme": Usage(requests=7, tokens=0, running=3),
            "other": Usage(requests=1, tokens=0, running=0),
        }
        await limiter.sync(control)
        assert access.used == {"acme": Usage(requests=1, tokens=0, running=1)}
        assert limiter.usage()["acme"] == Usage(requests=8, tokens=0, running=4)
        assert limiter.usage()["other"].requests == 1
        assert admitted(limiter, limits, 5) == 1
        access.others = {}  # the turn of a minute, perhaps: one silence is not believed
        await limiter.sync(control)
        assert limiter.usage()["acme"].requests == 9
        assert admitted(limiter, limits, 5) == 0
        await limiter.sync(control)
        assert admitted(limiter, limits, 5) == 3
        access.failure = broken()
        with pytest.raises(type(access.failure)):
            await limiter.sync(control)
        assert limiter.usage()["acme"].running == 5
        control.close()

    asyncio.run(main())


def test_a_tenant_that_does_nothing_is_forgotten() -> None:
    access, time = FakeAccess(), Time()

    async def main() -> None:
        control, limiter = Control(access), Limiter(clock=time)
        limiter.admit("acme", Limits()).release()
        time.seconds += 61
        await limiter.sync(control)
        assert limiter.usage() == {}
        control.close()

    asyncio.run(main())


def test_lengths() -> None:
    limits = Limits(max_new_tokens=10, max_prompt_tokens=20)
    check_new_tokens(10, limits)
    check_new_tokens(None, limits)
    check_prompt_tokens(20, limits)
    with pytest.raises(BadRequest, match="max_tokens is 11, max_new_tokens of this tenant is 10"):
        check_new_tokens(11, limits)
    with pytest.raises(BadRequest, match="the prompt has 21 tokens, max_prompt_tokens of this tenant is 20"):
        check_prompt_tokens(21, limits)


def test_estimates() -> None:
    turns = [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y" * 40}]
    requests = [Request(prompt_ids=[1, 2, 3]), Request(prompt="x" * 400), Request(messages=turns)]
    assert [estimated_tokens([request]) for request in requests] == [3, 101, 21]
    assert estimated_tokens(requests) == 125


class Stage:
    """An app without a server: requests go straight in."""

    def __init__(self, backend: FakeBackend, **limits: int) -> None:
        self.backend = backend
        access = FakeAccess()
        access.add_tenant("acme", "triage", **limits)
        self.key = access.add_key("acme")
        self.app = create_app(
            backend,
            FakeRegistry(version("triage", 1)),
            base_name="base",
            control=Control(access, poll_s=0.005),
            require_keys=True,
        )
        self.gateway = self.app.state.gateway

    async def complete(self, **fields: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        headers = {"authorization": f"Bearer {self.key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
            return await client.post("/v1/completions", json={"model": "triage", "prompt": "x", **fields})

    def run(self, work: Callable[[], Any]) -> None:
        async def main() -> None:
            async with self.app.router.lifespan_context(self.app):
                await work()

        asyncio.run(main())

    @property
    def use(self) -> Usage:
        return self.gateway.limiter.usage()["acme"]


def test_answers_are_charged_with_all_their_choices() -> None:
    stage = Stage(FakeBackend(), tokens_per_minute=60)

    async def work() -> None:
        whole = await stage.complete(n=3)
        assert whole.json()["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
        assert stage.use == Usage(requests=1, tokens=17, running=0)
        await stage.complete(prompt=["a", "b"], stream=True)
        assert stage.use.tokens == 17 + 2 * (5 + 4)
        for _ in range(3):
            await stage.complete()
        refused = await stage.complete()
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        error = refused.json()["error"]
        assert error["message"].startswith("62 tokens in the last minute, tokens_per_minute of this tenant is 60")
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limited")

    stage.run(work)


def test_what_runs_is_charged_meanwhile_and_what_is_aborted_was_used() -> None:
    stage = Stage(FakeBackend(words=("word ",) * 10_000, delay_s=0.001))

    async def work() -> None:
        asking = asyncio.create_task(stage.complete(stream=True))
        async with asyncio.timeout(5):
            while not stage.gateway.calls or stage.use.tokens < 20:
                await asyncio.sleep(0.005)
        assert stage.use.running == 1
        asking.cancel()
        await asyncio.wait({asking})
        assert stage.use.running == 0 and stage.use.tokens >= 20
        assert stage.backend.num_aborted == 1

    stage.run(work)


def test_what_was_never_submitted_costs_no_tokens() -> None:
    stage = Stage(FakeBackend(submit_error=BadRequest("no")))

    async def work() -> None:
        assert (await stage.complete(prompt="x" * 4000)).status_code == 400
        assert stage.use == Usage(requests=1, tokens=0, running=0)

    stage.run(work)


def test_limits_of_length_over_http() -> None:
    stage = Stage(FakeBackend(), max_new_tokens=8, max_prompt_tokens=9)

    async def work() -> None:
        assert (await stage.complete(max_tokens=8)).status_code == 200
        refused = await stage.complete(max_tokens=9)
        assert refused.status_code == 400
        assert "max_tokens is 9, max_new_tokens of this tenant is 8" in refused.json()["error"]["message"]
        assert (await stage.complete()).status_code == 200
        assert stage.backend.requests[-1].default_limit == 8
        long = await stage.complete(prompt=["a", "b"])  # the fake counts five tokens for each
        assert long.status_code == 400 and "the prompt has 10 tokens" in long.json()["error"]["message"]
        assert stage.backend.num_running == 0

    stage.run(work)


FATES: dict[str, dict[str, Any]] = {
    "whole": {},
    "streamed": {"stream": True},
    "bad field": {"nothing": 1},
    "unknown model": {"model": "payroll"},
    "too long": {"max_tokens": 999},
    "engine fails": {"fail": True},
    "engine fails in a stream": {"fail": True, "stream": True},
    "engine refuses": {"refuse": True},
    "client gone": {"leave": True},
    "client gone from a stream": {"leave": True, "stream": True},
    "halted": {"halt": True},
    "halted stream": {"halt": True, "stream": True},
}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(sorted(FATES)), min_size=1, max_size=6))
def test_every_place_is_given_back(fates: list[str]) -> None:
    backend = FakeBackend(words=("a ", "b "), delay_s=0.0005)
    stage = Stage(backend, concurrent=len(fates), max_new_tokens=100)

    async def meet(fate: str) -> None:
        fields = dict(FATES[fate])
        backend.fail_after = 1 if fields.pop("fail", False) else None
        backend.submit_error = ForewordError("no") if fields.pop("refuse", False) else None
        leaves, halts = fields.pop("leave", False), fields.pop("halt", False)
        asking = asyncio.create_task(stage.complete(**fields))
        if leaves or halts:
            while not stage.gateway.calls and not asking.done():
                await asyncio.sleep(0)
            if leaves:
                asking.cancel()
            for call in stage.gateway.calls if halts else ():
                call.halt(ForewordError("ended"))
        await asyncio.wait({asking})

    async def work() -> None:
        for fate in fates:
            await meet(fate)
        backend.fail_after = backend.submit_error = None
        await asyncio.gather(*map(meet, [fate for fate in fates if "engine" not in fate]))
        assert stage.use.running == 0 and not stage.gateway.calls and backend.num_running == 0
        assert (await stage.complete()).status_code == 200

    stage.run(work)
    assert dataclasses.asdict(stage.use)["running"] == 0
