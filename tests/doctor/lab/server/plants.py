"""Faults of servers, each planted in a running one: `PLANTS`, and healthy servers: `HEALTHY`.

A plant changes one thing of gateway or engine and leaves the rest as it is; what doctor is told is what an operator
would have: the URL, the registry, and where it says so the base's tokenizer or the replica that is known to be good.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import foreword.engine.engine
import foreword.engine.runner
import foreword.engine.window
from foreword.core.artefact import load_artefact
from foreword.core.compile import compile
from foreword.core.prompt import SoftKV, SoftPrompt
from foreword.doctor.finding import Finding
from foreword.engine.request import Request
from foreword.registry.store import Registry
from foreword.serve.engines.embedded import EmbeddedBackend
from foreword.serve.http.openai_api import Body
from tests.doctor.lab.server.stage import (
    ARCHITECTURES,
    Engineered,
    Running,
    base_of,
    changed,
    examine,
    in_bfloat16,
    other_template,
    other_tokenizer,
    running,
)

BLOCK = 16
"""Tokens of a block of the planted prefix cache."""


@dataclass(frozen=True, kw_only=True)
class ServerPlant:
    """A server with one fault."""

    fault: str
    """The name of `foreword.doctor.faults.FAULTS` that doctor has to name first."""
    architecture: str
    variant: str
    """How it was made; unique together with fault and architecture."""
    run: Callable[[str], AbstractContextManager[tuple[Running, ...]]]
    """Architecture -> the server with the fault, behind those that are healthy."""
    told: Callable[[str], dict[str, Any]] = field(default=lambda architecture: {})
    """Architecture -> what doctor is told besides URL and registry."""
    names: tuple[str, ...] = ("alpha",)
    cheap: bool = False
    """Part of the cross-section that every run of the tests takes."""

    @property
    def name(self) -> str:
        """Its name among all plants."""
        return f"{self.fault or 'healthy'}-{self.architecture}-{self.variant}".replace(" ", "_")

    def diagnose(self) -> list[Finding]:
        """Start the server and return all findings; the first that is not ok should be the fault."""
        with self.run(self.architecture) as servers:
            return examine(*servers, names=self.names, **self.told(self.architecture))


def alone(**options: Any) -> Callable[[str], AbstractContextManager[tuple[Running, ...]]]:
    """Return what runs one server; values that can be called are given the architecture."""

    @contextmanager
    def run(architecture: str) -> Iterator[tuple[Running, ...]]:
        made = {
            name: value if isinstance(value, type) else value(architecture) if callable(value) else value
            for name, value in options.items()
        }
        with running(architecture, **made) as server:
            yield (server,)

    return run


def patched(module: Any, name: str, make: Callable[[Any], Any]) -> Callable[[str], Any]:
    """Return what runs one server while a function of the engine is another one."""

    @contextmanager
    def run(architecture: str) -> Iterator[tuple[Running, ...]]:
        with patch.object(module, name, make(getattr(module, name))), running(architecture) as server:
            yield (server,)

    return run


def with_tokenizer(architecture: str) -> dict[str, Any]:
    """Tell doctor the tokenizer of training."""
    return {"tokenizer": base_of(architecture).tokenizer}


# Caches


class SharedCache(Engineered):
    """A prefix cache whose key is the tokens alone: whoever asked first has filled it, prefix included."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.filled: dict[tuple[int, ...], str | None] = {}

    def tamper(self, request: Request) -> Request:
        ids = tuple(request.prompt_ids or ())
        if len(ids) <= BLOCK:
            return request
        return dataclasses.replace(request, prefix=self.filled.setdefault(ids[:BLOCK], request.prefix))


class LateCache(SharedCache):
    """The same among tasks only: requests to the plain base have a cache of their own."""

    def tamper(self, request: Request) -> Request:
        return request if request.prefix is None else super().tamper(request)


# Versions


class OldNames:
    """A view of the registry from before the promotion: `alpha` is still its first version."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def resolve(self, reference: str) -> Any:
        return self.registry.resolve("alpha@1" if reference in ("alpha", "alpha@2") else reference)

    def path(self, version: Any) -> Path:
        return self.registry.path(version)

    def tasks(self) -> Any:
        return self.registry.tasks()


@contextmanager
def one_of_two_replicas(architecture: str) -> Iterator[tuple[Running, ...]]:
    """Run a healthy replica, and one that missed the promotion."""
    with running(architecture) as good, running(architecture, source=OldNames) as stale:
        yield good, stale


class OldVectors(EmbeddedBackend):
    """Vectors are kept by the task's name: the second version finds those of the first."""

    def _load(self, sha256: str, path: Path) -> int:
        count = super()._load(sha256, path)
        if load_artefact(path).header.task == "alpha":
            with Registry.open(_home(path)) as registry:
                old = load_artefact(registry.path(registry.resolve("alpha@1")))
            self.engine.add_prefix(sha256, compile(self._compiler, old))
        return count


