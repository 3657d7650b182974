"""Who answers a request of a task that has a canary: the candidate, or the stable version. Imports no torch.

A canary takes nobody down: where its candidate cannot be resolved, or not be loaded within `LOAD_S`, the stable version
answers in its place, which the log, the metrics and the answer's headers say. Once the candidate's answer has begun,
its errors are the request's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging

from foreword.errors import ForewordError
from foreword.registry.access_records import Route
from foreword.serve.http.openai_errors import error_kind
from foreword.serve.versions.names import Names, Target
from foreword.serve.versions.residents import Lease, Residents
from foreword.serve.versions.routes import takes
from foreword.serve.watch.logs import fields

LOAD_S = 5.0

log = logging.getLogger("foreword.serve")


async def steer(names: Names, stable: Target, canary: Route | None, user: str) -> Target:
    """Return who is to answer a user (`routes.user_key`); the answer goes by the name that was asked for."""
    if canary is None:
        return stable
    if not takes(canary, user):
        return dataclasses.replace(stable, route="stable")
    try:
        candidate = await names.resolve(f"{canary.task}@{canary.number}")
    except ForewordError as error:
        return _instead(stable, canary, error)
    return dataclasses.replace(candidate, name=stable.name, route="canary")


async def lease(
    residents: Residents, target: Target, stable: Target, canary: Route | None, *, load_s: float = LOAD_S
) -> tuple[Target, Lease | None]:
    """Return who answers, and a lease of its version; the base needs none. Raises what `Residents.acquire` raises."""
    if canary is not None and target.route == "canary" and target.version is not None:
        try:
            async with asyncio.timeout(load_s):
                return target, await residents.acquire(target.version)
        except Exception as error:  # whatever it is: the stable version needs nothing of it
            target = _instead(stable, canary, error)
    return target, None if target.version is None else await residents.acquire(target.version)


def _instead(stable: Target, canary: Route, error: Exception) -> Target:
    about = fields(task=canary.task, version=canary.number, error=error_kind(error))
    log.error("the canary %s@%d failed; the stable version answers", canary.task, canary.number, extra=about)
    return dataclasses.replace(stable, route="failed")
