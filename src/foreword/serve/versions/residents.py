"""Which versions the backend holds: loaded once on first use, leased by requests, unloaded when idle. Imports no torch.

absent --acquire--> loading --> resident (leases > 0) <--acquire/release--> idle --bound or idle_s--> absent
                       |
                    failure: all who wait get it; the next try is RETRY_S later
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from foreword.errors import BackendFailed, ForewordError, Overloaded
from foreword.registry.records import Version
from foreword.serve.backend import Backend
from foreword.serve.versions.names import Names

RETRY_S = 1.0
"""How long a failed load is answered with the same error, so that a bad file is not read at every request."""

log = logging.getLogger("foreword.serve")


@dataclass(eq=False, slots=True)
class _Entry:
    version: Version
    loading: asyncio.Task[None] | None = None
    leases: int = 0
    num_bytes: int = 0
    is_loaded: bool = False
    idle_since: float = 0.0

    @property
    def is_idle(self) -> bool:
        return self.is_loaded and not self.leases


@dataclass(eq=False, slots=True)
class Lease:
    """The right to use a resident version; it stays until `release`."""

    version: Version
    _residents: Residents
    _entry: _Entry
    _is_open: bool = True

    def release(self) -> None:
        """Give it back; may be called twice."""
        if self._is_open:
            self._is_open = False
            self._residents._release(self._entry)


@dataclass(slots=True)
class LoadCounts:
    """What happened since the start."""

    num_loads: int = 0
    num_unloads: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """By the error's class."""


