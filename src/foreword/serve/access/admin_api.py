"""The admin API: tenants, keys, grants, routes, replicas, aliases, audit, use. Works only where keys are required.

An admin key (one without a tenant) may all. A tenant's key may move the aliases and the canary of tasks that the tenant
was granted to manage; it is told of other tasks what it is told of those that do not exist. What is changed here is in
force on this gateway when the answer comes, and on the others within a second. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from foreword.errors import BadRequest, Forbidden, NotFound, RegistryError, Unavailable
from foreword.registry.records import is_text
from foreword.registry.store import Registry
from foreword.serve.access.admin_bodies import (
    AliasBody,
    AuditQuery,
    GrantBody,
    KeysQuery,
    NewKey,
    NewTenant,
    NoQuery,
    Promotion,
    Query,
    ReplicaBody,
    Rollback,
    Rotation,
    RouteBody,
    TenantChange,
)
from foreword.serve.access.auth import Principal
from foreword.serve.access.limits import NOTHING
from foreword.serve.http.exchange import read_body
from foreword.serve.http.openai_api import Strict, checked, parse_model
from foreword.serve.http.openai_errors import InvalidBody
from foreword.serve.http.openapi import documented

if TYPE_CHECKING:
    from foreword.serve.gateway import Gateway

ROOT = "/admin/v1"
MAX_BODY_BYTES = 2**16
SECRET = {"cache-control": "no-store"}

T = TypeVar("T")
B = TypeVar("B", bound=Strict)
Q = TypeVar("Q", bound=Query)


class Desk:
    """Asks who comes, reads what they want, has the registry do it."""

    def __init__(self, gateway: Gateway, registry: Registry) -> None:
        self.gateway = gateway
        self.registry = registry
        self.access = registry.access
        self._threads = ThreadPoolExecutor(4, "foreword-admin")

    def principal(self, request: Request) -> Principal:
        """Return who asks. Raises Forbidden where no keys are required, Unauthorized."""
        if not self.gateway.guard.requires_keys:
            raise Forbidden(
                "the admin API needs keys, and this server asks for none",
                hint="Serve with --require-keys, or use the foreword command on the registry's machine.",
            )
        return self.gateway.guard.principal(request.headers.get("authorization"))

    def admin(self, request: Request) -> Principal:
        """Return who asks. Raises Forbidden for a tenant's key."""
        principal = self.principal(request)
        if not principal.is_admin:
            raise Forbidden("this needs an admin key", hint="A tenant's key may manage tasks that were granted to it.")
        return principal

    def manager(self, request: Request, task: str) -> Principal:
        """Return who asks. Raises NotFound where they may not manage the task, whether it exists or not."""
        principal = self.principal(request)
        if not self.gateway.guard.may(principal, "manage", task):
            raise NotFound(f"no task {task[:80]!r}")
        return principal

    def managed(self, request: Request) -> tuple[Principal, str]:
        """Return who asks, and the task of the path that they may manage. Raises NotFound as `manager`."""
        task = _part(request, "task")
        return self.manager(request, task), task

    async def body(self, request: Request, kind: type[B]) -> B:
        """Read a body. An empty one is read as {}."""
        data = await read_body(request, MAX_BODY_BYTES, self.gateway.pending)
        return parse_model(kind, data or b"{}")

    def query(self, request: Request, kind: type[Q]) -> Q:
        """Read the query string. Raises InvalidBody for what is unknown or given twice."""
        pairs = request.query_params.multi_items()
        if len(pairs) != len(found := dict(pairs)):
            raise InvalidBody("a query parameter is given twice", hint="Give it once.")
        return checked(kind, found)

    async def ask(self, work: Callable[..., T], *args: Any, hides: bool = False, **options: Any) -> T:
        """Have the registry do something, in a thread.

        Raises what it raises, Unavailable where its database fails. `hides` leaves the near names out of a NotFound:
        they may be other tenants'.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *args, **options))
        except NotFound as error:
            raise (NotFound(error.message) if hides else error) from None
        except RegistryError as error:
            raise (Unavailable(error.message, hint=error.hint) if type(error) is RegistryError else error) from error

    async def do(self, principal: Principal, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """Have the registry change something in a principal's name; then it is in force here."""
        done = await self.ask(work, *args, who=principal.who, hides=not principal.is_admin, **options)
        with contextlib.suppress(RegistryError):  # then it is noticed a moment later, as on the other gateways
            await self.gateway.control.refresh()
        return done


