"""Who goes to a canary: lasting, monotone, the right share, anew for each canary."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from foreword.registry.access_records import Route
from foreword.serve.versions import steering
from foreword.serve.versions.names import Names, Target
from foreword.serve.versions.routes import of_kind, position, takes, user_key
from tests.serve.fakes import FakeRegistry, version

SALTS = st.text("0123456789abcdef", min_size=1, max_size=32)
USERS = st.text(min_size=1, max_size=40)
FRACTIONS = st.floats(0.001, 1.0)
UNLIKELY = 1e-10
"""A right hash breaks a bound so seldom that no run will see it."""


def canary(fraction: float = 0.5, *, salt: str = "s", number: int = 2) -> Route:
    return Route(task="triage", kind="canary", number=number, fraction=fraction, salt=salt, keep_inputs=False)


@given(salt=SALTS, user=USERS)
def test_a_position_is_a_published_function_of_salt_and_user(salt: str, user: str) -> None:
    digest = hashlib.sha256(b"foreword/route/v1\0" + salt.encode() + b"\0" + user.encode()).hexdigest()
    assert position(salt, user) == int(digest[:16], 16) // 2**11 / 2**53
    assert 0 <= position(salt, user) < 1


@given(salt=SALTS, user=USERS, a=FRACTIONS, b=FRACTIONS)
def test_a_larger_fraction_keeps_those_who_were_in(salt: str, user: str, a: float, b: float) -> None:
    small, large = sorted((a, b))
    assert takes(canary(large, salt=salt), user) >= takes(canary(small, salt=salt), user)
    assert takes(canary(1.0, salt=salt), user)


@settings(max_examples=25)
@given(salt=SALTS, fraction=FRACTIONS)
def test_the_share_is_the_fraction(salt: str, fraction: float) -> None:
    num = 2000
    found = sum(takes(canary(fraction, salt=salt), f"user {number}") for number in range(num))
    assert binom.ppf(UNLIKELY, num, fraction) <= found <= binom.isf(UNLIKELY, num, fraction)


@settings(max_examples=25)
@given(salts=st.lists(SALTS, min_size=2, max_size=2, unique=True), a=FRACTIONS, b=FRACTIONS)
def test_routes_choose_independently(salts: list[str], a: float, b: float) -> None:
    num = 2000
    routes = canary(a, salt=salts[0]), canary(b, salt=salts[1])
    both = sum(all(takes(route, f"user {number}") for route in routes) for number in range(num))
    assert binom.ppf(UNLIKELY, num, a * b) <= both <= binom.isf(UNLIKELY, num, a * b)


@given(
    tenants=st.lists(st.text("abc-", min_size=1, max_size=5), min_size=2, max_size=2, unique=True),
    user=USERS,
    key=USERS,
    request_id=USERS,
)
def test_a_user_is_the_bodys_else_the_keys_else_the_request(
    tenants: list[str], user: str, key: str, request_id: str
) -> None:
    a, b = tenants
    assert user_key(user=user, tenant=a, key=key, request_id="1") == user_key(
        user=user, tenant=a, key="other", request_id="2"
    )
    assert user_key(user=user, tenant=a, key=key, request_id="1") != user_key(
        user=user, tenant=b, key=key, request_id="1"
    )
    assert user_key(user=None, tenant=a, key=key, request_id="1") == user_key(
        user="", tenant=a, key=key, request_id="2"
    )
    assume(request_id != "1")
    one = user_key(user=None, tenant=None, key=None, request_id="1")
    assert one != user_key(user=None, tenant=None, key=None, request_id=request_id)


def test_kinds_do_not_mix() -> None:
    for user in ("key:1", "tenant:1", "request:1", "1"):
        keys = [
            user_key(user=user, tenant=None, key=None, request_id="x"),
            user_key(user=None, tenant=None, key=user, request_id="x"),
            user_key(user=None, tenant=user, key=None, request_id="x"),
            user_key(user=None, tenant=None, key=None, request_id=user),
        ]
        assert len(set(keys)) == 4


def test_a_task_has_one_route_of_a_kind() -> None:
    shadow = dataclasses.replace(canary(), kind="shadow")
    assert of_kind((shadow, canary()), "canary") == canary()
    assert of_kind((shadow,), "canary") is None and of_kind((), "shadow") is None


def steer(registry: FakeRegistry, route: Route | None, user: str = "someone") -> Target:
    async def main() -> Target:
        names = Names(registry, "base")
        return await steering.steer(names, await names.resolve("triage"), route, user)

    return asyncio.run(main())


@pytest.fixture
def registry() -> FakeRegistry:
    registry = FakeRegistry(version("triage", 1), version("triage", 2))
    registry.moved["triage@prod"] = 1
    return registry


def test_steering_says_who_answers_under_the_name_that_was_asked_for(registry: FakeRegistry) -> None:
    inside = steer(registry, canary(1.0))
    assert (inside.name, inside.prefix, inside.labels) == ("triage", "sha-triage-2", ("triage", "2"))
    assert inside.headers["x-foreword-route"] == "canary" and "x-foreword-canary" not in inside.headers
    outside = steer(registry, canary(1e-9))
    assert outside.prefix == "sha-triage-1" and outside.headers["x-foreword-route"] == "stable"
    assert steer(registry, None).headers.keys() == {"x-foreword-version", "x-foreword-digest"}


def test_a_canary_that_was_deleted_is_answered_by_the_stable_version(registry: FakeRegistry) -> None:
    del registry.known["triage@2"]
    found = steer(registry, canary(1.0))
    assert found.prefix == "sha-triage-1"
    assert found.headers["x-foreword-route"] == "stable" and found.headers["x-foreword-canary"] == "failed"
