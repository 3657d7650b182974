"""What the registry says about keys, limits, grants, routes and drains, kept fresh in memory. Imports no torch.

    every poll_s: revision() --changed, or refresh_s old--> snapshot() --> on_change(old, new)

Requests read memory only. When the database does not answer, the last snapshot stays in use for `stale_s`; after that
whoever asks for it by `fresh` gets Unavailable: a key that may have been revoked is then no key.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import ParamSpec, Protocol, TypeVar

from foreword.errors import Unavailable
from foreword.registry.access_records import ShadowPair, Snapshot, Usage
from foreword.serve.watch.logs import places

POLL_S = 0.3
REFRESH_S = 30.0
STALE_S = 60.0
CLOCK_TOLERANCE_S = 2.0
"""A clock that is off by more was set, or stood still."""

EMPTY = Snapshot(
    revision=-1,
    now=datetime.fromtimestamp(0, UTC),
    tenants={},
    keys={},
    grants={},
    routes={},
    draining=frozenset(),
)

P = ParamSpec("P")
T = TypeVar("T")
Listener = Callable[[Snapshot, Snapshot], None]

log = logging.getLogger("foreword.serve")


class AccessSource(Protocol):
    """What a gateway asks of `Access`. Calls may block; they run in a thread."""

    def revision(self) -> int:
        """Return a number that goes up with every change."""

    def snapshot(self) -> Snapshot:
        """Return all that a gateway must know, at one moment."""

    def sync_usage(self, gateway: str, used: Mapping[str, Usage]) -> Mapping[str, Usage]:
        """Tell what this gateway's tenants have used; return the sum of what the other gateways' have."""

    def add_shadow_pair(self, pair: ShadowPair) -> None:
        """Keep a pair of answers."""


def _monotonic() -> float:
    """Return seconds that no one can set, with those in which the machine slept where the system counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Control:
    """The newest snapshot, and the database's clock. One event loop uses it; `keep_fresh` runs there as a task.

    Without a source the snapshot stays empty.
    """

    def __init__(
        self,
        source: AccessSource | None,
        *,
        poll_s: float = POLL_S,
        refresh_s: float = REFRESH_S,
        stale_s: float = STALE_S,
    ) -> None:
        self.source = source
        self.poll_s = poll_s
        self.refresh_s = refresh_s
        self.stale_s = stale_s
        self.snapshot = EMPTY
        """The last one, however old."""
        self._clock = _Clock()
        self._loaded = self._answered = 0.0
        self._failures = FailureLog(
            "the registry does not answer; what it said last is used", "the registry answers again"
        )
        self._on_change: list[Listener] = []
        self._on_tick: list[Callable[[], None]] = []
        self._thread = ThreadPoolExecutor(1, "foreword-control")  # its own: nothing else may hold up a revocation

    @property
    def is_fresh(self) -> bool:
        """Whether the database answered within the last `stale_s` seconds."""
        return self._answered > 0 and _monotonic() - self._answered <= self.stale_s

    @property
    def age_s(self) -> float | None:
        """Seconds since the registry last answered; None before its first answer."""
        return _monotonic() - self._answered if self._answered else None

    def fresh(self) -> Snapshot:
        """Return the snapshot. Raises Unavailable where it is older than `stale_s`."""
        if not self.is_fresh:
            raise Unavailable(
                f"the registry has not answered for more than {self.stale_s:g} s, so that no key can be trusted",
                hint="Try again; the server's log says why.",
            )
        return self.snapshot

    def now(self) -> datetime:
        """Return the database's time: what it was at its last answer, and the time since by a clock that none sets."""
        return self._clock.now()

    def on_change(self, listener: Listener) -> None:
        """Call `listener(old, new)` in the event loop for each new snapshot."""
        self._on_change.append(listener)

    def on_tick(self, listener: Callable[[], None]) -> None:
        """Call `listener` in the event loop every `poll_s` or so: for what ends by time alone."""
        self._on_tick.append(listener)

    async def ask(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what a blocking call of the source returns; calls wait for each other."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    async def refresh(self) -> None:
        """Ask once, and load the snapshot where it changed or is `refresh_s` old. Raises what the source raises."""
        assert self.source is not None
        source = self.source
        revision = await self.ask(source.revision)
        if revision == self.snapshot.revision and _monotonic() - self._loaded < self.refresh_s:
            self._answered = _monotonic()
            return
        asked, new = await self.ask(lambda: (_monotonic(), source.snapshot()))
        self._clock.set(new.now, asked)
        self._loaded = self._answered = _monotonic()
        old, self.snapshot = self.snapshot, new
        if new.revision != old.revision:
            for listener in self._on_change:
                _tell(listener, old, new)

    async def keep_fresh(self) -> None:
        """Refresh for ever; a failure is logged when it begins, when it goes on for `stale_s`, and when it ends."""
        was_fresh = True
        while True:
            await asyncio.sleep(self.poll_s)
            try:
                await self.refresh()
                self._failures.note(None)
            except Exception as error:  # the database; the next round asks again
                self._failures.note(error)
            if self.is_fresh != was_fresh:
                was_fresh = self.is_fresh
                if not was_fresh:
                    log.error("keys are refused: the registry has not answered for %g s", self.stale_s)
            for listener in self._on_tick:
                _tell(listener)

    def close(self) -> None:
        """Ask nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _tell(listener: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call a listener; whatever becomes of it, the next revocation is looked for."""
    try:
        listener(*args, **kwargs)
    except Exception as error:
        log.error("a listener failed: %s at %s", type(error).__name__, places(error))


class FailureLog:
    """Tells when something that is tried again and again begins to fail, and when it works again."""

    def __init__(self, fails: str, works: str) -> None:
        self.fails = fails
        self.works = works
        self.is_failing = False

    def note(self, error: Exception | None) -> None:
        """Note how one try went; only a change is logged."""
        if error is not None and not self.is_failing:
            log.error("%s: %s", self.fails, str(error).partition("\n")[0] or type(error).__name__)
        elif error is None and self.is_failing:
            log.warning("%s", self.works)
        self.is_failing = error is not None


class _Clock:
    """The database's clock between its answers."""

    def __init__(self) -> None:
        self._base = datetime.fromtimestamp(0, UTC)
        self._at: float | None = None
        self._wall = 0.0
        self._ignored_s = 0.0

    def now(self) -> datetime:
        return self._base + timedelta(seconds=_monotonic() - (self._at or 0.0))

    def set(self, now: datetime, at: float) -> None:
        """Take over what the database's clock said at `at`.

        Where it jumped, and this host's wall clock jumped alike, the two are one clock (SQLite) that somebody has set:
        the time that really went by is the better one.
        """
        wall = time.time() - _monotonic()
        if self._at is not None:
            jump = (now - self._base).total_seconds() - self._ignored_s - (at - self._at)
            if abs(jump) > CLOCK_TOLERANCE_S:
                is_ours = abs(jump - (wall - self._wall)) <= CLOCK_TOLERANCE_S
                self._ignored_s = self._ignored_s + jump if is_ours else 0.0
                log.warning("the registry's clock jumped by %.1f s: %s", jump, "ignored" if is_ours else "followed")
        self._base, self._at, self._wall = now - timedelta(seconds=self._ignored_s), at, wall
