"""Several replicas of an engine behind HTTP: who is up, who is asked, who is left alone for a while. Imports no torch.

    request ─ key ─► replicas ranked for that key ─► the first one that is up, not draining, closed, within its share

A key (the digest of a prefix) has the same first replica as long as the set of replicas stays the same, so that a
task's blocks stay on few of them; a replica that comes or goes moves only its own share of the keys. This file speaks
no HTTP: a probe is given to the pool.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from foreword.errors import BackendFailed, ConfigError, Overloaded
from foreword.serve.engines.breaker import Breaker, BreakerState

FIRST_TOKEN_S = 120.0
DOWN_AFTER = 2
"""Failed probes in a row after which a replica counts as down."""
BUSY_S = 5.0
"""A probe that takes too long counts for nothing when a token came so recently: under load servers answer late."""
FREE_LOAD = 8
"""Requests in flight below which a replica is never passed over for another one."""
WATCH_S = 0.25
"""How often deadlines are looked at."""

log = logging.getLogger("foreword.serve")


class Lost(Exception):
    """The replica failed, not the request: another one may be asked while no token has come."""

    is_fault = True
    """Whether the breaker counts it."""


class Busy(Lost):
    """The replica has no room; `retry_after_s` is what it says."""

    is_fault = False

    def __init__(self, why: str, retry_after_s: float = 1.0) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long a replica may take, in seconds."""

    connect_s: float = 2.0
    head_s: float = 30.0
    """Until the answer's status."""
    first_token_s: float = FIRST_TOKEN_S
    """From there; the engine's queue counts."""
    token_s: float = 60.0
    """Between tokens."""
    whole_s: float = 3600.0
    probe_s: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a replica says of itself."""

    model: str
    """The name under which it serves the base."""
    max_model_len: int | None
    """Longest sequence in tokens, prefix included; None where it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """A replica, for metrics."""

    url: str
    is_up: bool
    is_draining: bool
    breaker: BreakerState
    inflight: int
    failures: int
    """Since the start: requests that it lost."""
    retries: int
    """Since the start: requests that another one lost, or it itself, and it was asked next."""


class Replica:
    """One replica, as its pool knows it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.facts: Facts | None = None
        self.is_up = False
        self.breaker = Breaker()
        self.inflight = 0
        self.failures = 0
        self.retries = 0
        self.num_failed_probes = 0
        self.last_token = -BUSY_S
        """When one came last, by `time.monotonic()`."""

    def rank(self, key: str) -> bytes:
        """Return what the replicas are ordered by for a key, the greatest first (rendezvous hashing)."""
        return hashlib.blake2b(f"{key}\0{self.url}".encode(), digest_size=8).digest()


class Attempt:
    """A request on its way at one replica, as a context: it holds a place there, and has a deadline.

    A deadline that passes cancels the task inside; the context turns that into Lost.
    """

    def __init__(self, pool: Pool, replica: Replica) -> None:
        self.pool = pool
        self.replica = replica
        self.started = self.deadline = 0.0
        self.has_token = False
        self.is_whole = False
        self._is_trial = False
        self._why: str | None = None
        self.task: asyncio.Task[Any]
        self._cancelling = 0

    def __enter__(self) -> Attempt:
        task = asyncio.current_task()
        assert task is not None
        self.task, self._cancelling = task, task.cancelling()
        self.started = time.monotonic()
        self.deadline = self.started + self.pool.timeouts.head_s
        self._is_trial = self.replica.breaker.begin(self.started)
        self.replica.inflight += 1
        self.pool.attempts.add(self)
        return self

    def head(self) -> None:
        """Note that the answer's head has come."""
        self.deadline = time.monotonic() + self.pool.timeouts.first_token_s

    def token(self, now: float) -> None:
        """Note that tokens have come."""
        self.deadline = now + self.pool.timeouts.token_s
        self.replica.last_token = now
        if not self.has_token:
            self.has_token = True
            self.replica.breaker.succeed()

    def end_within(self, seconds: float) -> None:
        """Note that the answer is whole; the end of the message, still awaited, may take so long."""
        self.is_whole = True
        self.deadline = time.monotonic() + seconds

    def expire(self, why: str) -> None:
        """Cancel it, as lost."""
        if self._why is None:
            self._why = why
            self.task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        self.pool.attempts.discard(self)
        self.replica.inflight -= 1
        if self._is_trial:
            self.replica.breaker.end_trial()
        if self._why is not None and self.task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            error = Lost(self._why)
        if not isinstance(error, Lost):
            return False
        if not self.is_whole:
            self.pool.note_loss(self.replica, error)
            raise error from None
        return True


