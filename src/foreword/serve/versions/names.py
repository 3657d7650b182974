"""From a request's model name to a version, fresh within half a second. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from foreword.core.spec import Fingerprint
from foreword.errors import Conflict, ForewordError, NotFound, RegistryError, Unavailable
from foreword.registry.records import Task, Version
from foreword.serve.access.control import STALE_S, FailureLog
from foreword.serve.versions.routes import Outcome

TTL_S = 0.5
"""How long an answer of the registry is used: a promotion takes effect for new requests within a second."""
PATIENCE_S = 0.25
"""How long a request waits for the registry where there is an answer from before."""
TIMEOUT_S = 10.0
"""How long it waits where there is none."""
MAX_NAMES = 4096

log = logging.getLogger("foreword.serve")


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
    route: Outcome | None = None
    """Who answers for a task that has a canary; "failed" is the stable version in the place of the canary."""

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
        """Headers that say which artefact answered, and by which route; none for the plain base."""
        if self.version is None:
            return {}
        found = {"x-foreword-version": self.version.reference, "x-foreword-digest": self.version.sha256}
        if self.route is not None:
            found["x-foreword-route"] = "canary" if self.route == "canary" else "stable"
        if self.route == "failed":
            found["x-foreword-canary"] = "failed"
        return found


@dataclass(eq=False, slots=True)
class _Entry:
    """What is known of a name."""

    target: Target | None = None
    answered: float = 0.0
    fresh_until: float = 0.0
    query: asyncio.Task[Target] | None = None

    def is_usable(self, now: float, stale_s: float) -> bool:
        return self.target is not None and now - self.answered <= stale_s


class Names:
    """Resolves model names. An answer is kept for `ttl_s`; requests that ask meanwhile share one query.

    While the registry fails, or takes longer than `PATIENCE_S`, what it said last is used for up to `stale_s`.
    """

    def __init__(
        self, source: VersionSource, base_name: str, *, ttl_s: float = TTL_S, stale_s: float = STALE_S
    ) -> None:
        self.source = source
        self.base_name = base_name
        self.ttl_s = ttl_s
        self.stale_s = stale_s
        self._known: dict[str, _Entry] = {}
        self._num_changes = 0
        self._listing: tuple[float, asyncio.Task[list[Target]]] | None = None
        self._failures = FailureLog("the registry resolves no names", "the registry resolves names again")
        self._threads = ThreadPoolExecutor(4, "foreword-names")  # its own, so that no slow fetch holds names up

    def forget(self) -> None:
        """Ask anew for every name: the registry has changed."""
        self._num_changes += 1
        self._listing = None
        for entry in self._known.values():
            entry.fresh_until = 0.0

    async def resolve(self, name: str) -> Target:
        """Return what a name stands for.

        Raises NotFound with near names, Conflict where a task has the base's name, Unavailable when the registry fails
        or does not answer and the name was not asked for lately: nobody knows then which version is the right one.
        """
        now = time.monotonic()
        if (entry := self._known.get(name)) is None:
            if len(self._known) >= MAX_NAMES:
                self._known = {key: known for key, known in self._known.items() if known.fresh_until > now}
            if len(self._known) >= MAX_NAMES:
                self._known.clear()
            entry = self._known[name] = _Entry()
        if entry.target is not None and now < entry.fresh_until:
            return entry.target
        if entry.query is None:
            entry.query = asyncio.create_task(self._ask(name, entry))
            entry.query.add_done_callback(lambda done: done.cancelled() or done.exception())
        query, is_usable = entry.query, entry.is_usable(now, self.stale_s)
        await asyncio.wait({query}, timeout=PATIENCE_S if is_usable else TIMEOUT_S)
        if query.done():
            return query.result()
        if is_usable and entry.target is not None:
            entry.fresh_until = now + 2 * PATIENCE_S
            return entry.target
        raise Unavailable(f"the registry has not said within {TIMEOUT_S:g} s what {name[:80]!r} is")

    async def _ask(self, name: str, entry: _Entry) -> Target:
        num_changes = self._num_changes
        try:
            entry.target = await asyncio.get_running_loop().run_in_executor(self._threads, self._find, name)
            entry.answered = time.monotonic()
            self._failures.note(None)
        except (NotFound, Conflict):
            self._drop(name, entry)
            raise
        except Exception as error:  # the database
            self._failures.note(error)
            if entry.target is None or not entry.is_usable(time.monotonic(), self.stale_s):
                self._drop(name, entry)
                raise Unavailable(
                    f"the registry cannot be asked what {name[:80]!r} is", hint="Try again; the server's log says why."
                ) from error
        finally:
            entry.query = None
        if num_changes == self._num_changes:  # else the answer may be from before the change
            entry.fresh_until = time.monotonic() + self.ttl_s
        return entry.target

    def _drop(self, name: str, entry: _Entry) -> None:
        entry.target = None
        if self._known.get(name) is entry:
            del self._known[name]

    def _find(self, name: str) -> Target:
        if name == self.base_name:
            return self._base()
        try:
            return Target(name, self.source.resolve(name))
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
        """Return the base, and each task and alias whose version belongs to the base of this fingerprint.

        Raises Unavailable when the registry fails.
        """
        now = time.monotonic()
        if self._listing is None or self._listing[0] <= now:
            query = asyncio.create_task(asyncio.to_thread(self._versions, fingerprint))
            query.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._listing = (now + self.ttl_s, query)
        _, query = self._listing
        try:
            return [Target(self.base_name), *await asyncio.shield(query)]
        except RegistryError as error:
            self._listing = None
            raise Unavailable("the registry cannot list its tasks", hint="Try again.") from error

    def _versions(self, fingerprint: Fingerprint) -> list[Target]:
        found = []
        for task in self.source.tasks():
            for name in (task.name, *(f"{task.name}@{alias}" for alias in task.aliases)):
                with contextlib.suppress(NotFound):  # no version left, or an alias removed just now
                    version = self.source.resolve(name)
                    if name != self.base_name and version.base.first_difference(fingerprint) is None:
                        found.append(Target(name, version))
        return found