def _home(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "home")


class Alternating(OldVectors):
    """Two engines behind one gateway, asked in turn; one of them has kept the old vectors."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.count = 0

    def _load(self, sha256: str, path: Path) -> int:
        count = super()._load(sha256, path)
        self.engine.add_prefix(f"{sha256}-new", compile(self._compiler, load_artefact(path)))
        return count

    async def submit(self, requests: Any, *args: Any) -> Any:
        self.count += 1
        if self.count % 2:
            requests = [r if r.prefix is None else dataclasses.replace(r, prefix=f"{r.prefix}-new") for r in requests]
        return await super().submit(requests, *args)


# Where vectors enter


class NoVectors(Engineered):
    """The engine answers, but the vectors never reach it."""

    def tamper(self, request: Request) -> Request:
        return dataclasses.replace(request, prefix=None)


class MaskedPrefix(EmbeddedBackend):
    """The vectors are in the cache, and the mask hides them: the hard text in front is all that is left."""

    def _load(self, sha256: str, path: Path) -> int:
        count = super()._load(sha256, path)
        prefix = self.engine.prefixes[sha256]
        assert prefix.block is not None
        soft = set(prefix.block.soft_positions())
        hard = [token for place, token in enumerate(prefix.block.literal_ids()) if place not in soft]
        self.engine.add_prefix(sha256, _hard_prefix(self._compiler, hard, prefix))
        return count


def _hard_prefix(base: Any, hard: list[int], like: Any) -> Any:
    """Return the keys and values of hard text alone."""
    from transformers import DynamicCache

    cache = DynamicCache()
    positions = torch.arange(len(hard))[None]
    with torch.no_grad():
        base.run_decoder(base.embed(torch.tensor([hard])), positions=positions, cache=cache)
    return dataclasses.replace(
        like,
        keys=tuple(layer.keys[0] for layer in cache.layers),
        values=tuple(layer.values[0] for layer in cache.layers),
    )


class LostAtSecondTurn(Engineered):
    """A session cache: a prompt that goes on from an earlier one is answered without the vectors."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def again(self, request: Request) -> Request:
        return dataclasses.replace(request, prefix=None)

    def tamper(self, request: Request) -> Request:
        if request.prefix is None or request.prompt_ids is None:
            return request
        ids, tasks = tuple(request.prompt_ids), request.prefix
        goes_on = any(task == tasks and len(old) < len(ids) and ids[: len(old)] == old for task, old in self.seen)
        self.seen.append((tasks, ids))
        return self.again(request) if goes_on else request


class TwiceAtSecondTurn(LostAtSecondTurn):
    """A second turn puts the vectors in front once more, behind those of the first."""

    def _load(self, sha256: str, path: Path) -> int:
        count = super()._load(sha256, path)
        self.engine.add_prefix(f"{sha256}-twice", compile(self._compiler, _doubled(path)))
        return count

    def again(self, request: Request) -> Request:
        return dataclasses.replace(request, prefix=f"{request.prefix}-twice")


def _doubled(path: Path) -> SoftKV | SoftPrompt:
    vectors = load_artefact(path).vectors
    if isinstance(vectors, SoftPrompt):
        return SoftPrompt(torch.cat([vectors.vectors] * 2))
    assert isinstance(vectors, SoftKV)
    twice = [tuple(torch.cat([t, t], dim=1) for t in tensors) for tensors in (vectors.keys, vectors.values)]
    return SoftKV(*twice)


# Batches and noise


def pads_attended(row_mask: Any) -> Any:
    """Return a mask that lets rows see the padding in front of them."""
    return lambda ends, width: torch.ones_like(row_mask(ends, width))


def noisy(architecture: str) -> Any:
    """Return the base in training mode, with dropout on attention."""
    base = changed(base_of(architecture))
    for module in base.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    base.model.train()
    return base


# Limits and settings


def prefix_uncounted(check_length: Any) -> Any:
    """Return a check of lengths that forgets the prefix."""
    return lambda job, spec, pool: check_length(dataclasses.replace(job, entry=None), spec, pool)


class Penalised(Engineered):
    """A repetition penalty of the server's own."""

    def tamper(self, request: Request) -> Request:
        return dataclasses.replace(request, repetition_penalty=1.3)