def add_admin(app: FastAPI, gateway: Gateway, registry: Registry) -> None:
    """Add the admin API."""
    desk = Desk(gateway, registry)
    _add_tenants(app, desk)
    _add_keys(app, desk)
    _add_grants(app, desk)
    _add_routes(app, desk)
    _add_replicas(app, desk)
    _add_tasks(app, desk)
    _add_aliases(app, desk)
    _add_reports(app, desk)


def _part(request: Request, name: str) -> str:
    """Return a part of the path. Raises NotFound where it can be no name."""
    value = str(request.path_params[name])
    if not is_text(value):
        raise NotFound(f"no {name} of this name")
    return value


def _listed(records: Any) -> dict[str, Any]:
    return {"object": "list", "data": [record.to_json() for record in records]}


def _add_tenants(app: FastAPI, desk: Desk) -> None:
    access = desk.access

    @app.get(ROOT + "/tenants", **documented("List the tenants", query=NoQuery))
    async def tenants(request: Request) -> dict[str, Any]:
        desk.admin(request)
        desk.query(request, NoQuery)
        return _listed(await desk.ask(access.tenants))

    @app.post(ROOT + "/tenants", **documented("Create a tenant, which may do nothing yet", body=NewTenant))
    async def create_tenant(request: Request) -> dict[str, Any]:
        principal = desk.admin(request)
        body = await desk.body(request, NewTenant)
        return (await desk.do(principal, access.create_tenant, body.name, limits=body.limits.limits())).to_json()

    @app.patch(
        ROOT + "/tenants/{tenant}", **documented("Change a tenant's limits, or refuse its keys", body=TenantChange)
    )
    async def change_tenant(request: Request) -> dict[str, Any]:
        principal, name = desk.admin(request), _part(request, "tenant")
        body = await desk.body(request, TenantChange)
        if body.limits is None and body.disabled is None:
            raise BadRequest("nothing to change", hint="Send limits, disabled, or both.")
        if body.limits is not None:
            tenant = await desk.do(principal, access.set_limits, name, body.limits.limits())
        if body.disabled is not None:
            tenant = await desk.do(principal, access.set_disabled, name, body.disabled)
        return tenant.to_json()

    @app.delete(ROOT + "/tenants/{tenant}", **documented("Delete a tenant with its grants, and revoke its keys"))
    async def delete_tenant(request: Request) -> dict[str, Any]:
        principal, name = desk.admin(request), _part(request, "tenant")
        await desk.do(principal, access.delete_tenant, name)
        return {"deleted": name}


def _add_keys(app: FastAPI, desk: Desk) -> None:
    access = desk.access

    @app.get(ROOT + "/keys", **documented("List the keys, without their secrets", query=KeysQuery))
    async def keys(request: Request) -> dict[str, Any]:
        desk.admin(request)
        query = desk.query(request, KeysQuery)
        return _listed(await desk.ask(access.keys, ... if query.tenant is None else query.tenant))

    @app.post(ROOT + "/keys", **documented("Create a key; its secret is in this answer and nowhere else", body=NewKey))
    async def create_key(request: Request) -> Response:
        principal = desk.admin(request)
        body = await desk.body(request, NewKey)
        key, secret = await desk.do(principal, access.create_key, body.tenant, name=body.name, expires=body.expires)
        return JSONResponse({**key.to_json(), "key": secret}, headers=SECRET)

    @app.post(ROOT + "/keys/{key}/rotate", **documented("Create a key's successor", body=Rotation))
    async def rotate_key(request: Request) -> Response:
        principal, id = desk.admin(request), _part(request, "key")
        body = await desk.body(request, Rotation)
        key, secret = await desk.do(principal, access.rotate_key, id, grace_s=body.grace_s)
        return JSONResponse({**key.to_json(), "key": secret}, headers=SECRET)

    @app.delete(ROOT + "/keys/{key}", **documented("Revoke a key; its open answers end within a second"))
    async def revoke_key(request: Request) -> dict[str, Any]:
        principal, id = desk.admin(request), _part(request, "key")
        return (await desk.do(principal, access.revoke_key, id)).to_json()


