"""Tenants, keys, grants, routes, draining replicas, and what a gateway reads of them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import string
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foreword.errors import ConfigError, Conflict, NotFound
from foreword.registry.access import Access, secret_digest
from foreword.registry.access_checks import MAX_LIMIT
from foreword.registry.access_records import Grant, Limits, Snapshot
from foreword.registry.store import Registry

from .conftest import ON_EACH_DATABASE, Factory, Place

pytestmark = pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
DAY = timedelta(days=1)


@pytest.fixture
def access(registry: Registry) -> Access:
    return registry.access


def actions(access: Access) -> list[tuple[str, str, str]]:
    """What was done, oldest first."""
    return [(entry.who, entry.action, entry.subject) for entry in reversed(access.audit())]


def test_tenants(access: Access) -> None:
    limits = Limits(requests_per_minute=60, tokens_per_minute=10**9, concurrent=4, max_new_tokens=512)
    shop = access.create_tenant("shop", limits=limits, who="ann")
    bank = access.create_tenant("bank", who="ann")
    assert (shop.name, shop.limits, shop.disabled, bank.limits) == ("shop", limits, False, Limits())
    assert abs(datetime.now(UTC) - shop.created) < timedelta(minutes=1)
    assert access.tenants() == [bank, shop]
    assert access.set_limits("bank", Limits(concurrent=1), who="bob").limits == Limits(concurrent=1)
    assert access.set_disabled("bank", True, who="bob").disabled
    assert not access.set_disabled("bank", False, who="bob").disabled
    access.delete_tenant("shop", who="eve")
    assert [tenant.name for tenant in access.tenants()] == ["bank"]
    assert actions(access) == [
        ("ann", "tenant.create", "shop"),
        ("ann", "tenant.create", "bank"),
        ("bob", "tenant.limits", "bank"),
        ("bob", "tenant.disable", "bank"),
        ("bob", "tenant.enable", "bank"),
        ("eve", "tenant.delete", "shop"),
    ]
    (entry,) = access.audit(action="tenant.limits")
    assert entry.details == {"from": {}, "to": {"concurrent": 1}}
    with pytest.raises(Conflict, match="the tenant bank exists"):
        access.create_tenant("bank")


@pytest.mark.parametrize("name", ["", "Shop", "-a", "a b", "a/b", "*", "x" * 65, "ä", "\ud800", "a\0"])
def test_bad_tenant_names(access: Access, name: str) -> None:
    with pytest.raises(ConfigError, match="is no tenant name"):
        access.create_tenant(name)
    with pytest.raises(NotFound, match="no tenant"):
        access.set_disabled(name, True)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Limits)])
@pytest.mark.parametrize("value", [0, -1, 1.5, "60", True, MAX_LIMIT + 1])
def test_bad_limits(access: Access, field: str, value: Any) -> None:
    limits = Limits(**{field: value})
    with pytest.raises(ConfigError, match=f"{field} is {value!r}"):
        access.create_tenant("shop", limits=limits)
    access.create_tenant("shop", limits=Limits(**{field: MAX_LIMIT}))
    with pytest.raises(ConfigError, match=f"{field} is {value!r}"):
        access.set_limits("shop", limits)
    assert access.tenants()[0].limits == Limits(**{field: MAX_LIMIT})


def test_unknown_names_everywhere(access: Access) -> None:
    access.create_tenant("shop")
    calls: list[Callable[[], object]] = [
        lambda: access.set_limits("shob", Limits()),
        lambda: access.set_disabled("shob", True),
        lambda: access.delete_tenant("shob"),
        lambda: access.create_key("shob"),
        lambda: access.keys("shob"),
        lambda: access.grant("shob", "triage", "call"),
        lambda: access.withdraw("shob", "triage", "call"),
    ]
    for call in calls:
        with pytest.raises(NotFound, match="no tenant 'shob'\nDid you mean shop"):
            call()
    for id in ("fw_aaaaaaaaaa", "nonsense", "", "fw_\0"):
        for change in (access.revoke_key, access.rotate_key):
            with pytest.raises(NotFound, match="no key"):
                change(id)
    for task in ("triage", "", "\ud800"):
        for use in (lambda task: access.clear_route(task, "canary"), access.shadow_pairs, access.forget_shadow_pairs):
            with pytest.raises(NotFound, match="no task"):
                use(task)
    assert len(access.audit()) == 1


def test_a_key_is_shown_once_and_stored_as_a_digest(access: Access, registry: Registry) -> None:
    access.create_tenant("shop")
    key, plaintext = access.create_key("shop", name="ci", expires=datetime.now(UTC) + DAY, who="ann")
    assert plaintext.startswith(f"{key.id}_") and len(plaintext) == 13 + 1 + 43
    assert key.id.startswith("fw_") and len(key.id) == 13
    assert set(plaintext) <= set(string.ascii_letters + string.digits + "_-")
    assert key.secret_sha256 == hashlib.sha256(plaintext.encode()).hexdigest() == secret_digest(plaintext)
    secret = plaintext.removeprefix(f"{key.id}_")
    assert secret not in repr(key) and key.secret_sha256 not in repr(key)
    assert secret not in str(access.audit()) and key.secret_sha256 not in str([*access.audit(), key.to_json()])
    assert (key.tenant, key.name, key.revoked) == ("shop", "ci", None)
    admin, other = access.create_key(None)
    assert admin.tenant is None and other != plaintext
    assert access.keys() == [key, admin]
    assert (access.keys("shop"), access.keys(None)) == ([key], [admin])


@pytest.mark.parametrize("ago", [timedelta(0), timedelta(seconds=1), 1000 * DAY])
def test_a_key_cannot_expire_in_the_past(access: Access, ago: timedelta) -> None:
    with pytest.raises(ConfigError, match=r"and it is .* now"):
        access.create_key(None, expires=datetime.now(UTC) - ago)
    with pytest.raises(ConfigError, match="with its time zone"):
        access.create_key(None, expires=(datetime.now(UTC) + DAY).replace(tzinfo=None))
    for name in ("x" * 201, "\ud800", "a\0"):
        with pytest.raises(ConfigError, match="the key's name"):
            access.create_key(None, name=name)
    assert access.keys() == []


def test_rotation(access: Access) -> None:
    access.create_tenant("shop")
    old, plaintext = access.create_key("shop", name="ci", expires=datetime.now(UTC) + 90 * DAY)
    new, other = access.rotate_key(old.id, grace_s=3600, who="ann")
    assert (new.tenant, new.name) == ("shop", "ci") and new.id != old.id and other != plaintext
    assert new.expires is not None and old.expires is not None
    assert new.expires - new.created == old.expires - old.created
    ending = access.snapshot().keys[old.id]
    assert ending.expires == new.created + timedelta(hours=1)
    assert ending.is_live(new.created) and not ending.is_live(new.created + timedelta(hours=1))
    last, _ = access.rotate_key(new.id)
    snapshot = access.snapshot()
    assert [snapshot.keys[key.id].is_live(snapshot.now) for key in (old, new, last)] == [True, False, True]
    with pytest.raises(Conflict, match=f"the key {new.id} has ended already"):
        access.rotate_key(new.id)
    again, _ = access.rotate_key(old.id, grace_s=10**6)  # never later than it was to end
    assert access.snapshot().keys[old.id].expires == ending.expires
    assert access.revoke_key(again.id).revoked is not None
    with pytest.raises(Conflict):
        access.rotate_key(again.id)
    for grace_s in (-1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="grace period"):
            access.rotate_key(last.id, grace_s=grace_s)
    forever, _ = access.create_key(None)
    assert access.rotate_key(forever.id)[0].expires is None


def test_revoking_twice_is_revoking_once(access: Access) -> None:
    key, _ = access.create_key(None)
    first, revision = access.revoke_key(key.id, who="ann"), access.revision()
    assert access.revoke_key(key.id, who="bob") == first
    assert access.revision() == revision
    assert actions(access)[1:] == [("ann", "key.revoke", key.id)]


def test_a_deleted_tenant_leaves_nothing_to_its_successor(access: Access) -> None:
    access.create_tenant("shop")
    key, _ = access.create_key("shop")
    access.grant("shop", "*", "call")
    access.delete_tenant("shop")
    assert access.keys()[0].revoked is not None
    assert access.audit(action="tenant.delete")[0].details == {"revoked": [key.id]}
    with pytest.raises(NotFound):
        access.keys("shop")
    access.create_tenant("shop")
    snapshot = access.snapshot()
    assert snapshot.grants == {}
    assert not snapshot.keys[key.id].is_live(snapshot.now)


def test_grants(access: Access) -> None:
    access.create_tenant("shop")
    assert access.grant("shop", "triage", "call", who="ann") == Grant(tenant="shop", task="triage", right="call")
    access.grant("shop", "triage", "call", who="bob")  # held already
    access.grant("shop", "*", "manage")
    held = access.snapshot().grants["shop"]
    assert {(grant.task, grant.right) for grant in held} == {("triage", "call"), ("*", "manage")}
    assert [entry.who for entry in access.audit(action="grant", subject="shop")][1:] == ["ann"]
    with pytest.raises(NotFound, match="shop may not call mail\nIt may "):
        access.withdraw("shop", "mail", "call")
    access.withdraw("shop", "*", "manage")
    access.withdraw("shop", "triage", "call")
    assert access.snapshot().grants == {}
    with pytest.raises(NotFound, match=r"shop may not call triage$"):
        access.withdraw("shop", "triage", "call")
    for change in (access.grant, access.withdraw):
        with pytest.raises(ConfigError, match="is no task name"):
            change("shop", "Triage", "call")
        with pytest.raises(ConfigError, match="no right 'cal'\nDid you mean call"):
            change("shop", "triage", "cal")  # type: ignore[arg-type]


def test_routes(access: Access, registry: Registry, artefact: Factory) -> None:
    for task in ("triage", "triage", "triage", "mail"):
        registry.publish(artefact(task))
    first = access.set_route("triage", "canary", "triage@2", 0.1, who="ann")
    assert (first.number, first.fraction, first.keep_inputs) == (2, 0.1, False)
    more = access.set_route("triage", "canary", "triage@2", 0.5)
    assert (more.fraction, more.salt) == (0.5, first.salt)  # who is on it stays on it
    other = access.set_route("triage", "canary", "triage", 1)
    assert other.number == 3 and other.salt != first.salt
    shadow = access.set_route("triage", "shadow", "triage@1", 1.0, keep_inputs=True)
    assert access.snapshot().routes == {"triage": (other, shadow)}
    revision = access.revision()
    assert access.set_route("triage", "shadow", "triage@1", 1.0, keep_inputs=True) == shadow
    assert access.revision() == revision
    with pytest.raises(Conflict, match="triage@3 is in use by the canary route"):
        registry.delete("triage@3")
    registry.delete("triage@2")
    for reference in ("triage@2", "triage@9", "triage@nobody"):
        with pytest.raises(NotFound):
            access.set_route("triage", "canary", reference, 0.5)
    with pytest.raises(ConfigError, match="mail@1 is no version of triage"):
        access.set_route("triage", "canary", "mail@1", 0.5)
    access.clear_route("triage", "canary", who="bob")
    registry.delete("triage@3")
    with pytest.raises(NotFound, match="triage has no canary"):
        access.clear_route("triage", "canary")
    assert access.snapshot().routes == {"triage": (shadow,)}
    done = [(entry.who, entry.action) for entry in reversed(access.audit(subject="triage"))]
    assert [action for _, action in done] == ["canary.set"] * 3 + ["shadow.set", "canary.clear"]
    assert (done[0][0], done[-1][0]) == ("ann", "bob")


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), float("inf"), "0.5", None])
def test_bad_fractions(access: Access, registry: Registry, artefact: Factory, fraction: Any) -> None:
    registry.publish(artefact())
    with pytest.raises(ConfigError, match="a fraction of"):
        access.set_route("triage", "canary", "triage@1", fraction)
    with pytest.raises(ConfigError, match="only a shadow keeps inputs"):
        access.set_route("triage", "canary", "triage@1", 0.5, keep_inputs=True)
    with pytest.raises(ConfigError, match="no kind of route 'canari'\nDid you mean canary"):
        access.set_route("triage", "canari", "triage@1", 0.5)  # type: ignore[arg-type]
    assert access.snapshot().routes == {}


def test_draining(access: Access) -> None:
    access.drain("http://replica-1:8000/", who="ann")
    access.drain("http://replica-1:8000")
    access.drain("https://replica-2/v1")
    assert access.snapshot().draining == {"http://replica-1:8000", "https://replica-2/v1"}
    with pytest.raises(NotFound, match="http://replica-2 is not draining\nDid you mean "):
        access.undrain("http://replica-2")
    access.undrain("http://replica-1:8000/", who="bob")
    assert access.snapshot().draining == {"https://replica-2/v1"}
    assert actions(access)[0] == ("ann", "drain", "http://replica-1:8000")
    assert actions(access)[-1] == ("bob", "undrain", "http://replica-1:8000")
    for url in ("", "replica-1", "ftp://x", "http://", "http://a b", "http://u:p@host", "http://h?x=1", "http://\0"):
        for change in (access.drain, access.undrain):
            with pytest.raises(ConfigError, match="no replica's URL"):
                change(url)


def test_every_change_raises_the_revision(access: Access, registry: Registry, artefact: Factory) -> None:
    seen = [access.revision()]

    def changes(call: Callable[[], Any]) -> Any:
        result = call()
        seen.append(access.revision())
        assert seen[-1] > seen[-2], call
        assert access.snapshot().revision == seen[-1]
        return result

    one, two = artefact(), artefact()
    changes(lambda: registry.publish(one))
    changes(lambda: registry.publish(two))
    changes(lambda: registry.tag("triage@1", "prod"))
    changes(lambda: registry.promote("triage@2"))
    changes(lambda: registry.rollback("triage"))
    changes(lambda: registry.untag("triage", "prod"))
    changes(lambda: access.create_tenant("shop"))
    changes(lambda: access.set_limits("shop", Limits(concurrent=1)))
    key, _ = changes(lambda: access.create_key("shop"))
    key, _ = changes(lambda: access.rotate_key(key.id))
    changes(lambda: access.revoke_key(key.id))
    changes(lambda: access.grant("shop", "triage", "call"))
    changes(lambda: access.withdraw("shop", "triage", "call"))
    changes(lambda: access.set_route("triage", "canary", "triage@1", 0.5))
    changes(lambda: access.clear_route("triage", "canary"))
    changes(lambda: registry.delete("triage@1"))
    changes(lambda: access.drain("http://r"))
    changes(lambda: access.undrain("http://r"))
    changes(lambda: access.set_disabled("shop", True))
    changes(lambda: access.delete_tenant("shop"))
    assert len(access.audit()) == len(seen) - 1
    registry.publish(two)
    registry.tag("triage@2", "prod")
    revision = access.revision()
    for call in (lambda: registry.publish(two), lambda: registry.tag("triage@2", "prod"), lambda: registry.gc(0)):
        call()  # nothing that a gateway would notice
    assert access.revision() == revision


def test_a_change_that_fails_leaves_no_trace(access: Access, registry: Registry, artefact: Factory) -> None:
    registry.publish(artefact(), alias="prod")
    before = access.audit(), access.revision()
    for call, kind in [
        (lambda: registry.delete("triage@1"), Conflict),
        (lambda: registry.tag("triage@1", "prod", expect=7), Conflict),
        (lambda: access.create_key("nobody"), NotFound),
        (lambda: access.create_tenant("shop", who="\0"), ConfigError),
    ]:
        with pytest.raises(kind):
            call()
    assert (access.audit(), access.revision()) == before


def test_the_audit_table(access: Access, registry: Registry, artefact: Factory) -> None:
    registry.publish(artefact(), alias="prod", who="ann", why="first")
    for number in range(5):
        access.create_tenant(f"t{number}", who="bob")
    registry.publish(artefact())
    registry.promote("triage@2", who="eve", why="better", force=True)
    newest, *rest = access.audit()
    assert (newest.who, newest.action, newest.subject) == ("eve", "promote", "triage@prod")
    assert newest.details == {"from": 1, "to": 2, "why": "better", "forced": True, "overruled": ""}
    assert [entry.id for entry in rest] == sorted((entry.id for entry in rest), reverse=True)
    assert all(newest.when >= entry.when for entry in rest)
    assert access.audit(limit=2) == [newest, rest[0]]
    assert access.audit(before=rest[0].id, limit=3) == rest[1:4]
    assert [entry.subject for entry in access.audit(action="tenant.create")] == ["t4", "t3", "t2", "t1", "t0"]
    assert [entry.action for entry in access.audit(subject="triage@1")] == ["publish"]
    assert access.audit(subject="triage@1", action="tag") == []
    assert access.audit(subject="\0") == access.audit(action="\ud800") == []
    for limit in (0, -1, 10_001):
        with pytest.raises(ConfigError, match="a limit of"):
            access.audit(limit=limit)


def test_who_defaults_to_the_user(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "zoe")
    access.create_tenant("shop")
    assert actions(access) == [("zoe", "tenant.create", "shop")]


def test_a_snapshot_forgets_keys_that_ended_long_ago(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [access.create_key(None)[0] for _ in range(3)]
    access.revoke_key(keys[0].id)
    access.rotate_key(keys[1].id)
    assert {key.id for key in keys} < access.snapshot().keys.keys()
    monkeypatch.setattr("foreword.registry.snapshot.ENDED_FOR", timedelta(0))
    assert keys[2].id in (left := access.snapshot().keys)
    assert not {keys[0].id, keys[1].id} & left.keys()
    assert {key.id for key in keys} < {key.id for key in access.keys()}


def test_a_snapshot_is_of_one_moment(access: Access, place: Place) -> None:
    """A writer adds a tenant, its key and its grant in three transactions; no snapshot shows a later one without
    the earlier ones, and each agrees with its revision."""
    done = threading.Event()
    snapshots: list[Snapshot] = []

    def read() -> None:
        with place.open() as registry:
            while not done.is_set():
                snapshots.append(registry.access.snapshot())

    reader = threading.Thread(target=read)
    reader.start()
    first = access.revision()
    for number in range(15):
        access.create_tenant(f"t{number}")
        access.create_key(f"t{number}")
        access.grant(f"t{number}", "*", "call")
    done.set()
    reader.join()
    assert snapshots
    for snapshot in snapshots:
        assert len(snapshot.tenants) + len(snapshot.keys) + len(snapshot.grants) == snapshot.revision - first
        assert {key.tenant for key in snapshot.keys.values()} <= snapshot.tenants.keys()
        assert snapshot.grants.keys() <= {key.tenant for key in snapshot.keys.values()}


_tenants = st.sampled_from(["a", "b"])
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("create"), _tenants),
        st.tuples(st.just("delete"), _tenants),
        st.tuples(st.just("key"), _tenants),
        st.tuples(st.just("grant"), _tenants, st.sampled_from(["x", "*"]), st.sampled_from(["call", "manage"])),
        st.tuples(st.just("withdraw"), _tenants, st.sampled_from(["x", "*"]), st.sampled_from(["call", "manage"])),
    ),
    max_size=12,
)
_rounds = itertools.count()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_steps)
def test_access_does_what_sets_do(access: Access, steps: list[tuple[Any, ...]]) -> None:
    prefix = f"r{next(_rounds)}-"
    tenants: set[str] = set()
    live: dict[str, str] = {}
    grants: set[tuple[str, str, str]] = set()
    for action, name, *rest in steps:
        tenant = prefix + name
        expected: type[Exception] | None = NotFound
        if (tenant in tenants) != (action == "create"):
            expected = None
        if action == "create":
            expected, call = expected and Conflict, lambda tenant=tenant: access.create_tenant(tenant)
        elif action == "delete":
            call = lambda tenant=tenant: access.delete_tenant(tenant)  # noqa: E731
        elif action == "key":
            call = lambda tenant=tenant: access.create_key(tenant)  # noqa: E731
        else:
            if action == "withdraw" and (tenant, *rest) not in grants:
                expected = NotFound
            call = lambda tenant=tenant, rest=rest, action=action: getattr(access, action)(tenant, *rest)  # noqa: E731
        if expected is not None:
            with pytest.raises(expected):
                call()
            continue
        result = call()
        if action == "create":
            tenants.add(tenant)
        elif action == "delete":
            tenants.remove(tenant)
            live = {id: owner for id, owner in live.items() if owner != tenant}
            grants = {grant for grant in grants if grant[0] != tenant}
        elif action == "key":
            live[result[0].id] = tenant
        else:
            (grants.add if action == "grant" else grants.remove)((tenant, *rest))
    snapshot = access.snapshot()
    mine = {key.id: key for key in snapshot.keys.values() if str(key.tenant).startswith(prefix)}
    assert {name for name in snapshot.tenants if name.startswith(prefix)} == tenants
    assert {id: key.tenant for id, key in mine.items() if key.is_live(snapshot.now)} == live
    held = {(grant.tenant, grant.task, grant.right) for both in snapshot.grants.values() for grant in both}
    assert {grant for grant in held if grant[0].startswith(prefix)} == grants
