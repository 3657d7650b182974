"""A visit: one name at one server, what the registry says of it, and the answers that several checks share. No torch.

Order matters to a server that keeps blocks of earlier requests, so a visit asks for what must be the first of its kind
(probes that nobody has sent) once, before anything else touches it, and keeps the answers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from foreword.core.artefact import ArtefactHeader
from foreword.core.conformance import TOLERANCES, Conformance, Tolerance, check_probe, divergence, judge
from foreword.doctor.server.client import Answer, ServerUnderTest
from foreword.errors import ForewordError

MAX_PROBES = 24
FRESH_TOKENS = 160
"""Of a prompt that should fill at least one block of a prefix cache: vLLM's are 16 tokens on GPUs, 128 on CPUs."""
SHORT_TOKENS = 12
Logprobs = Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """A version as the registry has it."""

    reference: str
    """For example triage@7; for a version of no registry any name."""
    sha256: str
    header: ArtefactHeader
    path: Path | None = None

    @property
    def num_positions(self) -> int:
        """Positions that its block takes."""
        return self.header.block.num_positions

    def has_vectors_of(self, other: Expected) -> bool:
        """Whether both files hold the very same vectors, as after publishing one twice with another note."""
        if self.sha256 == other.sha256:
            return True
        if self.path is None or other.path is None:
            return False
        return _payload_sha256(self.path) == _payload_sha256(other.path)


@dataclass(frozen=True, slots=True)
class Apart:
    """How far answers that should be equal lie apart: the worse divergence of both directions, in nats, for each."""

    distances: tuple[float, ...]
    tolerance: Tolerance

    @property
    def largest(self) -> float:
        """The largest of the distances."""
        return max(self.distances, default=0.0)

    @property
    def mean(self) -> float:
        """Their mean."""
        return sum(self.distances) / max(1, len(self.distances))

    @property
    def ok(self) -> bool:
        """Whether they are as close as two runs of one model."""
        allowed = self.tolerance.mean_kl * (1 + 4 / max(1, len(self.distances)))
        return self.largest <= self.tolerance.max_kl and self.mean <= allowed

    @property
    def message(self) -> str:
        """The figures beside the tolerance."""
        return f"largest KL {self.largest:.2g} (allowed {self.tolerance.max_kl:g}) over {len(self.distances)}"

    def to_json(self) -> dict[str, float]:
        """Return the figures."""
        return {"max_kl": self.largest, "mean_kl": self.mean, "allowed": self.tolerance.max_kl}


def distance(one: Logprobs, two: Logprobs) -> float:
    """Return the worse divergence of both directions between two lists of best tokens, in nats, at least.

    A token that only one list names was no better in the other than the last one there. Without that, two flat
    distributions that share no best token would seem equal.
    """
    return max(divergence(one, _filled(two, one)), divergence(two, _filled(one, two)))


def _filled(known: Logprobs, other: Logprobs) -> Logprobs:
    """Return `known` with the most that tokens of `other` can have there, where that is less than they have."""
    least = min(known.values(), default=0.0)
    return {**{token: min(least, value) for token, value in other.items()}, **known}


def apart(one: Answer, two: Answer) -> list[float]:
    """Return how far two answers to the same prompt lie apart, place by place, up to where their tokens part."""
    found = []
    for place, (a, b) in enumerate(zip(one.logprobs, two.logprobs, strict=False)):
        found.append(distance(a, b))
        if one.token_ids[place : place + 1] != two.token_ids[place : place + 1]:
            break
    return found


@dataclass(frozen=True, slots=True)
class Replay:
    """The version's probes as the server answered them, each asked in one of three ways."""

    probes: tuple[Mapping[str, Any], ...]
    ways: tuple[str, ...]
    """`straight`; `shared`: right after another name was asked the same; `turn`: right after its own first half."""
    found: tuple[Logprobs, ...]
    before: tuple[Logprobs | None, ...]
    """What the other name answered to the same ids, where one was asked."""

    def judged(self, dtype: str, way: str | None = None) -> Conformance:
        """Judge the probes that were asked in one way, or all."""
        chosen = [place for place, its in enumerate(self.ways) if way is None or its == way]
        return judge([self.probes[i] for i in chosen], [self.found[i] for i in chosen], dtype)

    def num(self, way: str) -> int:
        """Return the number of probes that were asked in this way."""
        return self.ways.count(way)


