"""The admin API over a real registry: who may what, what it answers, what takes effect, what is written down."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreword.registry.access import Access
from foreword.registry.store import Registry
from foreword.serve.access.admin_bodies import MAX_ID
from foreword.serve.gateway import create_app
from tests.serve.artefacts import write_artefact
from tests.serve.fakes import FakeBackend, Served, served


class Stage:
    """A gateway with keys over a registry of two tasks, two versions each; an admin, and a tenant that manages one."""

    running: Served
    admin: httpx.Client
    tenant: httpx.Client

    def __init__(self, access: Access) -> None:
        for old in access.tenants():
            access.delete_tenant(old.name)
        self.admin_key, self.admin_secret = access.create_key(None, name="root")
        access.create_tenant("acme")
        access.grant("acme", "triage", "manage")
        self.tenant_key, self.tenant_secret = access.create_key("acme")

    def create(self, path: str, **body: Any) -> Any:
        found = self.admin.post(f"/admin/v1/{path}", json=body)
        assert found.status_code == 200, found.text
        return found.json()

    def listed(self, path: str, **query: Any) -> list[dict[str, Any]]:
        found = self.admin.get(f"/admin/v1/{path}", params=query)
        assert found.status_code == 200, found.text
        assert found.json()["object"] == "list"
        data: list[dict[str, Any]] = found.json()["data"]
        return data


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("admin")
    with Registry.open(folder / "home") as registry:
        for task in ("triage", "payroll"):
            for seed in (1, 2):
                registry.publish(write_artefact(folder, task, seed=seed))
    return folder / "home"


@pytest.fixture
def stage(home: Path) -> Iterator[Stage]:
    with Registry.open(home) as registry:
        found = Stage(registry.access)
        backend = FakeBackend(fingerprint=registry.resolve("triage").base)
        app = create_app(backend, registry, base_name="base", require_keys=True)
        with (
            served(app, backend) as found.running,
            found.running.client(headers={"authorization": f"Bearer {found.admin_secret}"}) as found.admin,
            found.running.client(headers={"authorization": f"Bearer {found.tenant_secret}"}) as found.tenant,
        ):
            yield found


def error(found: httpx.Response) -> tuple[int, str, str]:
    body = found.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return found.status_code, body["code"], body["message"]


def test_tenants(stage: Stage) -> None:
    made = stage.create("tenants", name="new", limits={"concurrent": 3})
    assert (made["name"], made["limits"]["concurrent"], made["disabled"]) == ("new", 3, False)
    assert [tenant["name"] for tenant in stage.listed("tenants")] == ["acme", "new"]
    both = {"limits": {"tokens_per_minute": 10}, "disabled": True}
    changed = stage.admin.patch("/admin/v1/tenants/new", json=both).json()
    assert changed["disabled"] and changed["limits"]["tokens_per_minute"] == 10
    assert changed["limits"]["concurrent"] is None
    assert error(stage.admin.patch("/admin/v1/tenants/new", json={}))[:2] == (400, "bad_request")
    assert error(stage.admin.post("/admin/v1/tenants", json={"name": "new"}))[:2] == (409, "conflict")
    assert error(stage.admin.post("/admin/v1/tenants", json={"name": "No Name"}))[:2] == (400, "config_error")
    assert stage.admin.delete("/admin/v1/tenants/new").json() == {"deleted": "new"}
    assert error(stage.admin.delete("/admin/v1/tenants/new"))[:2] == (404, "not_found")


def test_a_key_is_good_at_once_and_its_secret_is_told_once(stage: Stage) -> None:
    stage.create("grants", tenant="acme", task="triage", right="call")
    expires = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    made = stage.admin.post("/admin/v1/keys", json={"tenant": "acme", "name": "ci", "expires": expires})
    assert made.headers["cache-control"] == "no-store"
    secret, id = made.json()["key"], made.json()["id"]
    assert secret.startswith(f"{id}_") and datetime.fromisoformat(made.json()["expires"]) == datetime.fromisoformat(
        expires
    )
    with stage.running.client(headers={"authorization": f"Bearer {secret}"}) as client:
        body = {"model": "triage", "prompt": "x"}
        assert client.post("/v1/completions", json=body).status_code == 200
        rotated = stage.admin.post(f"/admin/v1/keys/{id}/rotate", json={"grace_s": 60})
        assert rotated.headers["cache-control"] == "no-store" and rotated.json()["key"] != secret
        assert client.post("/v1/completions", json=body).status_code == 200
        revoked = stage.admin.delete(f"/admin/v1/keys/{id}").json()
        assert revoked["revoked"]
        assert client.post("/v1/completions", json=body).status_code == 401
    everything = stage.admin.get("/admin/v1/keys").text + stage.admin.get("/admin/v1/audit").text
    assert secret not in everything and "secret" not in everything
    assert {key["tenant"] for key in stage.listed("keys", tenant="acme")} == {"acme"}
    assert error(stage.admin.get("/admin/v1/keys", params={"tenant": "nobody"}))[0] == 404


def test_grants(stage: Stage) -> None:
    stage.create("grants", tenant="acme", task="*", right="call")
    rights = [(grant["task"], grant["right"]) for grant in stage.listed("grants", tenant="acme")]
    assert sorted(rights) == [("*", "call"), ("triage", "manage")]
    assert stage.listed("grants", tenant="nobody") == []
    assert stage.admin.delete("/admin/v1/grants/acme/*/call").status_code == 200
    assert error(stage.admin.delete("/admin/v1/grants/acme/*/call"))[0] == 404
    wrong = {"tenant": "acme", "task": "triage", "right": "own"}
    assert "right: " in error(stage.admin.post("/admin/v1/grants", json=wrong))[2]


def test_routes(stage: Stage) -> None:
    canary = {"task": "triage", "kind": "canary", "version": 2, "fraction": 0.25}
    made = stage.admin.put("/admin/v1/routes", json=canary).json()
    assert (made["number"], made["fraction"]) == (2, 0.25) and "salt" not in made
    assert stage.tenant.put("/admin/v1/routes", json={**canary, "fraction": 0.5}).status_code == 200
    assert [route["fraction"] for route in stage.listed("routes")] == [0.5]
    shadow = {**canary, "kind": "shadow", "keep_inputs": True}
    assert error(stage.tenant.put("/admin/v1/routes", json=shadow))[:2] == (403, "forbidden")
    assert error(stage.tenant.put("/admin/v1/routes", json={**canary, "task": "payroll"}))[:2] == (404, "not_found")
    assert stage.tenant.delete("/admin/v1/routes/triage/canary").status_code == 200
    assert error(stage.tenant.delete("/admin/v1/routes/triage/shadow"))[0] == 403
    assert stage.listed("routes") == []


def test_replicas(stage: Stage) -> None:
    url = "http://10.0.0.1:8000"
    stage.create("replicas/drain", url=url)
    assert stage.listed("replicas") == [{"url": url, "is_draining": True}]
    assert stage.running.app.state.gateway.control.snapshot.draining == {url}
    stage.create("replicas/undrain", url=url)
    assert stage.listed("replicas") == []
    assert error(stage.admin.post("/admin/v1/replicas/undrain", json={"url": url}))[0] == 404
    assert error(stage.admin.post("/admin/v1/replicas/drain", json={"url": "nowhere"}))[0] == 400


def test_a_tenant_manages_its_task_and_hears_of_no_other(stage: Stage) -> None:
    assert [task["name"] for task in stage.tenant.get("/admin/v1/tasks").json()["data"]] == ["triage"]
    assert [task["name"] for task in stage.listed("tasks")] == ["payroll", "triage"]
    versions = stage.tenant.get("/admin/v1/tasks/triage/versions").json()["data"]
    assert [version["number"] for version in versions] == [1, 2]
    for number in (1, 2):
        moved = stage.tenant.post("/admin/v1/tasks/triage/promote", json={"version": number, "why": "better"})
        assert (moved.status_code, moved.json()["to"], moved.json()["why"]) == (200, number, "better")
    assert moved.json()["who"] == f"{stage.tenant_key.id} (acme)"
    back = stage.tenant.post("/admin/v1/tasks/triage/rollback", json={"expect": 2}).json()
    assert (back["from"], back["to"]) == (2, 1)
    assert error(stage.tenant.post("/admin/v1/tasks/triage/rollback", json={"expect": 2}))[:2] == (409, "conflict")
    assert stage.tenant.put("/admin/v1/tasks/triage/aliases/next", json={"version": "prod"}).json()["to"] == 1
    named = stage.tenant.get("/admin/v1/tasks/triage/aliases").json()["data"]
    assert named == [{"alias": "next", "number": 1}, {"alias": "prod", "number": 1}]
    assert stage.tenant.delete("/admin/v1/tasks/triage/aliases/next").status_code == 200
    said = set()
    for task in ("payroll", "nothing"):
        for method, path, body in (
            ("GET", "versions", None),
            ("GET", "aliases", None),
            ("POST", "promote", {"version": 1}),
            ("POST", "rollback", {}),
            ("PUT", "aliases/prod", {"version": 1}),
            ("DELETE", "aliases/prod", None),
        ):
            found = stage.tenant.request(method, f"/admin/v1/tasks/{task}/{path}", json=body)
            said.add((found.status_code, found.text.replace(task, "TASK")))
    assert len(said) == 1 and "payroll" not in str(said) and next(iter(said))[0] == 404
    stage.create("grants", tenant="acme", task="later", right="manage")
    unpublished = stage.tenant.get("/admin/v1/tasks/later/versions")
    assert error(unpublished)[2] == "no task 'later'"
    for method, path in (
        ("GET", "tenants"),
        ("GET", "keys"),
        ("GET", "grants"),
        ("GET", "routes"),
        ("GET", "replicas"),
        ("GET", "audit"),
        ("GET", "usage"),
        ("POST", "tenants"),
        ("POST", "keys"),
        ("POST", "grants"),
        ("POST", "replicas/drain"),
        ("DELETE", "tenants/acme"),
        ("DELETE", f"keys/{stage.admin_key.id}"),
        ("DELETE", "grants/acme/triage/manage"),
    ):
        assert error(stage.tenant.request(method, f"/admin/v1/{path}", json=None))[:2] == (403, "forbidden"), path


def test_a_promotion_is_in_force_when_it_is_answered(stage: Stage) -> None:
    for number in (2, 1, 2):
        stage.admin.post("/admin/v1/tasks/triage/promote", json={"version": number}).raise_for_status()
        found = stage.admin.post("/v1/completions", json={"model": "triage", "prompt": "x"})
        assert found.headers["x-foreword-version"] == f"triage@{number}"


def test_audit_and_use(stage: Stage) -> None:
    stage.create("grants", tenant="acme", task="triage", right="call")
    entries = stage.listed("audit", limit=1)
    assert (entries[0]["who"], entries[0]["action"], entries[0]["subject"]) == (stage.admin_key.id, "grant", "acme")
    older = stage.listed("audit", before=entries[0]["id"], action="tenant.create", limit=1)
    assert older[0]["id"] < entries[0]["id"] and older[0]["subject"] == "acme"
    assert stage.listed("audit", subject="nobody") == []
    stage.tenant.post("/v1/completions", json={"model": "triage", "prompt": "x"})
    use = stage.listed("usage")
    assert [(use["tenant"], use["requests"], use["tokens"], use["running"]) for use in use] == [("acme", 1, 9, 0)]
    assert use[0]["limits"]["concurrent"] is None


def test_bodies_and_queries_are_strict(stage: Stage) -> None:
    for body, param in (
        ({"name": "x", "colour": 1}, "colour"),
        ({}, "name"),
        ({"name": 7}, "name"),
        ({"name": "x", "limits": {"concurrent": "3"}}, "limits.concurrent"),
        ({"name": "x", "limits": {"concurrent": 0}}, "limits.concurrent"),
        ({"name": "a\0b"}, "name"),
    ):
        found = stage.admin.post("/admin/v1/tenants", json=body)
        assert (found.status_code, found.json()["error"]["param"]) == (400, param), found.text
    for query in ({"limit": 0}, {"limit": "x"}, {"before": MAX_ID + 1}, {"since": 1}, {"action": "a\0b"}):
        assert stage.admin.get("/admin/v1/audit", params=query).status_code == 400, query
    assert stage.admin.get("/admin/v1/audit?limit=1&limit=2").status_code == 400
    assert stage.admin.get("/admin/v1/tenants?x=1").status_code == 400
    assert stage.admin.get("/admin/v1/tasks/a%00b/versions").status_code == 404
    assert stage.admin.post("/admin/v1/tenants", content=b" " * 100_000).status_code == 413
    assert stage.admin.post("/admin/v1/keys", json={"name": "x"}).json()["error"]["param"] == "tenant"
    late = {"tenant": None, "expires": "2020-01-01T00:00:00Z"}
    assert error(stage.admin.post("/admin/v1/keys", json=late))[:2] == (400, "config_error")
    naive = {"tenant": None, "expires": "2100-01-01T00:00:00"}
    assert stage.admin.post("/admin/v1/keys", json=naive).json()["error"]["param"] == "expires"


def test_without_keys_there_is_no_admin_api(home: Path) -> None:
    with Registry.open(home) as registry:
        backend = FakeBackend(fingerprint=registry.resolve("triage").base)
        with served(create_app(backend, registry, base_name="base"), backend) as running, running.client() as client:
            for method, path in (("GET", "tenants"), ("POST", "tasks/triage/promote")):
                found = client.request(method, f"/admin/v1/{path}", json={"version": 1})
                assert error(found)[:2] == (403, "forbidden") and "--require-keys" in found.text
            assert client.get("/metrics").status_code == 200
            assert client.get("/v1/models").status_code == 200


def test_a_method_that_is_not_served_is_told_those_that_are(stage: Stage) -> None:
    found = stage.admin.request("PUT", "/admin/v1/tenants/acme")
    assert error(found)[:2] == (405, "invalid_path") and found.headers["allow"] == "DELETE, PATCH"
