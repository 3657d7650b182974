"""Which versions the workers of one engine hold: the plug-in's scheduler side, without vLLM.

    asked ──▶ FETCHING ──▶ FETCHED ──▶ LOADING ──▶ RESIDENT ──▶ (dropped: not listed)
               │ blob store │ room in    │ every worker
               │            │ host_bytes │ has said so
               └────────────┴────────────┴──▶ FAILED, for `retry_s`

Only what all workers hold is ever promised to vLLM, so a version that cannot be had fails its requests before any of
their blocks exists, and a slow store stalls nobody else.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from foreword.serve.vllm.blocks import Background, Load, describe
from foreword.serve.vllm.wire import Wanted, parse_params

logger = logging.getLogger("vllm.foreword")
"""Below vLLM's own logger, whose handler writes it."""
RETRY_S = 1.0
MAX_KNOWN = 2**17


class State(enum.Enum):
    """See the drawing above."""

    FETCHING = enum.auto()
    FETCHED = enum.auto()
    LOADING = enum.auto()
    RESIDENT = enum.auto()
    FAILED = enum.auto()


class Answer(enum.Enum):
    """What becomes of a request."""

    READY = enum.auto()
    WAIT = enum.auto()
    REFUSED = enum.auto()


@dataclass(frozen=True, slots=True)
class Fetched:
    """A compiled file on this machine, checked."""

    num_positions: int
    num_bytes: int
    """Host memory that it takes in the fullest worker."""


@dataclass(slots=True)
class _Version:
    attempt: int
    since: float
    """When its first request came, or when it failed."""
    used: float
    state: State = State.FETCHING
    num_bytes: int = 0
    loaded_by: int = 0
    waiting: set[str] = field(default_factory=set)
    """Requests that asked and were told to wait."""


