"""What the gateway and the vLLM plug-in say to each other. Imports nothing but the standard library.

A request for a task is N placeholder ids and its own ids; `kv_transfer_params` names the compiled file by its sha256
and says N; `cache_salt` keeps vLLM's own prefix cache apart by version and by scope (the tenant). The plug-in derives
the salt again and fails a request whose salt is another one: then blocks of one version can never be found by another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARAM = "foreword"
"""The one key of `kv_transfer_params`."""
MAX_POSITIONS = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SALT_TAG = b"foreword/cache-salt/v1\0"
_SCOPE_TAG = b"foreword/scope/v1\0"


@dataclass(frozen=True, slots=True)
class Wanted:
    """The prefix that a request starts with."""

    sha256: str
    """Of the compiled file."""
    num_positions: int
    """N: so many ids of the request are placeholders."""
    scope: str
    """Hex digest: who shares cached blocks with whom."""

    def to_params(self) -> dict[str, Any]:
        """Return `kv_transfer_params`."""
        return {PARAM: {"sha256": self.sha256, "positions": self.num_positions, "scope": self.scope}}

    @property
    def salt(self) -> str:
        """`cache_salt`: hex, 64 characters (vLLM takes at most 128, and no @, / or backslash)."""
        return cache_salt(self.scope, self.sha256)


def scope_of(tenant: str) -> str:
    """Return the scope of a tenant; "" is the one scope of a server without tenants."""
    return hashlib.sha256(_SCOPE_TAG + tenant.encode()).hexdigest()


def cache_salt(scope: str, sha256: str = "") -> str:
    """Return the salt for a scope and a compiled file; without one, that of plain requests."""
    return hashlib.sha256(_SALT_TAG + f"{scope}\0{sha256}".encode()).hexdigest()


def parse_params(params: Any) -> Wanted:
    """Read `kv_transfer_params`. Raises ValueError on anything that `Wanted.to_params` does not write."""
    if not isinstance(params, Mapping) or set(params) != {PARAM}:
        raise ValueError(f"kv_transfer_params must hold {PARAM!r} and nothing else")
    inner = params[PARAM]
    if not isinstance(inner, Mapping) or set(inner) != {"sha256", "positions", "scope"}:
        raise ValueError(f"{PARAM} must hold sha256, positions and scope")
    for name in ("sha256", "scope"):
        if not isinstance(inner[name], str) or not _SHA256.fullmatch(inner[name]):
            raise ValueError(f"{name} is not 64 hex digits")
    positions = inner["positions"]
    if type(positions) is not int or not 1 <= positions <= MAX_POSITIONS:
        raise ValueError(f"positions is not between 1 and {MAX_POSITIONS}")
    return Wanted(inner["sha256"], positions, inner["scope"])
