"""What the gateway needs of an engine: the `Backend` Protocol. Imports no torch.

A backend holds prefixes under their artefact's sha256 and streams answers; whether it runs in this process, behind
HTTP, or is several replicas is its own affair. It renders and tokenises; the gateway does not.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from foreword.core.spec import Fingerprint
from foreword.engine.request import Chunk, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStats:
    """The backend now. None where it does not tell."""

    num_running: int = 0
    """Answers in generation."""
    num_waiting: int = 0
    """Answers not in generation yet."""
    num_queued: int | None = None
    """Of these, those for which the engine has no room now."""
    num_kv_blocks: int | None = None
    """Blocks of the key/value pool, with those that prefixes take."""
    num_free_kv_blocks: int | None = None


@dataclass(slots=True)
class Timings:
    """When a stream's tokens came, by `time.monotonic()`: where they arrive, not where they are sent to a slow reader.

    Filled by the backend. `queue_s` is None where it does not tell.
    """

    submitted: float = field(default_factory=time.monotonic)
    queue_s: float | None = None
    first: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)
    num_tokens: dict[int, int] = field(default_factory=dict)
    """By choice, as the two above."""

    def add(self, chunk: Chunk, when: float) -> None:
        """Note a chunk that arrived at `when`."""
        if chunk.token_ids:
            self.first.setdefault(chunk.index, when)
            self.last[chunk.index] = when
            self.num_tokens[chunk.index] = self.num_tokens.get(chunk.index, 0) + len(chunk.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """New tokens of all choices so far."""
        return sum(self.num_tokens.values())

    def first_token_s(self) -> list[float]:
        """Return the time from submission to the first token, of each choice that has one."""
        return [first - self.submitted for first in self.first.values()]

    def per_token_s(self) -> list[float]:
        """Return the mean time between tokens, of each choice with two tokens or more."""
        return [
            (self.last[index] - self.first[index]) / (count - 1)
            for index, count in self.num_tokens.items()
            if count > 1
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """For whom a backend works: what an engine behind HTTP is told besides the request itself."""

    scope: str = ""
    """The tenant: its requests may share cached blocks with each other, and with nobody else. "" without tenants."""
    request_id: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)
    """Headers of the trace that the request belongs to (W3C traceparent, tracestate)."""


ANYONE = Caller()


class Stream(Protocol):
    """The answers to one `submit`, as they come.

    Iterating raises BackendFailed when the engine fails; then and after `aclose` nothing of it runs any more.
    """

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, without the prefix's positions; right at the end of the stream at the latest."""

    @property
    def timings(self) -> Timings:
        """When tokens came."""

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """Yield chunks until every choice has had its last; `index` counts prompt by prompt, `n` choices for each."""

    async def aclose(self) -> None:
        """End what still runs; may be called twice."""


class Backend(Protocol):
    """An engine with one frozen base, as the gateway sees it."""

    @property
    def fingerprint(self) -> Fingerprint:
        """The base's identity."""

    async def start(self) -> None:
        """Begin, in the event loop that serves; the first of all calls."""

    async def load(self, sha256: str, path: Path) -> int:
        """Load an artefact so that requests can name it as `prefix=sha256`; return the bytes that it takes.

        Raises ArtefactCorrupt where the file is damaged or its sha256 is another, IncompatibleModel where it is for
        another base, Overloaded where there is no room for it now.
        """

    async def unload(self, sha256: str) -> None:
        """Forget a loaded prefix; no request that names it runs."""

    async def submit(self, requests: Sequence[Request], caller: Caller = ANYONE) -> Stream:
        """Take all requests, or none.

        Raises BadRequest, NotFound (the prefix is not loaded), Overloaded, BackendFailed.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text."""

    def stats(self) -> BackendStats:
        """Return the present load."""

    def check(self) -> None:
        """Raise BackendFailed where no request at all could be answered now."""

    async def aclose(self) -> None:
        """End everything."""
