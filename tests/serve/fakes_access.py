"""An access source in memory: a snapshot that tests change, a clock that they set, failures that they switch on."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from foreword.errors import RegistryError
from foreword.registry.access_records import Grant, Key, Limits, ShadowPair, Snapshot, Tenant, Usage
from foreword.serve.access.control import EMPTY

START = datetime(2030, 1, 1, tzinfo=UTC)
SECRET = "x" * 43


class FakeAccess:
    """Changes raise the revision, as the registry's do."""

    def __init__(self) -> None:
        self.now = START
        self.data = dataclasses.replace(EMPTY, revision=0, now=START)
        self.failure: Exception | None = None
        self.others: dict[str, Usage] = {}
        self.used: dict[str, Usage] = {}
        self.num_snapshots = 0
        self.pairs: list[ShadowPair] = []
        self.hangs = threading.Event()
        self.hangs.set()

    def revision(self) -> int:
        self.hangs.wait(10)
        if self.failure:
            raise self.failure
        return self.data.revision

    def snapshot(self) -> Snapshot:
        self.revision()
        self.num_snapshots += 1
        return dataclasses.replace(self.data, now=self.now)

    def sync_usage(self, gateway: str, used: Mapping[str, Usage]) -> Mapping[str, Usage]:
        self.revision()
        self.used = dict(used)
        return self.others

    def add_shadow_pair(self, pair: ShadowPair) -> None:
        self.pairs.append(pair)

    def change(self, **fields: Any) -> None:
        self.data = dataclasses.replace(self.data, revision=self.data.revision + 1, **fields)

    def add_tenant(self, name: str, *tasks: str, disabled: bool = False, **limits: int) -> None:
        tenant = Tenant(name=name, limits=Limits(**limits), disabled=disabled, created=START)
        grants = tuple(Grant(tenant=name, task=task, right="call") for task in tasks)
        self.change(tenants={**self.data.tenants, name: tenant}, grants={**self.data.grants, name: grants})

    def add_key(self, tenant: str | None, letter: str = "a", *, expires_s: float | None = None) -> str:
        """Return the whole key; its id is made of one letter."""
        id = "fw_" + letter * 10
        plaintext = f"{id}_{SECRET}"
        key = Key(
            id=id,
            tenant=tenant,
            name="",
            secret_sha256=hashlib.sha256(plaintext.encode()).hexdigest(),
            created=START,
            expires=None if expires_s is None else START + timedelta(seconds=expires_s),
            revoked=None,
        )
        self.change(keys={**self.data.keys, id: key})
        return plaintext

    def revoke(self, plaintext: str) -> None:
        key = self.data.keys[plaintext[:13]]
        self.change(keys={**self.data.keys, key.id: dataclasses.replace(key, revoked=self.now)})


def broken() -> RegistryError:
    return RegistryError("the registry's database failed: it is gone", hint="Nothing was written.")
