"""Which requests of a task go to its canary: by hash, so that every gateway decides alike without a word. No torch.

    sha256(tag, salt, user) -> [0, 1) < fraction

A user stays on one side for as long as the route lives; a larger fraction keeps those who were in and adds others; a
new route has a new salt and so begins with other users.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

from foreword.registry.access_records import Route, RouteKind

Outcome = Literal["stable", "canary", "failed"]
"""Who answered for a task with a canary; "failed": the stable version, since the canary could not be loaded."""

_TAG = b"foreword/route/v1\0"


def position(salt: str, user: str) -> float:
    """Return where a user stands in [0, 1) for a route of this salt; evenly spread over users."""
    digest = hashlib.sha256(_TAG + f"{salt}\0{user}".encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) / 2**53


def takes(route: Route, user: str) -> bool:
    """Return whether a route takes this user."""
    return position(route.salt, user) < route.fraction


def user_key(*, user: str | None, tenant: str | None, key: str | None, request_id: str) -> str:
    """Return by what a request is kept on one side of a canary.

    The body's `user`, within its tenant; else the API key; else the tenant; else the request itself: an anonymous
    caller who names no user has no lasting side.
    """
    if user:
        return f"user:{tenant or ''}\0{user}"
    if key:
        return f"key:{key}"
    return f"tenant:{tenant}" if tenant else f"request:{request_id}"


def of_kind(routes: Iterable[Route], kind: RouteKind) -> Route | None:
    """Return a task's route of a kind; it has at most one."""
    return next((route for route in routes if route.kind == kind), None)