class Residents:
    """The versions that a backend holds, at most `max_versions` and `max_bytes` of them; used by one event loop.

    `locate` returns a version's file; it may block. Whoever waits for a load counts as a user: a version in use is
    never unloaded.
    """

    def __init__(
        self,
        backend: Backend,
        locate: Callable[[Version], Path],
        *,
        max_versions: int = 256,
        max_bytes: int | None = None,
        idle_s: float = 900.0,
        retry_s: float = RETRY_S,
    ) -> None:
        self.backend = backend
        self.locate = locate
        self.max_versions = max_versions
        self.max_bytes = max_bytes
        self.idle_s = idle_s
        self.retry_s = retry_s
        self.counts = LoadCounts()
        self.on_load: Callable[[float], None] = lambda seconds: None
        self._entries: dict[str, _Entry] = {}  # by sha256, the longest idle first
        self._unloading: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, tuple[float, ForewordError]] = {}
        self._threads = ThreadPoolExecutor(2, "foreword-fetch")

    @property
    def num_resident(self) -> int:
        """Versions that are loaded."""
        return sum(entry.is_loaded for entry in self._entries.values())

    @property
    def num_bytes(self) -> int:
        """Bytes that they take."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def loaded(self) -> list[tuple[Version, int]]:
        """Return the versions that are loaded, with the bytes that each takes."""
        return [(entry.version, entry.num_bytes) for entry in self._entries.values() if entry.is_loaded]

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._entries

    async def acquire(self, version: Version) -> Lease:
        """Return a lease of a version, loaded first where need be.

        Raises what the registry and `Backend.load` raise, Overloaded where all resident versions are in use and
        there is no room for one more.
        """
        entry = self._entries.get(version.sha256) or self._begin(version)
        assert entry.loading is not None
        entry.leases += 1
        try:
            await asyncio.shield(entry.loading)
        except BaseException:
            self._release(entry)
            raise
        return Lease(version, self, entry)

    def _begin(self, version: Version) -> _Entry:
        until, failure = self._failures.get(version.sha256, (0.0, None))
        if failure is not None and until > time.monotonic():
            raise failure.with_traceback(None)
        entry = _Entry(version)
        entry.loading = asyncio.create_task(self._load(entry))
        entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._entries[version.sha256] = entry
        return entry

    def _release(self, entry: _Entry) -> None:
        entry.leases -= 1
        if not entry.leases and self._entries.get(entry.version.sha256) is entry:
            entry.idle_since = time.monotonic()
            self._entries[entry.version.sha256] = self._entries.pop(entry.version.sha256)

    async def _load(self, entry: _Entry) -> None:
        """Load a new entry; it goes when that fails."""
        version, started = entry.version, time.monotonic()
        try:
            if (unloading := self._unloading.get(version.sha256)) is not None:
                await unloading
            while len(self._entries) > self.max_versions:
                await self._evict(f"{self.max_versions} versions are resident, and all are in use")
            path = await asyncio.get_running_loop().run_in_executor(self._threads, self.locate, version)
            entry.num_bytes = await self._load_with_room(version, path)
            await self._keep_bytes(entry)
        except BaseException as error:
            del self._entries[version.sha256]
            self._note_failure(version, error)
            if isinstance(error, ForewordError) or not isinstance(error, Exception):
                raise
            raise self._failures[version.sha256][1] from error
        entry.is_loaded = True
        self.counts.num_loads += 1
        self.on_load(time.monotonic() - started)
        log.info("loaded %s in %.3f s (%d bytes)", version.reference, time.monotonic() - started, entry.num_bytes)

    async def _load_with_room(self, version: Version, path: Path) -> int:
        while True:
            try:
                return await self.backend.load(version.sha256, path)
            except Overloaded as error:  # the backend is full: idle versions make room
                await self._evict(error.message, error)

    async def _keep_bytes(self, entry: _Entry) -> None:
        while self.max_bytes is not None and self.num_bytes > self.max_bytes:
            try:
                await self._evict(f"resident versions need {self.num_bytes} bytes, {self.max_bytes} are allowed")
            except Overloaded:
                await self.backend.unload(entry.version.sha256)
                raise

    async def _evict(self, why: str, cause: Overloaded | None = None) -> None:
        """Unload the version that has been idle longest, or raise Overloaded."""
        for entry in self._entries.values():
            if entry.is_idle:
                return await self._unload(entry)
        raise cause or Overloaded(why, hint="Try again, or serve with room for more.")

    async def _unload(self, entry: _Entry) -> None:
        sha256 = entry.version.sha256
        del self._entries[sha256]
        task = self._unloading[sha256] = asyncio.create_task(self.backend.unload(sha256))
        task.add_done_callback(lambda _: self._unloading.pop(sha256, None))
        await asyncio.shield(task)
        self.counts.num_unloads += 1
        log.info("unloaded %s", entry.version.reference)

    def _note_failure(self, version: Version, error: BaseException) -> None:
        kind = type(error).__name__
        self.counts.failures[kind] = self.counts.failures.get(kind, 0) + 1
        log.error("cannot load %s: %s", version.reference, str(error).replace("\n", " ") or kind)
        if not isinstance(error, Exception) or isinstance(error, Overloaded):
            return
        now = time.monotonic()
        if not isinstance(error, ForewordError):
            error = BackendFailed(f"{version.reference} cannot be loaded: {kind}", hint="The server's log says more.")
        self._failures = {key: entry for key, entry in self._failures.items() if entry[0] > now}
        self._failures[version.sha256] = (now + self.retry_s, error)

    async def sweep(self) -> None:
        """Unload what has been idle for `idle_s`."""
        limit = time.monotonic() - self.idle_s
        for entry in list(self._entries.values()):
            if entry.is_idle and entry.idle_since <= limit and self._entries.get(entry.version.sha256) is entry:
                await self._unload(entry)


async def keep_loaded(lease: Lease, name: str, names: Names, residents: Residents, every_s: float) -> None:
    """Keep the version that `name` stands for resident, for ever: a promotion is loaded before it is asked for.

    Until the new version is loaded, or while it cannot be, the one of `lease` stays.
    """
    last_failure = ""
    while True:
        await asyncio.sleep(every_s)
        try:
            version = (await names.resolve(name)).version
            if version is not None and version.sha256 != lease.version.sha256:
                lease, old = await residents.acquire(version), lease
                old.release()
            last_failure = ""
        except Exception as error:  # the registry or a load; the next round tries again
            if (failure := str(error) or type(error).__name__) != last_failure:
                log.error("preloaded %s cannot follow the registry: %s", name, failure)
            last_failure = failure


async def keep_swept(residents: Residents, every_s: float) -> None:
    """Unload idle versions from time to time, for ever."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await residents.sweep()
        except Exception as error:  # the backend; the next round goes on
            log.error("cannot unload: %s", str(error) or type(error).__name__)
