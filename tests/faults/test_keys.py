"""Faults 14 and 15: a tenant that guesses what others have, and keys that end under open answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from foreword.serve.vllm.wire import cache_salt, scope_of
from tests.faults.client import Answer, Asker, together, until
from tests.faults.stage import Database, EngineProcess, Gateway, Stage, database_url, staged, wait_until

pytestmark = pytest.mark.slow
CUT_S = 1.5
"""An answer under way ends this soon after its key: every 0.3 s the gateway asks the registry and looks at all that is
open; the rest of the second is for a busy machine, and the half second for this test."""


class Room:
    """A gateway with one engine; the tenant `acme` may call `triage` and `shared`, `evil` only `shared`."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.versions = {
            name: stage.publish(name, alias=alias) for name, alias in (("triage", "prod"), ("shared", None))
        }
        stage.registry.tag("triage@1", "hidden")
        self.engine: EngineProcess = stage.engine()
        self.gateway: Gateway = stage.gateway(self.engine)
        self.acme = stage.tenant("acme", "triage", "shared", "base-3m")
        self.evil = stage.tenant("evil", "shared")
        for task in ("triage", "shared"):
            stage.registry.access.grant("acme", task, "manage")
        wait_until(lambda: self.one(self.acme).status == 200)
        with self.gateway.client(self.acme) as client:  # the last change, so all before it are known, too
            wait_until(lambda: client.get("/admin/v1/tasks/shared/versions").status_code == 200)

    def one(self, key: str, **body: Any) -> Answer:
        return together(self.gateway, key, lambda asker: asker.ask(**body))


BOTH = [pytest.param("sqlite"), pytest.param("postgresql", marks=pytest.mark.postgres)]


@pytest.fixture(scope="module", params=BOTH)
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    kind: Database = request.param
    with database_url(kind) as url, staged(tmp_path_factory.mktemp("keys"), database_url=url) as stage:
        yield Room(stage)


Pair = tuple[str, str]
NOBODYS = "f" * 64


def guesses(room: Room) -> list[Pair]:
    """Pairs of a name that another tenant has and one that nobody has; they differ in their letters alone."""
    sha256 = room.versions["triage"].sha256
    return [
        ("triage", "trjage"),
        ("triage@1", "trjage@1"),
        ("triage@prod", "trjage@prod"),
        ("triage@hidden", "trjage@hidden"),
        ("triage@99", "trjage@99"),
        (f"sha256:{sha256}", f"sha256:{NOBODYS}"),
        ("base-3m", "base-4m"),
    ]


def told(room: Room, key: str, name: str, method: str, path: str, body: Any) -> tuple[int, str, tuple[str, ...]]:
    """Return status, body and header names of an answer; the guessed name reads NAME wherever it stands."""
    with room.gateway.client(key) as client:
        answer = client.request(method, path.replace("NAME", name), json=_named(body, name))
    text = answer.text.replace(json.dumps(name)[1:-1], "NAME")
    return answer.status_code, text, tuple(sorted(answer.headers))


def _named(body: Any, name: str) -> Any:
    return None if body is None else json.loads(json.dumps(body).replace("NAME", name))


ASKED = [
    ("POST", "/v1/completions", {"model": "NAME", "prompt": "x", "max_tokens": 1}),
    ("POST", "/v1/completions", {"model": "NAME", "prompt": "x", "max_tokens": 1, "stream": True}),
    ("POST", "/v1/completions", {"model": "NAME", "prompt": "x", "max_tokens": 10**9}),
    ("POST", "/v1/chat/completions", {"model": "NAME", "messages": [{"role": "user", "content": "x"}]}),
    ("GET", "/v1/models/NAME", None),
]
MANAGED = [
    ("GET", "/admin/v1/tasks/NAME/versions", None),
    ("GET", "/admin/v1/tasks/NAME/aliases", None),
    ("POST", "/admin/v1/tasks/NAME/promote", {"version": 1}),
    ("POST", "/admin/v1/tasks/NAME/promote", {"version": "hidden"}),
    ("POST", "/admin/v1/tasks/NAME/rollback", {}),
    ("PUT", "/admin/v1/tasks/NAME/aliases/prod", {"version": 1}),
    ("DELETE", "/admin/v1/tasks/NAME/aliases/hidden", None),
    ("PUT", "/admin/v1/routes", {"task": "NAME", "kind": "canary", "version": 1, "fraction": 0.5}),
    ("DELETE", "/admin/v1/routes/NAME/canary", None),
]
OF_TENANTS = [
    ("PATCH", "/admin/v1/tenants/NAME", {"disabled": True}),
    ("DELETE", "/admin/v1/tenants/NAME", None),
    ("GET", "/admin/v1/keys?tenant=NAME", None),
    ("GET", "/admin/v1/grants?tenant=NAME", None),
    ("POST", "/admin/v1/keys", {"tenant": "NAME"}),
    ("POST", "/admin/v1/grants", {"tenant": "NAME", "task": "triage", "right": "call"}),
    ("DELETE", "/admin/v1/grants/NAME/triage/call", None),
]