class Present(Engineered):
    """A presence penalty of the server's own."""

    def tamper(self, request: Request) -> Request:
        return dataclasses.replace(request, presence_penalty=1.0)


class Warm(Engineered):
    """Greedy requests are drawn, at a temperature that the server prefers."""

    def tamper(self, request: Request) -> Request:
        return dataclasses.replace(request, temperature=max(request.temperature, 0.9), seed=request.seed or 1)


def top_k_by_default(sampling: Any) -> Any:
    """Return a reading of bodies that draws from two tokens where a body names no number of them."""
    return lambda body, prefix: {"top_k": 2} | sampling(body, prefix)


class Stops(Engineered):
    """Answers end early, at a stop of the server's own."""

    def tamper(self, request: Request) -> Request:
        return dataclasses.replace(request, max_tokens=min(request.max_tokens or 12, 8))


# Another base


def drifted(architecture: str) -> Any:
    """Return a later revision of the base, which nobody compares with what the versions were trained for."""
    base = changed(base_of(architecture))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.1)
    return base


def honest(base: Any) -> Any:
    """Return a base under its own fingerprint, which the gateway compares."""
    del base.fingerprint
    return base


def _plants() -> Iterator[ServerPlant]:
    runner, window, engine = foreword.engine.runner, foreword.engine.window, foreword.engine.engine
    made: list[tuple[str, str, Callable[[str], Any], dict[str, Any]]] = [
        ("cache-shared", "key of tokens alone", alone(backend=SharedCache), {"cheap": True}),
        ("cache-shared", "among tasks", alone(backend=LateCache), {}),
        ("stale-version", "one of two replicas", one_of_two_replicas, {"cheap": True}),
        ("stale-version", "vectors kept by name", alone(backend=OldVectors), {}),
        ("stale-version", "every second answer", alone(backend=Alternating), {}),
        ("context-overflow", "prefix not counted", patched(engine, "check_length", prefix_uncounted), {}),
        ("decoding-drift", "repetition penalty", alone(backend=Penalised), {}),
        ("decoding-drift", "presence penalty", alone(backend=Present), {}),
        ("decoding-drift", "temperature", alone(backend=Warm), {}),
        ("decoding-drift", "default top-k", patched(Body, "_sampling", top_k_by_default), {}),
        ("decoding-drift", "stops early", alone(backend=Stops), {}),
        ("nondeterminism", "dropout", alone(base=noisy), {}),
        ("injected-again", "lost at the second turn", alone(backend=LostAtSecondTurn), {"cheap": True}),
        ("injected-again", "again at the second turn", alone(backend=TwiceAtSecondTurn), {}),
        ("other-base", "unchecked", alone(base=drifted), {}),
        ("other-base", "refused", alone(base=lambda a: honest(drifted(a))), {"names": ()}),
        ("numerics", "bfloat16", alone(base=in_bfloat16), {"told": lambda a: {"dtype": "float32"}}),
        ("tokenizer-changed", "unchecked", alone(base=lambda a: changed(base_of(a), other_tokenizer())), TOLD),
        ("tokenizer-changed", "refused", alone(base=lambda a: honest(changed(base_of(a), other_tokenizer()))), {}),
        ("template-drift", "unchecked", alone(base=lambda a: changed(base_of(a), other_template())), TOLD),
        ("template-drift", "refused", alone(base=lambda a: honest(changed(base_of(a), other_template()))), {}),
        ("mask-blind", "not applied", alone(backend=NoVectors), {}),
        ("mask-blind", "hidden by the mask", alone(backend=MaskedPrefix), {}),
        ("padding-between", "padding attended", patched(runner, "row_mask", pads_attended), {"cheap": True}),
        ("right-padded-generation", "padding attended", patched(window, "row_mask", pads_attended), {}),
    ]
    for fault, variant, run, options in made:
        for architecture in ARCHITECTURES:
            cheap = {"cheap": options.get("cheap", False) and architecture == "llama"}
            yield ServerPlant(fault=fault, architecture=architecture, variant=variant, run=run, **{**options, **cheap})


TOLD: dict[str, Any] = {"told": with_tokenizer}
PLANTS: tuple[ServerPlant, ...] = tuple(_plants())
HEALTHY: tuple[ServerPlant, ...] = tuple(
    ServerPlant(fault="", architecture=architecture, variant=variant, run=run, names=(), told=told, cheap=cheap)
    for architecture in ARCHITECTURES
    for variant, run, told, cheap in (
        ("float32", alone(), with_tokenizer, architecture == "llama"),
        ("bfloat16", alone(base=in_bfloat16), lambda architecture: {"dtype": "bfloat16"}, False),
    )
)
