"""The backend over other foreword servers: two real ones with embedded engines and one registry."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreword.core.artefact import ArtefactHeader, load_artefact, save_artefact
from foreword.core.compile import compile
from foreword.core.model import FrozenModel, load_base
from foreword.core.template import TaskTemplate
from foreword.engine.engine import Engine
from foreword.engine.request import Output, Request
from foreword.errors import BackendFailed, BadRequest, IncompatibleModel
from foreword.registry.records import Version
from foreword.registry.store import Registry
from foreword.serve.engines.embedded import EmbeddedBackend
from foreword.serve.engines.remote import RemoteBackend
from foreword.serve.gateway import create_app
from tests.serve.artefacts import BASE, demo_base, write_artefact
from tests.serve.fakes import Served, served
from tests.serve.http_cases import answer, demo_info, ids, in_loop, text
from tests.serve.stub_vllm import StubVLLM
from tests.tiny import tiny

METHODS: dict[str, Any] = {"triage": "prompt", "clause": "prefix", "handbook": "kv"}
TURNS = ({"role": "user", "content": "Where is order 29412?"},)


@dataclass
class Stage:
    """Servers, their registry, and an engine of its own to compare with."""

    registry: Registry
    alone: Engine
    servers: list[Served] = field(default_factory=list)
    versions: dict[str, Version] = field(default_factory=dict)

    def publish(self, path: Path) -> Version:
        version = self.registry.publish(path)
        self.alone.add_prefix(version.sha256, compile(demo_base(), load_artefact(path)))
        self.versions[version.task] = version
        return version

    def expected(self, request: Request) -> Output:
        return self.alone.generate([request])[0]


def with_slots(folder: Path) -> Path:
    """An artefact for chats with soft slots behind the text."""
    base, template = demo_base(), TaskTemplate("{soft:4}{input} so{soft:3}", chat=True)
    header = ArtefactHeader(
        method="prompt",
        task="slots",
        block=template.block(base.tokenizer),
        soft_after=3,
        base=base.fingerprint,
        spec=base.spec,
        template=template.to_json(),
    )
    vectors = {"prompt": base.embedding.weight[7:14].detach().clone() * 2}
    save_artefact(folder / "slots.safetensors", header, vectors)
    return folder / "slots.safetensors"


def own_base() -> FrozenModel:
    """Engines in threads each need one: they hook into its layers."""
    return load_base(str(BASE), dtype="float32")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("remote")
    with Registry.open(folder / "home") as registry, contextlib.ExitStack() as stack:
        found = Stage(registry, Engine(demo_base(), kv_memory="64MiB"))
        for seed, (task, method) in enumerate(METHODS.items()):
            found.publish(write_artefact(folder, task, method, seed=seed))
        found.publish(with_slots(folder))
        for _ in range(2):
            engine = Engine(own_base(), kv_memory="64MiB", max_queue=64)
            engine.start()
            backend = EmbeddedBackend(engine)
            app = create_app(backend, registry, base_name="base-3m")
            found.servers.append(stack.enter_context(served(app, backend)))
        yield found


@contextlib.asynccontextmanager
async def backend_over(urls: list[str], **options: Any) -> AsyncIterator[RemoteBackend]:
    backend = RemoteBackend(demo_info(), demo_base().tokenizer, urls, **({"probe_every_s": 0.05} | options))
    try:
        await backend.start()
        yield backend
    finally:
        await backend.aclose()


def run(stage: Stage, scenario: Callable[[RemoteBackend], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        async with backend_over([server.url for server in stage.servers], **options) as backend:
            for version in stage.versions.values():
                await backend.load(version.sha256, stage.registry.path(version))
            await scenario(backend)

    in_loop(main, 60)


def check_equal(stage: Stage, requests: list[Request]) -> None:
    """Answers over HTTP, all at once, equal those of an engine at hand, tokens and text and log-probabilities."""

    async def scenario(backend: RemoteBackend) -> None:
        streams = await asyncio.gather(*(answer(backend, request) for request in requests))
        for request, found in zip(requests, streams, strict=True):
            expected = stage.expected(request)
            assert len(found) == request.n
            for index, completion in enumerate(expected.completions):
                chunks = found[index]
                assert (text(chunks), ids(chunks)) == (completion.text, completion.token_ids), request
                assert chunks[-1].finish_reason == completion.finish_reason
                logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
                assert len(logprobs) == len(completion.logprobs)
                for mine, theirs in zip(logprobs, completion.logprobs, strict=True):
                    assert mine.token_id == theirs.token_id
                    assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                    assert mine.top.keys() == theirs.top.keys()

    run(stage, scenario)


def test_answers_equal_the_engines(stage: Stage) -> None:
    prefixes = [None, *(stage.versions[task].sha256 for task in METHODS)]
    requests = []
    for prefix in prefixes:
        requests += [
            Request(prompt="You billed us twice", prefix=prefix),
            Request(messages=TURNS, prefix=prefix, max_tokens=9, logprobs=3),
            Request(prompt_ids=[11, 12, 13], prefix=prefix, ignore_eos=True, logprobs=0),
            Request(messages=TURNS, prefix=prefix, temperature=0.8, top_p=0.9, top_k=20, seed=-5, n=2, max_tokens=6),
            Request(messages=TURNS, prefix=prefix, choices=("yes", "no", "maybe")),
            Request(messages=TURNS, prefix=prefix, repetition_penalty=1.3, frequency_penalty=0.5, stop=("e",)),
        ]
    check_equal(stage, requests)


def test_soft_slots_behind_the_text(stage: Stage) -> None:
    sha256 = stage.versions["slots"].sha256
    check_equal(
        stage,
        [
            Request(prompt="You billed us twice", prefix=sha256, max_tokens=6, logprobs=2),
            Request(messages=TURNS, prefix=sha256, max_tokens=6, logprobs=2),
            Request(messages=TURNS, prefix=sha256, max_tokens=6),
        ],
    )


def test_limits_hold_before_anything_is_sent(stage: Stage) -> None:
    sha256 = stage.versions["triage"].sha256

    async def scenario(backend: RemoteBackend) -> None:
        stream = await backend.submit([Request(prompt="hello", prefix=sha256)])
        assert stream.num_prompt_tokens == stage.expected(Request(prompt="hello", prefix=sha256)).num_prompt_tokens
        await stream.aclose()
        capped = await answer(backend, Request(prompt="hello", prefix=sha256, default_limit=2, ignore_eos=True))
        assert len(ids(capped[0])) == 2
        special = next(token.content for token in demo_base().tokenizer.added_tokens_decoder.values() if token.special)
        with pytest.raises(BadRequest, match="special token"):
            await backend.submit([Request(prompt=f"x{special}", allow_special=False)])
        with pytest.raises(BadRequest, match="allowed_ids"):
            await backend.submit([Request(prompt="x", allowed_ids=[5])])

    run(stage, scenario)


def test_a_refusal_comes_in_the_servers_words(stage: Stage) -> None:
    async def scenario(backend: RemoteBackend) -> None:
        with pytest.raises(BadRequest, match=r"n: .*128"):
            await backend.submit([Request(prompt="x", n=129)])

    run(stage, scenario)


def test_versions_that_cannot_be_had(stage: Stage, tmp_path: Path) -> None:
    unknown = write_artefact(tmp_path, "unknown", seed=9)
    other = write_artefact(tmp_path, "other", base=tiny("llama", vocab_size=512, tokenizer=demo_base().tokenizer))

    async def scenario(backend: RemoteBackend) -> None:
        with pytest.raises(BackendFailed, match=r"does not know this version \(404\)") as caught:
            await backend.load(load_artefact(unknown).sha256, unknown)
        assert "same registry" in caught.value.hint
        with pytest.raises(IncompatibleModel, match="another base"):
            await backend.load(load_artefact(other).sha256, other)

    run(stage, scenario)


def test_a_server_that_drains_gets_nothing_new(stage: Stage) -> None:
    first = stage.servers[0]

    async def scenario(backend: RemoteBackend) -> None:
        first.app.state.gateway.is_draining = True
        async with asyncio.timeout(10):
            while backend.states()[0].is_up:
                await asyncio.sleep(0.01)
        assert text((await answer(backend, Request(prompt="hello", max_tokens=3)))[0])
        first.app.state.gateway.is_draining = False
        async with asyncio.timeout(10):
            while not backend.states()[0].is_up:
                await asyncio.sleep(0.01)

    try:
        run(stage, scenario)
    finally:
        first.app.state.gateway.is_draining = False


def test_a_router_that_has_only_health_and_errors_of_servers(tmp_path: Path) -> None:
    path = write_artefact(tmp_path, "triage")

    async def main() -> None:
        async with StubVLLM() as router, backend_over([router.url]) as backend:
            assert text((await answer(backend, Request(prompt="x")))[0]) == "w0 w1 w2 "
            await router.stop()
            with pytest.raises(BackendFailed):
                await backend.load(load_artefact(path).sha256, path)

    in_loop(main)


def test_servers_that_want_a_key(stage: Stage, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Registry.open(tmp_path / "home") as registry:
        _, key = registry.access.create_key(None)
        version = registry.publish(write_artefact(tmp_path, "triage"))
        engine = Engine(own_base(), kv_memory="64MiB")
        engine.start()
        own = EmbeddedBackend(engine)
        with served(create_app(own, registry, base_name="b", require_keys=True), own) as server:

            async def main() -> None:
                async with backend_over([server.url], key=key) as backend:
                    await backend.load(version.sha256, registry.path(version))
                    found = await answer(backend, Request(prompt="x", prefix=version.sha256, max_tokens=2))
                    assert len(ids(found[0])) > 0
                async with backend_over([server.url], key="fw_wrong") as backend:
                    with pytest.raises(BackendFailed, match="1 are down"):
                        await backend.submit([Request(prompt="x")])

            in_loop(main)
    assert "is its key right?" in caplog.text and key not in caplog.text


def test_a_gateway_in_front_of_servers(stage: Stage) -> None:
    """Clients see what they would see of the server itself."""
    front = RemoteBackend(demo_info(), demo_base().tokenizer, [server.url for server in stage.servers])
    app = create_app(front, stage.registry, base_name="base-3m")
    body = {"model": "triage", "prompt": "You billed us twice", "temperature": 0, "logprobs": 2, "max_tokens": 5}
    with served(app, front) as gateway:
        answers = [httpx.post(f"{url}/v1/completions", json=body) for url in (gateway.url, stage.servers[0].url)]
        here, there = (found.json() for found in answers)
        for name in ("choices", "usage"):
            assert here[name] == there[name]
        assert answers[0].headers["x-foreword-version"] == "triage@1"
        chat = {"model": "triage", "messages": list(TURNS), "stream": True, "temperature": 0}
        chat["stream_options"] = {"include_usage": True}
        lines = []
        for url in (gateway.url, stage.servers[0].url):
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=chat) as stream:
                lines.append([line for line in stream.iter_lines() if '"usage":{' in line])
        (mine,), (theirs,) = lines
        assert mine.partition('"usage"')[2] == theirs.partition('"usage"')[2]
        assert httpx.get(f"{gateway.url}/ready").status_code == 200