def test_what_others_have_and_what_nobody_has_are_one(room: Room) -> None:
    """Proves `Guard.check`, `check_target`, `unknown` and the admin API's `manager`: a guess teaches nothing."""
    before = len(room.engine.seen)
    history, keys = room.stage.registry.history("triage"), room.stage.registry.access.keys()
    for theirs, nobodys in guesses(room):
        for method, path, body in ASKED:
            answers = [told(room, room.evil, name, method, path, body) for name in (theirs, nobodys)]
            assert answers[0] == answers[1], (theirs, method, path)
            assert answers[0][0] == 404 and "triage" not in answers[0][1]
        if "@" in theirs or ":" in theirs:
            continue
        for method, path, body in MANAGED:
            answers = [told(room, room.evil, name, method, path, body) for name in (theirs, nobodys)]
            assert answers[0] == answers[1] and answers[0][0] == 404, (theirs, method, path)
    for method, path, body in OF_TENANTS:
        answers = [told(room, room.evil, name, method, path, body) for name in ("acme", "nobody")]
        assert answers[0] == answers[1] and answers[0][0] == 403, (method, path)
    with room.gateway.client(room.acme) as client:
        assert (
            client.get("/admin/v1/tasks/triage/versions").json()["data"][0]["sha256"] == room.versions["triage"].sha256
        )
    with room.gateway.client(room.evil) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["shared"]
        assert client.get("/admin/v1/tasks").json()["data"] == []
        for path in ("tenants", "keys", "grants", "routes", "replicas", "audit", "usage"):
            assert client.get(f"/admin/v1/{path}").status_code == 403, path
        assert client.get("/metrics").status_code == 403
    assert len(room.engine.seen) == before  # no guess reached an engine
    assert room.stage.registry.history("triage") == history and room.stage.registry.access.keys() == keys


def test_keys_that_are_none(room: Room) -> None:
    """Proves one text for every fault of a key: made up, cut, of another secret, none at all."""
    faults = ["", "fw_aaaaaaaaaa_" + "x" * 43, room.acme[:-1], room.acme[:14] + room.evil[14:], room.acme + "x", "é"]
    answers = set()
    for key in faults:
        with room.gateway.client() as client:
            header = {"authorization": f"Bearer {key}".encode()} if key else {}
            body = {"model": "triage", "prompt": "x"}
            for answer in (
                client.post("/v1/completions", json=body, headers=header),
                client.get("/v1/models", headers=header),
                client.get("/admin/v1/tenants", headers=header),
            ):
                answers.add((answer.status_code, answer.text, answer.headers.get("www-authenticate")))
    assert len(answers) == 1 and next(iter(answers))[0] == 401