class Versions:
    """Fetches, loads and drops versions as requests name them. Not thread-safe; nothing here raises."""

    def __init__(
        self,
        fetch: Callable[[str], Fetched],
        *,
        num_workers: int,
        host_bytes: int,
        idle_s: float,
        timeout_s: float,
        threads: int = 4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._num_workers = num_workers
        self._max_host_bytes = host_bytes
        self._idle_s = idle_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._versions: OrderedDict[str, _Version] = OrderedDict()  # the least recently named first
        self._busy: dict[str, _Version] = {}
        self._positions: OrderedDict[str, int] = OrderedDict()
        self._drops: set[str] = set()
        self._attempts = 0
        self._swept = clock()
        self._resident = 0
        self.host_bytes = 0
        """Host memory of what is loaded or being loaded, in the fullest worker."""
        self.background: Background[tuple[str, int], Fetched] = Background(threads, "foreword-fetch")
        self._figures: dict[str, Any] = {}

    def ask(self, wanted: Wanted, request_id: str, num_cached: int) -> Answer:
        """Return whether a request may start, `num_cached` of its positions being in the engine's own cache already."""
        now = self._clock()
        version = self._versions.get(wanted.sha256)
        if version is not None:
            version.used = now
            self._versions.move_to_end(wanted.sha256)
        num_positions = self._positions.get(wanted.sha256)
        if num_positions is not None and num_positions != wanted.num_positions:
            self.forget(wanted.sha256, request_id)
            return Answer.REFUSED
        if num_positions is not None and num_cached >= num_positions:
            return Answer.READY
        if version is None or (version.state is State.FAILED and now - version.since >= RETRY_S):
            version = self._start(wanted.sha256, now)
        if version.state is State.FAILED:
            return Answer.REFUSED
        if version.state is State.RESIDENT:
            version.waiting.discard(request_id)
            return Answer.READY
        version.waiting.add(request_id)
        return Answer.WAIT

    def forget(self, sha256: str, request_id: str) -> None:
        """Note that a request waits no more."""
        if version := self._versions.get(sha256):
            version.waiting.discard(request_id)

    def plan(self, keep: set[str]) -> tuple[tuple[Load, ...], tuple[str, ...]]:
        """Return what the workers must load now, and drop before that; versions in `keep` are written in this step."""
        now = self._clock()
        self._take_fetched()
        for sha256, version in list(self._busy.items()):
            if now - version.since > self._timeout_s:
                self._fail(sha256, version, f"not fetched and loaded within {self._timeout_s:g} s")
        if now - self._swept >= RETRY_S:
            self._sweep(now, keep)
        loads = []
        for sha256, version in self._busy.items():
            if version.state is State.FETCHED:
                if not self._make_room(version.num_bytes, keep):
                    break
                version.state = State.LOADING
                self.host_bytes += version.num_bytes
                loads.append(Load(sha256, version.attempt))
        drops, self._drops = tuple(sorted(self._drops)), set()
        return tuple(loads), drops

    def report(self, loaded: Mapping[Load, int], failed: Mapping[Load, str]) -> None:
        """Take in what workers said since the last step: loads by how many of them ended well, and which failed why."""
        for load, reason in failed.items():
            if version := self._loading(load):
                self._fail(load.sha256, version, reason)
        for load, count in loaded.items():
            if version := self._loading(load):
                version.loaded_by += count
                if version.loaded_by == self._num_workers:
                    version.state = State.RESIDENT
                    self._resident += 1
                    del self._busy[load.sha256]
                    self._figures.setdefault("load_seconds", []).append(self._clock() - version.since)

    def drop_all(self, why: str) -> None:
        """Drop every resident version; one that is named again is loaded again."""
        for sha256 in [sha256 for sha256, version in self._versions.items() if version.state is State.RESIDENT]:
            self._drop(sha256, why)

    @property
    def fetching(self) -> bool:
        """Whether something is being fetched: `background.progress` is set when that ends."""
        return any(version.state is State.FETCHING for version in self._busy.values())

    def take_figures(self) -> dict[str, Any]:
        """Return what happened since the last call: `load_seconds` of each load, `failures`, `dropped`; and the levels
        `resident` and `host_bytes`. Empty where nothing happened.
        """
        figures, self._figures = self._figures, {}
        return figures | {"resident": self._resident, "host_bytes": self.host_bytes} if figures else {}

    def _start(self, sha256: str, now: float) -> _Version:
        self._attempts += 1
        version = self._versions[sha256] = self._busy[sha256] = _Version(self._attempts, since=now, used=now)
        self._versions.move_to_end(sha256)
        self.background.submit((sha256, version.attempt), lambda: self._fetch(sha256))
        return version

    def _loading(self, load: Load) -> _Version | None:
        version = self._busy.get(load.sha256)
        return version if version and version.attempt == load.attempt and version.state is State.LOADING else None

    def _take_fetched(self) -> None:
        for (sha256, attempt), result in self.background.take():
            version = self._busy.get(sha256)
            if version is None or version.attempt != attempt:
                continue
            if isinstance(result, Exception):
                self._fail(sha256, version, describe(result))
            elif result.num_bytes > self._max_host_bytes:
                self._fail(sha256, version, f"{result.num_bytes} bytes, host_bytes is {self._max_host_bytes} in all")
            else:
                version.state, version.num_bytes = State.FETCHED, result.num_bytes
                self._positions[sha256] = result.num_positions
                self._positions.move_to_end(sha256)
                while len(self._positions) > MAX_KNOWN:
                    self._positions.popitem(last=False)

    def _sweep(self, now: float, keep: set[str]) -> None:
        self._swept = now
        for sha256, version in list(self._versions.items()):
            if version.state is State.FAILED and now - version.since >= RETRY_S:
                del self._versions[sha256]
            elif version.state is State.RESIDENT and now - version.used >= self._idle_s and sha256 not in keep:
                self._drop(sha256, f"not named for {self._idle_s:g} s")

    def _make_room(self, num_bytes: int, keep: set[str]) -> bool:
        """Drop the least recently used until `num_bytes` fit; what a waiting request was promised stays."""
        excess, chosen = self.host_bytes + num_bytes - self._max_host_bytes, []
        for sha256, version in self._versions.items():
            if excess <= 0:
                break
            if version.state is State.RESIDENT and not version.waiting and sha256 not in keep:
                excess -= version.num_bytes
                chosen.append(sha256)
        if excess > 0:
            return False
        for sha256 in chosen:
            self._drop(sha256, "room was needed")
        return True

    def _drop(self, sha256: str, why: str) -> None:
        self.host_bytes -= self._versions.pop(sha256).num_bytes
        self._resident -= 1
        self._drops.add(sha256)
        self._count("dropped")
        logger.info("foreword: dropped %s: %s", sha256[:12], why)

    def _fail(self, sha256: str, version: _Version, reason: str) -> None:
        if version.state is State.LOADING:
            self.host_bytes -= version.num_bytes
            self._drops.add(sha256)
        version.state, version.since = State.FAILED, self._clock()
        version.waiting.clear()
        del self._busy[sha256]
        self._count("failures")
        logger.error("foreword: cannot serve %s: %s", sha256[:12], reason)

    def _count(self, name: str) -> None:
        self._figures[name] = self._figures.get(name, 0) + 1


@dataclass(slots=True)
class Asked:
    """A request that carries `kv_transfer_params`."""

    wanted: Wanted | None
    """None where they were malformed."""
    refusal: str = ""
    """Why it must fail, whatever becomes of its version."""
    refused: bool = False
    """The answer when it was last asked for."""


def read_request(request: Any) -> Asked | None:
    """Read a new request's params: None for a plain request, else what it wants or why it must fail."""
    if request.kv_transfer_params is None:
        return None
    try:
        wanted = parse_params(request.kv_transfer_params)
    except ValueError as error:
        return Asked(None, str(error), refused=True)
    refusal = ""
    if request.cache_salt != wanted.salt:
        refusal = "cache_salt is not that of the version and scope"
    elif wanted.num_positions >= request.num_prompt_tokens:
        refusal = f"{wanted.num_positions} positions in a prompt of {request.num_prompt_tokens} tokens"
    elif request.skip_reading_prefix_cache:
        refusal = "prompt_logprobs (or skip_reading_prefix_cache) would compute the placeholders"
    elif request.lora_request is not None:
        refusal = "a LoRA adapter changes the base that the version was made for"
    elif request.pooling_params is not None or request.resumable:
        refusal = "only generation of one prompt can start with a version"
    return Asked(wanted, refusal, refused=bool(refusal))