class Pool:
    """The replicas. Used by one event loop; `start` watches over them until `aclose`.

    `probe` asks a replica for its facts and raises where it is not well. `draining` tells the URLs that get no new
    requests. A replica takes `max_inflight` requests at once, and while others are free no more than `balance` times
    the mean (consistent hashing with bounded loads, Mirrokni et al. 2016, arXiv:1608.01350).
    """

    def __init__(
        self,
        urls: Sequence[str],
        probe: Callable[[Replica], Awaitable[Facts]],
        *,
        max_inflight: int = 256,
        balance: float = 1.25,
        draining: Callable[[], Collection[str]] = frozenset,
        timeouts: Timeouts | None = None,
        probe_every_s: float = 2.0,
    ) -> None:
        self.replicas = [Replica(url) for url in distinct(urls)]
        self.timeouts = timeouts or Timeouts()
        self.attempts: set[Attempt] = set()
        self.max_inflight = max_inflight
        self.balance = balance
        self._probe = probe
        self.draining = draining
        self._probe_every_s = probe_every_s
        self._tasks: list[asyncio.Task[None]] = []
        self._first_probes: list[asyncio.Future[None]] = []

    async def start(self) -> None:
        """Begin to watch, and wait a moment until each replica has told once how it is. May be called again."""
        is_new = not self._tasks
        if is_new:
            loop = asyncio.get_running_loop()
            self._first_probes = [loop.create_future() for _ in self.replicas]
            self._tasks = [asyncio.create_task(self._watch_deadlines())]
            for replica, first in zip(self.replicas, self._first_probes, strict=True):
                self._tasks.append(asyncio.create_task(self._watch(replica, first)))
        if is_new or not any(replica.is_up for replica in self.replicas):
            if pending := [first for first in self._first_probes if not first.done()]:
                await asyncio.wait(pending, timeout=self.timeouts.probe_s)

    async def aclose(self) -> None:
        """Stop watching, and end what is in flight."""
        for attempt in list(self.attempts):
            attempt.expire("the server ends")
        for task in self._tasks:
            task.cancel()
        running = [attempt.task for attempt in self.attempts]
        await asyncio.gather(*self._tasks, *running, return_exceptions=True)
        for first in self._first_probes:
            first.cancel()

    def attempt(self, key: str, tried: Collection[Replica] = ()) -> Attempt:
        """Return an attempt at the best replica for `key`, those in `tried` last.

        Raises Overloaded where all that could be asked are full, BackendFailed where none can be asked.
        """
        now = time.monotonic()
        usable = self._usable(now)
        if not usable:
            raise self._nobody(now)
        candidates = [replica for replica in usable if replica not in tried] or usable
        candidates = [replica for replica in candidates if replica.inflight < self.max_inflight]
        if not candidates:
            raise Overloaded(
                f"{self.num_inflight} requests are in flight, {len(usable)} replicas take {self.max_inflight} each",
                hint="Try again later, or add replicas.",
            )
        candidates.sort(key=lambda replica: replica.rank(key), reverse=True)
        total = 1 + sum(replica.inflight for replica in usable)
        bound = max(FREE_LOAD, math.ceil(self.balance * total / len(usable)))
        chosen = next((replica for replica in candidates if replica.inflight < bound), candidates[0])
        chosen.retries += bool(tried)
        return Attempt(self, chosen)

    def check(self) -> None:
        """Raise BackendFailed where no replica can be asked."""
        now = time.monotonic()
        if not self._usable(now):
            raise self._nobody(now)

    async def is_well(self, replica: Replica) -> bool:
        """Ask a replica now how it is."""
        try:
            async with asyncio.timeout(self.timeouts.probe_s):
                await self._probe(replica)
        except Exception:
            return False
        return True

    @property
    def num_inflight(self) -> int:
        """Requests in flight."""
        return len(self.attempts)

    @property
    def num_waiting(self) -> int:
        """Requests in flight that have no token yet."""
        return sum(not attempt.has_token for attempt in self.attempts)

    @property
    def max_model_len(self) -> int | None:
        """The shortest limit of the replicas; None where none says one."""
        limits = [replica.facts.max_model_len for replica in self.replicas if replica.facts]
        return min((limit for limit in limits if limit is not None), default=None)

    def states(self) -> list[ReplicaState]:
        """Return the state of each replica."""
        now, draining = time.monotonic(), self.draining()
        return [
            ReplicaState(
                url=replica.url,
                is_up=replica.is_up,
                is_draining=replica.url in draining,
                breaker=replica.breaker.state(now),
                inflight=replica.inflight,
                failures=replica.failures,
                retries=replica.retries,
            )
            for replica in self.replicas
        ]

    def note_loss(self, replica: Replica, why: Lost) -> None:
        """Count a request that a replica lost."""
        if why.is_fault:
            replica.failures += 1
            replica.breaker.fail(time.monotonic())
            log.warning("replica %s lost a request: %s", replica.url, why)

    def _usable(self, now: float) -> list[Replica]:
        draining = self.draining()
        return [
            replica
            for replica in self.replicas
            if replica.is_up and replica.url not in draining and replica.breaker.allows(now)
        ]

    def _nobody(self, now: float) -> BackendFailed:
        draining = self.draining()
        num_draining = sum(replica.url in draining for replica in self.replicas)
        num_resting = sum(replica.is_up and not replica.breaker.allows(now) for replica in self.replicas)
        num_down = sum(not replica.is_up for replica in self.replicas)
        return BackendFailed(
            f"no engine can be asked: of {len(self.replicas)} replicas {num_down} are down, {num_draining} drain, "
            f"{num_resting} failed too often just now",
            hint="Try again soon; the server's log and /metrics say which.",
        )

    async def _watch(self, replica: Replica, first: asyncio.Future[None]) -> None:
        """Probe a replica from time to time, for ever."""
        while True:
            try:
                async with asyncio.timeout(self.timeouts.probe_s if replica.is_up else self.timeouts.head_s):
                    facts = await self._probe(replica)
            except Exception as error:
                is_slow = isinstance(error, TimeoutError)
                if not (is_slow and time.monotonic() - replica.last_token <= BUSY_S):  # slow, but it works
                    self._note_failed_probe(replica, str(error) or type(error).__name__)
            else:
                if not replica.is_up:
                    log.info("replica %s is up", replica.url)
                    replica.breaker.let_try(time.monotonic())
                replica.facts, replica.is_up, replica.num_failed_probes = facts, True, 0
            if not first.done():
                first.set_result(None)
            await asyncio.sleep(self._probe_every_s * random.uniform(0.8, 1.2))

    def _note_failed_probe(self, replica: Replica, why: str) -> None:
        replica.num_failed_probes += 1
        if replica.num_failed_probes == 1 and not replica.is_up:
            log.warning("replica %s is not up: %s", replica.url, why)
        if replica.is_up and replica.num_failed_probes >= DOWN_AFTER:
            log.warning("replica %s is down: %s", replica.url, why)
            replica.is_up = False
            for attempt in [attempt for attempt in self.attempts if attempt.replica is replica]:
                if not attempt.has_token:  # another one can take it
                    attempt.expire("it is down")

    async def _watch_deadlines(self) -> None:
        """Expire what takes too long, for ever; one watch costs less than a timer for each token."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            for attempt in list(self.attempts):
                if attempt.deadline <= now:
                    attempt.expire("no token came in time" if attempt.has_token else "no answer came in time")
                elif attempt.started + self.timeouts.whole_s <= now:
                    attempt.expire("the whole answer took too long")


def distinct(urls: Sequence[str]) -> list[str]:
    """Return replica URLs without a slash at the end. Raises ConfigError where one is no URL or is given twice."""
    found: list[str] = []
    for url in (url.rstrip("/") for url in urls):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no URL of a replica", hint="Give one such as http://10.0.0.7:8000.")
        if url in found:
            raise ConfigError(f"the replica {url} is given twice", hint="Leave one out.")
        found.append(url)
    if not found:
        raise ConfigError("no replica is given", hint="Give at least one URL.")
    return found