def test_no_cached_block_is_shared_between_tenants_or_versions(room: Room) -> None:
    """Proves `Caller.scope` and the salts: what vLLM is told differs by tenant and version, and is no client's say."""
    second = room.stage.publish("shared")
    asked = [
        (room.acme, "shared@1"),
        (room.evil, "shared@1"),
        (room.acme, second.reference),
        (room.acme, "triage"),
        (room.acme, "base-3m"),
        (room.stage.tenant("other", "base-3m"), "base-3m"),
    ]
    salts = []
    for key, model in asked:
        wait_until(lambda key=key, model=model: room.one(key, model=model).status == 200)
        body = room.engine.seen[-1]["body"]
        salts.append(body["cache_salt"])
        wanted = body.get("kv_transfer_params", {}).get("foreword")
        assert wanted is None or body["cache_salt"] == cache_salt(wanted["scope"], wanted["sha256"])
    assert len(set(salts)) == len(asked)
    assert salts[0] == cache_salt(scope_of("acme"), room.stage.compiled["shared@1"])
    before = len(room.engine.seen)
    for field, value in (
        ("cache_salt", salts[0]),
        ("kv_transfer_params", {"foreword": {"sha256": NOBODYS, "positions": 1, "scope": NOBODYS}}),
        ("prompt_embeds", "AAAA"),
        ("vllm_xargs", {"kv_transfer_params": {}}),
        ("extra_args", {"kv_transfer_params": {}}),
        ("skip_reading_prefix_cache", True),
        ("prompt_logprobs", 1),
        ("add_special_tokens", False),
        ("lora_request", {}),
    ):
        answer = room.one(room.evil, model="shared", **{field: value})
        assert answer.status == 400 and answer.error is not None and field in answer.error["message"]
    assert len(room.engine.seen) == before
    headers = {"x-tenant": "acme", "x-foreword-tenant": "acme", "cookie": "a=b", "x-scope": scope_of("acme")}
    with room.gateway.client(room.evil) as client:
        body = {"model": "shared@1", "prompt": "hello", "max_tokens": 5}
        assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
    seen = room.engine.seen[-1]
    assert seen["body"]["cache_salt"] == salts[1] and not headers.keys() & seen["headers"].keys()
    assert "authorization" not in seen["headers"]


Ending = Callable[[Stage, str, str], object]
ENDINGS: dict[str, Ending] = {
    "revoked": lambda stage, tenant, key: stage.registry.access.revoke_key(key[:13]),
    "rotated": lambda stage, tenant, key: stage.registry.access.rotate_key(key[:13]),
    "disabled": lambda stage, tenant, key: stage.registry.access.set_disabled(tenant, True),
    "withdrawn": lambda stage, tenant, key: stage.registry.access.withdraw(tenant, "triage", "call"),
    "deleted": lambda stage, tenant, key: stage.registry.access.delete_tenant(tenant),
    "expired": lambda stage, tenant, key: None,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_open_answers_end_with_their_key(room: Room, ending: str) -> None:
    """Proves `Gateway.tick`: streams get an error event, whole answers a status, the engine is told to give up."""
    tenant = f"tenant-{ending}"
    expires = datetime.now(UTC) + timedelta(seconds=6) if ending == "expired" else None
    key = room.stage.tenant(tenant, "triage", expires=expires)
    aborted = room.engine.told(interval_s=0.05)["aborted"]

    async def cut(asker: Asker) -> tuple[list[Answer], list[float]]:
        begun = await asker.streams(2, max_tokens=2000)
        begun.append(asker.begin(max_tokens=2000))
        neighbour = Asker(room.gateway, room.acme, asker.session)
        (other, task), *_ = await neighbour.streams(1, max_tokens=2000)
        await until(lambda: room.engine.running == 4)
        if expires is not None:
            await asyncio.sleep((expires - datetime.now(UTC)).total_seconds())
        else:
            await asyncio.to_thread(ENDINGS[ending], room.stage, tenant, key)
        started, took = time.monotonic(), []
        for _, each in begun:
            await asyncio.wait_for(each, 10)
            took.append(time.monotonic() - started)
        assert not task.done() and other.error is None
        task.cancel()
        return [answer for answer, _ in begun], took

    wait_until(lambda: room.one(key).status == 200)
    answers, took = together(room.gateway, key, cut)
    assert max(took) < CUT_S
    for answer in answers:
        assert answer.error is not None and not (answer.is_whole and answer.status == 200)
        assert answer.error["code"] == ("model_not_found" if ending == "withdrawn" else "unauthorized")
    assert answers[-1].status == (404 if ending == "withdrawn" else 401)
    wait_until(lambda: room.engine.told()["aborted"] == aborted + 4, 3)
    assert room.one(key).status == (404 if ending == "withdrawn" else 401)
    room.engine.told(interval_s=0.005)
