"""A server to plant faults in: gateway, embedded engine, registry; and the versions that are published there."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from foreword.core.artefact import load_artefact, save_artefact
from foreword.core.compile import compile
from foreword.core.conformance import make_probes
from foreword.core.model import FrozenModel, load_base
from foreword.core.spec import Method
from foreword.core.template import TaskTemplate
from foreword.doctor.finding import Finding
from foreword.doctor.server.client import ServerUnderTest
from foreword.doctor.server.examine import Circumstances, examine_servers
from foreword.engine.engine import Engine
from foreword.engine.request import Request
from foreword.registry.store import Registry
from foreword.serve.backend import ANYONE, Caller
from foreword.serve.engines.embedded import EmbeddedBackend, EmbeddedStream
from foreword.serve.gateway import create_app
from tests.bundled import BASE, bundled
from tests.serve.artefacts import write_artefact
from tests.serve.fakes import served
from tests.tiny import tiny

ARCHITECTURES = ("qwen3", "llama")
BASE_NAME = "plain"
TEXTS = (
    "Where is my order?",
    "The invoice is wrong, and nobody answers.",
    "Thank you",
    "Please cancel the subscription for our second shop before the end of the month.",
    "yes",
    "How long does the delivery take to Norway?",
    "It broke after two days",
    "I cannot log in with the new password",
    "What does it cost?",
)
VERSIONS: tuple[tuple[str, Method, int], ...] = (("alpha", "kv", 3), ("alpha", "prompt", 1), ("beta", "prompt", 2))
"""Task, method and seed, in the order of publishing: alpha@1 is the old one."""
NUM_VECTORS = 6
SHARPER = 8.0
"""A random model finds all tokens almost equally likely; a trained one does not."""


@cache
def base_of(architecture: str) -> FrozenModel:
    """Return the bundled base, or a random one with its tokenizer; float32."""
    if architecture == "qwen3":
        return bundled("float32")
    tokenizer = bundled("float32").tokenizer
    random = tiny(architecture, vocab_size=len(tokenizer), tokenizer=tokenizer)
    model = copy.deepcopy(random.model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(SHARPER)
    return FrozenModel(model, tokenizer)


def changed(base: FrozenModel, tokenizer: Any = None) -> FrozenModel:
    """Return a copy of a base that is free to be changed, under the fingerprint of the original."""
    copied = FrozenModel(copy.deepcopy(base.model), tokenizer or base.tokenizer)
    copied.fingerprint = base.fingerprint
    return copied


@cache
def home_of(architecture: str) -> Path:
    """Return a registry's folder with two tasks, one of them in two versions."""
    folder = Path(tempfile.mkdtemp(prefix="foreword-lab-"))
    base = base_of(architecture)
    with Registry.open(folder / "home") as registry:
        for task, method, seed in VERSIONS:
            made = write_artefact(folder, task, method, seed=seed, base=base, num_vectors=NUM_VECTORS)
            registry.publish(with_probes(base, made, seed))
    return folder / "home"


def with_probes(base: FrozenModel, path: Path, seed: int = 0) -> Path:
    """Give an artefact its conformance probes, on texts rendered as in training."""
    artefact = load_artefact(path)
    template = TaskTemplate.from_json(artefact.header.template or {})
    start = seed % 3
    rows = [template.render(base.tokenizer, text).ids for text in (*TEXTS[start:], *TEXTS[:start])]
    header = dataclasses.replace(
        artefact.header,
        conformance=make_probes(base, compile(base, artefact), rows),
        training={"dtype": "float32"},
    )
    save_artefact(path, header, artefact.tensors)
    return path


class Engineered(EmbeddedBackend):
    """The embedded backend, with a place where requests can be tampered with."""

    def tamper(self, request: Request) -> Request:
        """Return the request that the engine gets."""
        return request

    async def submit(self, requests: Sequence[Request], caller: Caller = ANYONE) -> EmbeddedStream:
        return await super().submit([self.tamper(request) for request in requests], caller)


@dataclass(frozen=True)
class Running:
    """A server that runs on a registry."""

    url: str
    registry: Registry
    backend: EmbeddedBackend


@contextmanager
def running(
    architecture: str,
    *,
    base: FrozenModel | None = None,
    backend: type[EmbeddedBackend] = EmbeddedBackend,
    source: type[Any] | None = None,
) -> Iterator[Running]:
    """Serve a base, by default that of the versions, with a backend of a class, over a view of a registry."""
    engine = Engine(base or base_of(architecture), kv_memory="48MiB")
    engine.start()
    made = backend(engine)
    with Registry.open(home_of(architecture)) as registry:
        view = registry if source is None else source(registry)
        app = create_app(made, view, base_name=BASE_NAME)
        with served(app, made) as server:
            yield Running(server.url, registry, made)


def examine(*servers: Running, names: Sequence[str] = (), **circumstances: Any) -> list[Finding]:
    """Return what doctor finds at servers of one registry."""
    known = Circumstances(**{"with_latency": False, **circumstances})
    clients = [ServerUnderTest(server.url) for server in servers]
    try:
        return examine_servers(clients, servers[0].registry, names, known)
    finally:
        for client in clients:
            client.__exit__()


def other_tokenizer() -> Any:
    """Return the bundled tokenizer as somebody changed it: text is lowered before it is cut."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(BASE))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def other_template() -> Any:
    """Return the bundled tokenizer with another chat template: a line more in front of every answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(BASE))
    tokenizer.chat_template = tokenizer.chat_template + "{{ 'Sure. ' }}"
    return tokenizer


def in_bfloat16(architecture: str) -> FrozenModel:
    """Return the base in bfloat16, under the same fingerprint."""
    if architecture == "qwen3":
        return load_base(str(BASE), dtype="bfloat16")
    base = base_of(architecture)
    copied = FrozenModel(copy.deepcopy(base.model).to(torch.bfloat16), base.tokenizer)
    copied.fingerprint = base.fingerprint
    return copied