def _add_grants(app: FastAPI, desk: Desk) -> None:
    access = desk.access

    @app.get(ROOT + "/grants", **documented("List what tenants may call and manage", query=KeysQuery))
    async def grants(request: Request) -> dict[str, Any]:
        desk.admin(request)
        query = desk.query(request, KeysQuery)
        found = (await desk.ask(access.snapshot)).grants
        chosen = found if query.tenant is None else {query.tenant: found.get(query.tenant, ())}
        return _listed(grant for held in chosen.values() for grant in held)

    @app.post(ROOT + "/grants", **documented("Let a tenant call or manage a task", body=GrantBody))
    async def grant(request: Request) -> dict[str, Any]:
        principal = desk.admin(request)
        body = await desk.body(request, GrantBody)
        return (await desk.do(principal, access.grant, body.tenant, body.task, body.right)).to_json()

    @app.delete(ROOT + "/grants/{tenant}/{task}/{right}", **documented("Take a grant back"))
    async def withdraw(request: Request) -> dict[str, Any]:
        principal = desk.admin(request)
        tenant, task, right = (_part(request, name) for name in ("tenant", "task", "right"))
        await desk.do(principal, access.withdraw, tenant, task, right)
        return {"tenant": tenant, "task": task, "right": right}


def _add_routes(app: FastAPI, desk: Desk) -> None:
    access = desk.access

    def allowed(request: Request, task: str, kind: str) -> Principal:
        # A shadow may keep what every tenant sends, so it is the platform's.
        return desk.manager(request, task) if kind == "canary" else desk.admin(request)

    @app.get(ROOT + "/routes", **documented("List canaries and shadows", query=NoQuery))
    async def routes(request: Request) -> dict[str, Any]:
        desk.admin(request)
        desk.query(request, NoQuery)
        return _listed(route for both in (await desk.ask(access.snapshot)).routes.values() for route in both)

    @app.put(ROOT + "/routes", **documented("Send a part of a task's traffic to a candidate", body=RouteBody))
    async def set_route(request: Request) -> dict[str, Any]:
        desk.principal(request)
        body = await desk.body(request, RouteBody)
        principal = allowed(request, body.task, body.kind)
        work = partial(access.set_route, body.task, body.kind, f"{body.task}@{body.version}", body.fraction)
        return (await desk.do(principal, work, keep_inputs=body.keep_inputs)).to_json()

    @app.delete(ROOT + "/routes/{task}/{kind}", **documented("Send no traffic to a candidate any more"))
    async def clear_route(request: Request) -> dict[str, Any]:
        task, kind = _part(request, "task"), _part(request, "kind")
        principal = allowed(request, task, kind)
        await desk.do(principal, access.clear_route, task, kind)
        return {"task": task, "kind": kind}


def _add_replicas(app: FastAPI, desk: Desk) -> None:
    access = desk.access

    @app.get(ROOT + "/replicas", **documented("List the engine's replicas as this gateway sees them", query=NoQuery))
    async def replicas(request: Request) -> dict[str, Any]:
        desk.admin(request)
        desk.query(request, NoQuery)
        draining = (await desk.ask(access.snapshot)).draining
        states: list[Any] = getattr(desk.gateway.backend, "states", list)()  # an engine in this process has none
        known = [dataclasses.asdict(state) | {"is_draining": state.url in draining} for state in states]
        others = sorted(draining - {state.url for state in states})
        return {"object": "list", "data": [*known, *({"url": url, "is_draining": True} for url in others)]}

    @app.post(ROOT + "/replicas/drain", **documented("Give a replica no new requests", body=ReplicaBody))
    async def drain(request: Request) -> dict[str, Any]:
        principal = desk.admin(request)
        body = await desk.body(request, ReplicaBody)
        await desk.do(principal, access.drain, body.url)
        return {"url": body.url, "is_draining": True}

    @app.post(ROOT + "/replicas/undrain", **documented("Give a replica requests again", body=ReplicaBody))
    async def undrain(request: Request) -> dict[str, Any]:
        principal = desk.admin(request)
        body = await desk.body(request, ReplicaBody)
        await desk.do(principal, access.undrain, body.url)
        return {"url": body.url, "is_draining": False}


