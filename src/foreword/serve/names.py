"""From a request's model name to a version, fresh within half a second. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from foreword.core.spec import Fingerprint
from foreword.errors import Conflict, ForewordError, NotFound
from foreword.registry.records import Task, Version

TTL_S = 0.5
"""How long an answer of the registry is used: a promotion takes effect for new requests within a second."""
MAX_NAMES = 4096


class VersionSource(Protocol):
    """What serving asks of a registry. Calls may block; they run in threads."""

    def resolve(self, reference: str) -> Version:
        """Return the version that a name stands for now. Raises NotFound."""

    def path(self, version: Version) -> Path:
        """Return a local file with the version's artefact."""

    def tasks(self) -> Sequence[Task]:
        """Return all tasks."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name stands for."""

    name: str
    """As it was asked for."""
    version: Version | None = None
    """None is the plain base."""

    @property
    def prefix(self) -> str | None:
        """The name of its prefix in the backend: the artefact's sha256."""
        return self.version.sha256 if self.version else None

    @property
    def labels(self) -> tuple[str, str]:
        """Task and version number, as metrics show them; the base has no number."""
        return (self.version.task, str(self.version.number)) if self.version else (self.name, "")

    @property
    def headers(self) -> dict[str, str]:
        """Headers that say which artefact answered; none for the plain base."""
        if self.version is None:
            return {}
        return {"x-foreword-version": self.version.reference, "x-foreword-digest": self.version.sha256}


class Names:
    """Resolves model names. An answer is kept for `ttl_s`; requests that ask meanwhile share one query."""

    def __init__(self, source: VersionSource, base_name: str, *, ttl_s: float = TTL_S) -> None:
        self.source = source
        self.base_name = base_name
        self.ttl_s = ttl_s
        self._known: dict[str, tuple[float, asyncio.Task[Target]]] = {}
        self._threads = ThreadPoolExecutor(4, "foreword-names")  # its own, so that no slow fetch holds names up

    async def resolve(self, name: str) -> Target:
        """Return what a name stands for.

        Raises NotFound with near names, Conflict where a task has the base's name, RegistryError when the registry
        fails: without it nobody knows which version is the right one.
        """
        now = time.monotonic()
        expires, query = self._known.get(name, (0.0, None))
        if query is None or expires <= now:
            if len(self._known) >= MAX_NAMES:
                self._known = {key: entry for key, entry in self._known.items() if entry[0] > now}
            query = asyncio.create_task(self._ask(name))
            query.add_done_callback(lambda done: self._forget_failure(name, done))
            self._known[name] = (now + self.ttl_s, query)
        return await asyncio.shield(query)

    def _forget_failure(self, name: str, query: asyncio.Task[Target]) -> None:
        if query.cancelled() or query.exception() is not None:
            if self._known.get(name, (0.0, None))[1] is query:
                del self._known[name]

    async def _ask(self, name: str) -> Target:
        loop = asyncio.get_running_loop()
        if name == self.base_name:
            return await loop.run_in_executor(self._threads, self._base)
        try:
            return Target(name, await loop.run_in_executor(self._threads, self.source.resolve, name))
        except NotFound as error:
            raise NotFound(error.message, hint=f"{error.hint} The base is {self.base_name}.".strip()) from None

    def _base(self) -> Target:
        try:
            version = self.source.resolve(self.base_name)
        except ForewordError:  # no such task, as it should be; the base needs no registry
            return Target(self.base_name)
        raise Conflict(
            f"{self.base_name!r} names the base and the task of {version.reference}",
            hint="Serve the base under another name (--base-name); the task's versions answer as name@number.",
        )

    async def listed(self, fingerprint: Fingerprint) -> list[Target]:
        """Return the base, and each task and alias whose version belongs to the base of this fingerprint."""
        loop = asyncio.get_running_loop()
        return [Target(self.base_name), *await loop.run_in_executor(self._threads, self._versions, fingerprint)]

    def _versions(self, fingerprint: Fingerprint) -> list[Target]:
        found = []
        for task in self.source.tasks():
            for name in (task.name, *(f"{task.name}@{alias}" for alias in task.aliases)):
                with contextlib.suppress(NotFound):  # no version left, or an alias removed just now
                    version = self.source.resolve(name)
                    if name != self.base_name and version.base.first_difference(fingerprint) is None:
                        found.append(Target(name, version))
        return found
