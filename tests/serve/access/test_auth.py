"""Keys and grants: who is refused, what a tenant can learn of others, what becomes of open answers."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreword.errors import Forbidden, ServeError, Unauthorized
from foreword.registry.access_records import Grant
from foreword.registry.store import Registry
from foreword.serve.access import auth
from foreword.serve.access.auth import Guard, Principal, authenticate
from foreword.serve.access.control import Control
from foreword.serve.gateway import create_app
from tests.serve.fakes import FakeBackend, FakeRegistry, Served, served, version
from tests.serve.fakes_access import SECRET, START, FakeAccess

TEXT = "a valid API key is needed. Send `Authorization: Bearer <key>` with a key that is neither expired nor revoked."


class Stage:
    """A gateway that requires keys, over fakes."""

    def __init__(self, running: Served, backend: FakeBackend, access: FakeAccess) -> None:
        self.running, self.backend, self.access = running, backend, access
        self.gateway = running.app.state.gateway

    @contextmanager
    def as_(self, key: str | None) -> Iterator[httpx.Client]:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        with self.running.client(headers=headers) as client:
            yield client

    def complete(self, key: str | None, model: str = "triage", **fields: Any) -> httpx.Response:
        with self.as_(key) as client:
            return client.post("/v1/completions", json={"model": model, "prompt": "x", **fields})

    def sync(self) -> None:
        """Wait until the gateway has seen the newest change."""
        revision = self.access.data.revision
        wait_for(lambda: self.gateway.control.snapshot.revision == revision)


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@contextmanager
def keyed(access: FakeAccess, *names: str, backend: FakeBackend | None = None) -> Iterator[Stage]:
    backend = backend or FakeBackend()
    registry = FakeRegistry(*(version(name, 1) for name in names or ("triage", "payroll")))
    control = Control(access, poll_s=0.02)
    app = create_app(backend, registry, base_name="base", control=control, require_keys=True)
    with served(app, backend) as running:
        yield Stage(running, backend, access)
    assert backend.num_running == 0


def refusal(access: FakeAccess, authorization: str | None) -> str:
    with pytest.raises(Unauthorized) as caught:
        authenticate(access.snapshot(), access.now, authorization)
    assert str(caught.value) == str(Unauthorized("missing"))
    return caught.value.reason


def test_keys() -> None:
    access = FakeAccess()
    access.add_tenant("acme")
    access.add_tenant("gone", disabled=True)
    mine, admins = access.add_key("acme", "a", expires_s=60), access.add_key(None, "b")
    disabled, orphan, revoked = (
        access.add_key(name, id) for name, id in (("gone", "c"), ("deleted", "d"), ("acme", "e"))
    )
    access.revoke(revoked)
    found = authenticate(access.snapshot(), access.now, f"bearer  {mine} ")
    assert found == Principal(tenant="acme", key_id=mine[:13]) and not found.is_admin
    assert authenticate(access.snapshot(), access.now, f"Bearer {admins}").is_admin
    wrong = {
        None: "missing",
        "": "missing",
        "Bearer": "missing",
        f"Basic {mine}": "missing",
        mine: "missing",
        f"Bearer fw_zzzzzzzzzz_{SECRET}": "unknown",
        f"Bearer {mine[:-1]}": "wrong",
        f"Bearer {mine}x": "wrong",
        f"Bearer {mine[:13]}": "wrong",
        f"Bearer {mine}{'x' * 10_000}": "wrong",
        "Bearer \udcff\u00e9": "unknown",
        f"Bearer {disabled}": "disabled",
        f"Bearer {orphan}": "disabled",
        f"Bearer {revoked}": "revoked",
    }
    for header, reason in wrong.items():
        assert refusal(access, header) == reason, header
    access.now += timedelta(seconds=60)
    assert refusal(access, f"Bearer {mine}") == "expired"


def test_a_key_that_does_not_exist_costs_the_same_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    access = FakeAccess()
    key = access.add_key(None)
    compared: list[tuple[int, int]] = []
    original = hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append((len(a), len(b)))
        return original(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    for presented in (None, f"Bearer fw_zzzzzzzzzz_{SECRET}", f"Bearer {key}x"):
        refusal(access, presented)
    authenticate(access.snapshot(), access.now, f"Bearer {key}")
    assert compared == [(64, 64)] * 4


def test_grants() -> None:
    access = FakeAccess()
    access.add_tenant("acme", "triage")
    access.add_tenant("all", "*")
    access.change(grants={**access.data.grants, "boss": (Grant(tenant="boss", task="triage", right="manage"),)})

    async def main() -> None:
        control = Control(access)
        guard = Guard(control, requires_keys=True)
        await control.refresh()
        acme, everything, boss = (Principal(tenant=name) for name in ("acme", "all", "boss"))
        assert guard.may(acme, "call", "triage") and not guard.may(acme, "call", "payroll")
        assert not guard.may(acme, "manage", "triage")
        assert guard.may(everything, "call", "payroll") and not guard.may(everything, "manage", "payroll")
        assert guard.may(boss, "manage", "triage") and not guard.may(boss, "call", "triage")
        assert guard.may(Principal(is_admin=True), "call", "payroll")
        assert not guard.may(Principal(), "call", "triage")
        access.change(grants={})
        await control.refresh()
        assert not guard.may(acme, "call", "triage")
        control.close()

    asyncio.run(main())


def test_keys_need_a_registry_that_has_them() -> None:
    with pytest.raises(ServeError, match="this registry has none"):
        create_app(FakeBackend(), FakeRegistry(), base_name="base", require_keys=True)


def test_over_http() -> None:
    access = FakeAccess()
    access.add_tenant("acme", "triage")
    mine, admins = access.add_key("acme"), access.add_key(None, "b")
    with keyed(access) as stage:
        for path in ("/v1/models", "/v1/models/triage", "/metrics", "/admin/v1/tenants"):
            with stage.as_("fw_nobody") as client:
                found = client.get(path)
            if path.startswith("/admin"):
                continue  # a Registry has an admin API; these are fakes
            assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
            assert found.json()["error"]["message"] == TEXT
        assert stage.complete(None).json()["error"]["message"] == TEXT
        assert stage.complete(mine).status_code == 200
        assert stage.complete(admins, "payroll").status_code == 200
        with stage.as_(mine) as client:
            assert client.get("/metrics").status_code == Forbidden.status
            assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["triage"]
        with stage.as_(admins) as client:
            assert client.get("/metrics").status_code == 200
            assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["base", "payroll", "triage"]
        with stage.as_(None) as client:
            for path in ("/health", "/ready"):
                text = client.get(path)
                assert text.status_code == 200 and "triage" not in text.text and "base" not in text.text
        assert [caller.scope for caller in stage.backend.callers] == ["acme", ""]


def test_what_is_not_granted_does_not_exist() -> None:
    """Text, status and headers are the same, and the registry is asked for neither."""
    access = FakeAccess()
    access.add_tenant("acme", "triage")
    mine = access.add_key("acme")
    with keyed(access) as stage:
        asked = stage.running.app.state.gateway.names.source
        before = asked.num_queries
        answers = []
        for name in ("payroll", "paybill"):
            for model in (name, f"{name}@7", f"{name}@prod", f"{name}@prod@x"):
                found = stage.complete(mine, model)
                shown = stage.complete(mine, model, stream=True)
                assert found.json() == shown.json()
                headers = {key: value for key, value in found.headers.items() if key not in ("x-request-id", "date")}
                answers.append((found.status_code, found.text.replace(name, "NAME"), headers.keys()))
        assert len(answers) == 8
        assert all(mine == theirs for mine, theirs in zip(answers[:4], answers[4:], strict=True))
        assert answers[0][0] == 404 and "payroll" not in answers[0][1]
        assert asked.num_queries == before
        for model in ("base", "sha256:" + "0" * 64):
            assert stage.complete(mine, model).status_code == 404
        assert stage.complete(mine, "triage").status_code == 200
        near = stage.complete(mine, "payrol").json()["error"]["message"]
        assert "payroll" not in near and "triage" in near
        missing = stage.complete(mine, "triage@99").json()["error"]
        assert missing["message"].startswith("no model 'triage@99'") and missing["code"] == "model_not_found"


def test_a_digest_names_only_what_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    access = FakeAccess()
    access.add_tenant("acme", "triage")
    mine, admins = access.add_key("acme"), access.add_key(None, "b")
    by_digest = {f"sha256:{letter * 64}": version(task, 1) for letter, task in (("a", "triage"), ("b", "payroll"))}
    with keyed(access) as stage:
        asked = stage.gateway.names.source
        answer = asked.resolve
        monkeypatch.setattr(asked, "resolve", lambda name: by_digest[name] if name in by_digest else answer(name))
        granted, other = by_digest
        assert stage.complete(mine, granted).headers["x-foreword-version"] == "triage@1"
        refused, unknown = stage.complete(mine, other), stage.complete(mine, f"sha256:{'c' * 64}")
        assert refused.status_code == unknown.status_code == 404
        assert refused.text.replace("b" * 64, "") == unknown.text.replace("c" * 64, "")
        assert "x-foreword-version" not in refused.headers
        assert stage.complete(admins, other).headers["x-foreword-version"] == "payroll@1"


def test_the_base_is_granted_by_its_name() -> None:
    access = FakeAccess()
    access.add_tenant("acme", "base")
    access.add_tenant("all", "*")
    mine, everything = access.add_key("acme"), access.add_key("all", "b")
    with keyed(access) as stage:
        assert stage.complete(mine, "base").status_code == 200
        assert stage.complete(mine, "triage").status_code == 404
        assert stage.complete(everything, "base").status_code == 200
        assert stage.complete(everything, "payroll").status_code == 200


def without(held: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in held.items() if key != name}


ENDINGS: dict[str, Callable[[FakeAccess, str], object]] = {
    "revoked": lambda access, key: access.revoke(key),
    "expired": lambda access, key: access.change(
        keys={
            id: dataclasses.replace(found, expires=START + timedelta(milliseconds=1))
            for id, found in access.data.keys.items()
        }
    ),
    "disabled": lambda access, key: access.add_tenant("acme", "triage", disabled=True),
    "withdrawn": lambda access, key: access.change(grants=without(access.data.grants, "acme")),
    "deleted": lambda access, key: access.change(tenants=without(access.data.tenants, "acme")),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("stream", [True, False])
def test_open_answers_end_when_the_key_does(ending: str, stream: bool) -> None:
    """Within a second, with an error; the engine's work ends too, and another tenant's goes on."""
    access, backend = FakeAccess(), FakeBackend(words=("word ",) * 2000, delay_s=0.005)
    access.add_tenant("acme", "triage")
    access.add_tenant("other", "triage")
    mine, others = access.add_key("acme"), access.add_key("other", "b")
    if ending == "expired":
        others = access.add_key(None, "c")
    ended = threading.Event()
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(stage.complete(mine, stream=stream))
        ended.set()

    with keyed(access, backend=backend) as stage:
        with stage.as_(others if ending != "expired" else mine) as client:
            bystander = {"model": "triage", "prompt": "x", "stream": True}
            with client.stream("POST", "/v1/completions", json=bystander) as theirs:
                lines = theirs.iter_lines()
                next(lines)
                asker = threading.Thread(target=ask)
                asker.start()
                wait_for(lambda: backend.num_running == 2)
                ENDINGS[ending](access, mine)
                assert ended.wait(1.0)
                asker.join()
                if ending != "expired":
                    wait_for(lambda: backend.num_aborted == 1)
                    seen = next(line for line in lines if line)
                    assert "word" in seen or "sha-triage" in seen
        answer = answers[0]
        status = 404 if ending == "withdrawn" else 401
        if stream:
            assert answer.status_code == 200 and "data: [DONE]" not in answer.text
            error = json.loads(answer.text.strip().rpartition("data: ")[2])["error"]
        else:
            assert answer.status_code == status
            error = answer.json()["error"]
        assert error["code"] == ("model_not_found" if status == 404 else "unauthorized")
        assert stage.complete(mine).status_code == status
    assert backend.num_aborted == 2


def test_a_dead_database_ends_no_stream_but_takes_no_new_request(monkeypatch: pytest.MonkeyPatch) -> None:
    access, backend = FakeAccess(), FakeBackend(words=("word ",) * 40, delay_s=0.01)
    access.add_tenant("acme", "triage")
    mine = access.add_key("acme")
    with keyed(access, backend=backend) as stage, stage.as_(mine) as client:
        body = {"model": "triage", "prompt": "x", "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            access.failure = RuntimeError("gone")
            monkeypatch.setattr(stage.gateway.control, "stale_s", 0.0)
            refused = stage.complete(mine)
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "unavailable"
            with stage.as_(None) as nobody:
                assert nobody.get("/ready").json()["reasons"] == ["the registry does not answer"]
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_with_a_real_registry(tmp_path: Path) -> None:
    """Two gateways over one database: a revocation by one hand ends a stream on the other within a second."""
    with Registry.open(tmp_path / "home") as registry:
        registry.access.create_tenant("acme")
        registry.access.grant("acme", "triage", "call")
        key, secret = registry.access.create_key("acme")
        backends = [FakeBackend(words=("word ",) * 2000, delay_s=0.005) for _ in range(2)]
        apps = [
            create_app(
                backend,
                FakeRegistry(version("triage", 1)),
                base_name="base",
                control=Control(registry.access),
                require_keys=True,
            )
            for backend in backends
        ]
        headers = {"authorization": f"Bearer {secret}"}
        with served(apps[0], backends[0]) as first, served(apps[1], backends[1]) as second:
            body = {"model": "triage", "prompt": "x", "stream": True}
            with (
                first.client(headers=headers) as one,
                second.client(headers=headers) as two,
                one.stream("POST", "/v1/completions", json=body) as left,
                two.stream("POST", "/v1/completions", json=body) as right,
            ):
                streams = [left.iter_lines(), right.iter_lines()]
                for lines in streams:
                    next(lines)
                registry.access.revoke_key(key.id)
                revoked = time.monotonic()
                for lines in streams:
                    assert "unauthorized" in [line for line in lines if line][-1]
                assert time.monotonic() - revoked < 1.0
        assert [backend.num_aborted for backend in backends] == [1, 1]