def _add_tasks(app: FastAPI, desk: Desk) -> None:
    registry = desk.registry

    @app.get(ROOT + "/tasks", **documented("List the tasks that this key may manage", query=NoQuery))
    async def tasks(request: Request) -> dict[str, Any]:
        principal = desk.principal(request)
        desk.query(request, NoQuery)
        found = await desk.ask(registry.tasks)
        return _listed(task for task in found if desk.gateway.guard.may(principal, "manage", task.name))

    @app.get(ROOT + "/tasks/{task}/versions", **documented("List a task's versions", query=NoQuery))
    async def versions(request: Request) -> dict[str, Any]:
        principal, task = desk.managed(request)
        desk.query(request, NoQuery)
        return _listed(await desk.ask(registry.versions, task, hides=not principal.is_admin))

    @app.get(ROOT + "/tasks/{task}/aliases", **documented("List a task's aliases", query=NoQuery))
    async def aliases(request: Request) -> dict[str, Any]:
        principal, task = desk.managed(request)
        desk.query(request, NoQuery)
        found = await desk.ask(registry.aliases, task, hides=not principal.is_admin)
        return {"object": "list", "data": [{"alias": alias, "number": number} for alias, number in found.items()]}


def _add_aliases(app: FastAPI, desk: Desk) -> None:
    registry = desk.registry

    @app.post(
        ROOT + "/tasks/{task}/promote", **documented("Point an alias at a version that passes the gate", body=Promotion)
    )
    async def promote(request: Request) -> dict[str, Any]:
        principal, task = desk.managed(request)
        body = await desk.body(request, Promotion)
        work = partial(registry.promote, f"{task}@{body.version}", body.alias)
        return (await desk.do(principal, work, why=body.why, force=body.force)).to_json()

    @app.post(
        ROOT + "/tasks/{task}/rollback", **documented("Point an alias at what it pointed at before", body=Rollback)
    )
    async def rollback(request: Request) -> dict[str, Any]:
        principal, task = desk.managed(request)
        body = await desk.body(request, Rollback)
        work = partial(registry.rollback, task, body.alias)
        return (await desk.do(principal, work, why=body.why, expect=body.expect)).to_json()

    @app.put(
        ROOT + "/tasks/{task}/aliases/{alias}", **documented("Point an alias at a version, ungated", body=AliasBody)
    )
    async def set_alias(request: Request) -> dict[str, Any]:
        principal, task = desk.managed(request)
        body = await desk.body(request, AliasBody)
        work = partial(registry.tag, f"{task}@{body.version}", _part(request, "alias"))
        return (await desk.do(principal, work, why=body.why, expect=body.expect)).to_json()

    @app.delete(ROOT + "/tasks/{task}/aliases/{alias}", **documented("Remove an alias"))
    async def remove_alias(request: Request) -> dict[str, Any]:
        principal, task = desk.managed(request)
        return (await desk.do(principal, registry.untag, task, _part(request, "alias"))).to_json()


def _add_reports(app: FastAPI, desk: Desk) -> None:
    @app.get(ROOT + "/audit", **documented("List what admins did, newest first", query=AuditQuery))
    async def audit(request: Request) -> dict[str, Any]:
        desk.admin(request)
        query = desk.query(request, AuditQuery)
        return _listed(await desk.ask(desk.access.audit, **query.model_dump()))

    @app.get(
        ROOT + "/usage", **documented("List what tenants used of the last minute, and their limits", query=NoQuery)
    )
    async def usage(request: Request) -> dict[str, Any]:
        desk.admin(request)
        desk.query(request, NoQuery)
        used = desk.gateway.limiter.usage()
        tenants = desk.gateway.control.snapshot.tenants
        data = [
            {"tenant": name, **dataclasses.asdict(used.get(name, NOTHING)), "limits": tenants[name].limits.to_json()}
            for name in sorted(tenants)
        ]
        return {"object": "list", "data": data}
