"""Tiny bases in folders, versions of every kind in a blob store, and what the embedded engine answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

from foreword.core.artefact import file_sha256
from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.compiled import save_compiled
from foreword.core.model import FrozenModel, load_base
from foreword.core.prompt import KVPrefix, SoftKV, SoftPrefix, SoftPrompt
from foreword.engine.engine import Engine
from foreword.engine.request import Request
from foreword.registry.blobs import FolderBlobs, staged
from foreword.serve.vllm.wire import Wanted, cache_salt, scope_of
from tests.bundled import BASE
from tests.tiny import CONFIGS
from tests.vllm.server import NAME, Server

PLACEHOLDER = 0


@dataclass(frozen=True, slots=True)
class Version:
    """A compiled file in the blob store."""

    name: str
    sha256: str
    num_positions: int


@dataclass(frozen=True, slots=True)
class Ask:
    """A greedy request for a version, or for the plain base."""

    version: Version | None
    ids: tuple[int, ...]
    max_tokens: int = 8


def save_tiny(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random tiny model whose head size vLLM's CPU backend takes, with the bundled base's tokenizer."""
    config = CONFIGS[name]()
    for key, value in {"vocab_size": 4096, "head_dim": 32, **changes}.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # random weights of std 0.02 hardly attend: make differences visible
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def vectors_of(base: FrozenModel, kind: str, count: int, seed: int) -> Any:
    """Return random vectors of a kind: prompt, prefix, kv, or literal (tokens alone, through a one-row prompt)."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    spec = base.spec
    if kind == "prompt":
        return SoftPrompt(rand(count, spec.embed_size))
    if kind == "blocked":
        return SoftPrompt(rand(count - 3, spec.embed_size), Block(((1,), count - 7, (7, 9), 4)))
    if kind == "prefix":
        return SoftPrefix(rand(spec.num_layers, count, spec.hidden_size))
    keys, values = (
        tuple(rand(layer.num_kv_heads, count, getattr(layer, width)) for layer in spec.layers)
        for width in ("head_dim", "value_dim")
    )
    return SoftKV(keys, values)


@dataclass
class World:
    """A base in a folder, a blob store, and the versions in it, known to the embedded engine too."""

    model: Path
    blobs: Path
    base: FrozenModel
    versions: dict[str, Version] = field(default_factory=dict)
    prefixes: dict[str, KVPrefix] = field(default_factory=dict)

    @classmethod
    def make(cls, model: Path, folder: Path) -> World:
        """Load the base in float32 and make an empty blob store."""
        (folder / "blobs").mkdir(parents=True)
        return cls(model, folder / "blobs", load_base(str(model), dtype="float32"))

    def add(self, kind: str, count: int, seed: int = 0, *, stored: bool = True) -> Version:
        """Compile random vectors and put the file into the blob store (or only beside it)."""
        name = f"{kind}-{count}-{seed}"
        return self.add_prefix(
            name, compile(self.base, vectors_of(self.base, kind, count, seed), name=name), stored=stored
        )

    def add_prefix(self, name: str, prefix: KVPrefix, *, stored: bool = True) -> Version:
        """Save a compiled prefix as a version."""
        path = self.blobs.parent / f"{name}.safetensors"
        save_compiled(path, prefix, base=self.base.fingerprint, spec=self.base.spec)
        self.versions[name] = Version(name, file_sha256(path), prefix.num_positions)
        self.prefixes[name] = prefix
        if stored:
            self.store(name)
        return self.versions[name]

    def store(self, name: str) -> None:
        """Put a version's file into the blob store."""
        blobs = FolderBlobs(self.blobs)
        with staged(self.blobs.parent / f"{name}.safetensors", blobs.staging) as file:
            blobs.put(file)

    def path(self, version: Version) -> Path:
        """Return where the blob store keeps a version."""
        return self.blobs / version.sha256[:2] / f"{version.sha256}.safetensors"

    def expect(self, asks: list[Ask]) -> list[list[int]]:
        """Return the embedded engine's greedy tokens."""
        engine = Engine(self.base, kv_memory="64MiB")
        for ask in asks:
            if ask.version is not None and ask.version.name not in engine.prefixes:
                engine.add_prefix(ask.version.name, self.prefixes[ask.version.name])
        outputs = engine.generate(
            [
                Request(
                    prompt_ids=list(ask.ids),
                    prefix=ask.version.name if ask.version else None,
                    max_tokens=ask.max_tokens,
                    ignore_eos=True,
                )
                for ask in asks
            ]
        )
        return [list(output.completions[0].token_ids) for output in outputs]


def body(ask: Ask, tenant: str = "", **changes: Any) -> dict[str, Any]:
    """Return the body for /v1/completions, as the gateway writes it."""
    made: dict[str, Any] = {
        "model": NAME,
        "prompt": list(ask.ids),
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "cache_salt": cache_salt(scope_of(tenant)),
    }
    if ask.version is not None:
        wanted = Wanted(ask.version.sha256, ask.version.num_positions, scope_of(tenant))
        made["prompt"] = [PLACEHOLDER] * wanted.num_positions + made["prompt"]
        made |= {"cache_salt": wanted.salt, "kv_transfer_params": wanted.to_params()}
    made |= changes
    return {key: value for key, value in made.items() if value is not None}


def post(url: str, data: dict[str, Any]) -> httpx.Response:
    """Send one body."""
    return httpx.post(f"{url}/v1/completions", json=data, timeout=120)


def answers(url: str, bodies: list[dict[str, Any]], at_once: int = 16) -> list[httpx.Response]:
    """Send bodies, at most so many at once; responses in their order."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda data: post(url, data), bodies))


def tokens(response: httpx.Response) -> list[int]:
    """Return the answer's token ids; an error status fails the test."""
    assert response.status_code == 200, response.text[:500]
    return list(response.json()["choices"][0]["token_ids"])


def ids(count: int, seed: int) -> tuple[int, ...]:
    """Return random token ids that are no special ones."""
    return tuple(torch.randint(10, 4000, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def figures(url: str) -> dict[str, float]:
    """Return the server's metrics: by name, and by name and source where there is one."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text):
        for sample in family.samples:
            name = sample.name
            if source := sample.labels.get("source"):
                name += f'{{source="{source}"}}'
            found[name] = found.get(name, 0.0) + sample.value
    return found


@dataclass(frozen=True, slots=True)
class Shared:
    """A world and its server."""

    world: World
    url: Server