@dataclass(kw_only=True)
class Visit:
    """One name at one server."""

    server: ServerUnderTest
    model: str
    """The name that is asked for."""
    version: Expected | None = None
    """What should answer; None where no registry knows the name."""
    base_name: str | None = None
    """The plain base's name there."""
    neighbours: Sequence[tuple[str, Expected | None]] = ()
    """Other names of the same server, with what should answer them."""
    siblings: Callable[[], Sequence[Expected]] = tuple
    """Other versions of the same task."""
    resolve: Callable[[], Expected | None] = lambda: None
    """Asks the registry again what the name stands for."""
    dtype: str = "bfloat16"
    """The dtype that the server's base runs in."""
    tokenizer: Any = None
    """The base's tokenizer as it was in training; without it rendering cannot be checked."""
    base_logprobs: Callable[[Sequence[int]], Logprobs] | None = None
    """ids -> the plain base's next-token log-probabilities, from somewhere that is trusted."""
    random: random.Random = field(default_factory=random.Random)

    @property
    def probes(self) -> tuple[Mapping[str, Any], ...]:
        """The version's conformance probes."""
        return self.version.header.conformance[:MAX_PROBES] if self.version else ()

    @property
    def tolerance(self) -> Tolerance:
        """What two runs of this base may differ by."""
        return TOLERANCES.get(self.dtype, TOLERANCES["bfloat16"])

    @cached_property
    def token_pool(self) -> list[int]:
        """Ordinary token ids of this base: those of the probes, else of the server's own answer to a word."""
        pool = {token for probe in self.probes for token in probe["ids"]}
        if len(pool) < SHORT_TOKENS:
            answer = self.server.complete(self.model, "The first", max_tokens=8)
            pool |= {*answer.token_ids, *(token for place in answer.logprobs for token in place)}
        return sorted(pool)

    @property
    def num_fresh(self) -> int:
        """Length of a prompt that fills a block of any cache and fits this base."""
        limit = self.version.header.spec.max_positions if self.version else None
        room = FRESH_TOKENS if limit is None else (limit - (self.version.num_positions if self.version else 0)) // 2
        return max(SHORT_TOKENS, min(FRESH_TOKENS, room))

    def fresh_ids(self, count: int) -> list[int]:
        """Return a prompt of ordinary tokens that nobody has sent before."""
        return [self.random.choice(self.token_pool) for _ in range(count)]

    @cached_property
    def neighbour(self) -> tuple[str, Expected | None] | None:
        """Another name with other vectors, rather a task than the base, and rather one with as many positions."""
        own = self.version
        known = [
            (name, other)
            for name, other in self.neighbours
            if other is not None and (own is None or not own.has_vectors_of(other))
        ]
        candidates: list[tuple[str, Expected | None]] = list(known)
        if own is not None:
            candidates = [*sorted(known, key=lambda entry: abs(entry[1].num_positions - own.num_positions))]
        candidates += [entry for entry in self.neighbours if own is None and entry[1] is None]
        if self.base_name and self.base_name != self.model:
            candidates.append((self.base_name, None))
        return next((entry for entry in candidates if self._answers(entry[0])), None)

    def _answers(self, name: str) -> bool:
        try:
            self.server.complete(name, self.fresh_ids(2))
        except ForewordError:
            return False
        return True

    @cached_property
    def replay(self) -> Replay:
        """The probes, asked for the first time in this visit: a third of them each way."""
        header = self.version.header if self.version else None
        ways, found, before = [], [], []
        for place, probe in enumerate(self.probes):
            assert header is not None
            ids = check_probe(probe, header.spec.vocab_size)
            way = ("straight", "shared", "turn")[place % 3]
            earlier = None
            if way == "shared" and self.neighbour is not None:
                earlier = self.server.next_logprobs(self.neighbour[0], ids)[0]
            elif way == "turn" and len(ids) > 1:
                self.server.next_logprobs(self.model, ids[: len(ids) // 2])
            else:
                way = "straight"
            ways.append(way)
            found.append(self.server.next_logprobs(self.model, ids)[0])
            before.append(earlier)
        return Replay(tuple(self.probes), tuple(ways), tuple(found), tuple(before))

    def within(self, distances: Iterable[float]) -> Apart:
        """Return distances beside this base's tolerance."""
        return Apart(tuple(distances), self.tolerance)

    def between(self, pairs: Iterable[tuple[Answer, Answer]]) -> Apart:
        """Return how far the answers of pairs lie apart, every place of each, beside this base's tolerance."""
        return self.within(value for one, two in pairs for value in apart(one, two))


def _payload_sha256(path: Path) -> str:
    """Return a hash of a safetensors file's tensors, without its header."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()
