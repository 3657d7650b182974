"""The gateway's two backends for vLLM on real servers: what they answer is what the embedded engine answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreword.core.artefact import load_artefact
from foreword.core.compile import compile
from foreword.core.compile_file import compile_file
from foreword.engine.engine import Engine
from foreword.engine.request import Output, Request
from foreword.errors import BackendFailed, BadRequest, IncompatibleModel
from foreword.registry.records import Version
from foreword.registry.store import Registry
from foreword.serve.backend import Caller
from foreword.serve.engines.compiled_source import CompiledSource
from foreword.serve.engines.embedded import EmbeddedBackend
from foreword.serve.engines.embeddings import EmbeddingsBackend
from foreword.serve.engines.http_backend import HttpBackend
from foreword.serve.engines.vllm_backend import VLLMBackend
from foreword.serve.gateway import create_app
from tests.serve.artefacts import BASE, demo_base, write_artefact
from tests.serve.engines.test_remote import with_slots
from tests.serve.fakes import served
from tests.serve.http_cases import answer, demo_info, ids, in_loop, text
from tests.vllm.cases import figures
from tests.vllm.server import Server, vllm_server

METHODS: dict[str, Any] = {"triage": "prompt", "clause": "prefix", "handbook": "kv"}
LENGTHS = {"triage": 6, "clause": 31, "handbook": 45}
TEXTS = ("You billed us twice", "Where is order 29412? " * 4, "é ö 日本")
TURNS = ({"role": "user", "content": "Please cancel my Team plan from January."},)


@dataclass
class Stage:
    """A registry, an engine to compare with, and servers."""

    registry: Registry
    alone: Engine
    versions: dict[str, Version]
    plugin: Server
    embeddings: Server

    def expected(self, request: Request) -> Output:
        return self.alone.generate([request])[0]


def publish(registry: Registry, path: Path, *, compiled: bool = True) -> Version:
    version = registry.publish(path)
    if compiled:
        out = path.with_suffix(".compiled")
        compile_file(demo_base(), path, out)
        registry.add_compiled(out)
    return version


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("backend")
    with Registry.open(folder / "home") as registry:
        alone, versions = Engine(demo_base(), kv_memory="64MiB"), {}
        for seed, (task, method) in enumerate(METHODS.items()):
            path = write_artefact(folder, task, method, seed=seed, num_vectors=LENGTHS[task])
            versions[task] = publish(registry, path)
            alone.add_prefix(versions[task].sha256, compile(demo_base(), load_artefact(path)))
        path = with_slots(folder)
        versions["slots"] = publish(registry, path, compiled=False)
        alone.add_prefix(versions["slots"].sha256, compile(demo_base(), load_artefact(path)))
        details = ["--enable-prompt-tokens-details"]
        with (
            vllm_server(BASE, registry.blobs.url, args=details) as plugin,
            vllm_server(BASE, None, args=["--enable-prompt-embeds"]) as embeddings,
        ):
            yield Stage(registry, alone, versions, plugin, embeddings)


@contextlib.asynccontextmanager
async def backend_over(stage: Stage, *, by_embeddings: bool = False, **options: Any) -> AsyncIterator[Any]:
    info, tokenizer = demo_info(), demo_base().tokenizer
    backend: HttpBackend
    if by_embeddings:
        backend = EmbeddingsBackend(info, tokenizer, [str(stage.embeddings)], **options)
    else:
        source = CompiledSource(stage.registry, str(BASE), "float32")
        backend = VLLMBackend(info, tokenizer, [str(stage.plugin)], source, **options)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.aclose()


async def load(stage: Stage, backend: Any, task: str) -> str:
    version = stage.versions[task]
    await backend.load(version.sha256, stage.registry.path(version))
    return version.sha256


async def check_equal(stage: Stage, backend: HttpBackend, requests: Sequence[Request]) -> None:
    """Sixteen at once: tokens, text, end and log-probabilities are those of the embedded engine."""
    gate = asyncio.Semaphore(16)

    async def one(request: Request) -> Any:
        async with gate:
            return await answer(backend, request, caller=Caller(scope="acme"))

    found = await asyncio.gather(*map(one, requests))
    for request, choices in zip(requests, found, strict=True):
        expected, chunks = stage.expected(request), choices[0]
        assert (ids(chunks), text(chunks)) == (expected.token_ids, expected.text), request
        assert chunks[-1].finish_reason == expected.finish_reason
        logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
        theirs = expected.completions[0].logprobs
        assert [(one.token_id, list(one.top)) for one in logprobs] == [(one.token_id, list(one.top)) for one in theirs]
        assert [one.logprob for one in logprobs] == pytest.approx([one.logprob for one in theirs], abs=1e-4)


def mixed(prefixes: Sequence[str | None]) -> list[Request]:
    requests = []
    for prefix in prefixes:
        requests += [Request(prompt=found, prefix=prefix, ignore_eos=True) for found in TEXTS]
        requests += [
            Request(messages=TURNS, prefix=prefix),
            Request(messages=TURNS, prefix=prefix, max_tokens=5, logprobs=3),
            Request(prompt_ids=[300, 301, 302], prefix=prefix, max_tokens=9, logprobs=0, ignore_eos=True),
            Request(prompt=TEXTS[0], prefix=prefix, max_tokens=20, stop=("e", "the"), ignore_eos=True),
            Request(prompt=TEXTS[0], prefix=prefix, max_tokens=12, frequency_penalty=0.7, presence_penalty=0.3),
        ]
    return requests


def test_answers_with_the_plugin_equal_the_engines(stage: Stage) -> None:
    async def scenario() -> None:
        async with backend_over(stage) as backend:
            prefixes = [None, *[await load(stage, backend, task) for task in METHODS]]
            await check_equal(stage, backend, mixed(prefixes) * 2)

    in_loop(scenario, 240)


def test_answers_by_embeddings_equal_the_engines(stage: Stage) -> None:
    async def scenario() -> None:
        async with backend_over(stage, by_embeddings=True) as backend:
            await check_equal(stage, backend, mixed([None, await load(stage, backend, "triage")]))
            slots = await load(stage, backend, "slots")
            await check_equal(
                stage,
                backend,
                [
                    Request(prompt=TEXTS[0], prefix=slots, max_tokens=8, ignore_eos=True),
                    Request(messages=TURNS, prefix=slots, max_tokens=8, ignore_eos=True),
                ],
            )
            with pytest.raises(IncompatibleModel, match="no embeddings can carry"):
                await load(stage, backend, "clause")

    in_loop(scenario, 240)


def test_seeds_choices_and_several_answers(stage: Stage) -> None:
    async def scenario() -> None:
        async with backend_over(stage) as backend:
            sha256 = await load(stage, backend, "handbook")
            request = Request(prompt="x", prefix=sha256, temperature=0.9, seed=-1, n=3, max_tokens=8, ignore_eos=True)
            first, second = await answer(backend, request), await answer(backend, request)
            assert sorted(first) == [0, 1, 2]
            assert {k: ids(v) for k, v in first.items()} == {k: ids(v) for k, v in second.items()}
            assert len({ids(chunks) for chunks in first.values()}) > 1
            choices = ("yes", "no", "perhaps so")
            found = await answer(backend, Request(messages=TURNS, prefix=sha256, choices=choices))
            assert text(found[0]) in choices and found[0][-1].finish_reason == "stop"
            stream = await backend.submit([Request(prompt="hello", prefix=sha256)])
            async for _ in stream:
                pass
            expected = stage.expected(Request(prompt="hello", prefix=sha256))
            assert stream.num_prompt_tokens == expected.num_prompt_tokens
            assert stream.num_cached_tokens >= expected.num_prefix_positions

    in_loop(scenario, 120)


def test_a_version_that_vllm_cannot_load_fails_alone(stage: Stage, tmp_path: Path) -> None:
    version = publish(stage.registry, write_artefact(tmp_path, "lost", "kv", seed=70))
    compiled = stage.registry.compiled(version.sha256, "float32")
    assert compiled is not None
    stage.registry.blobs.fetch(compiled.sha256).unlink()

    async def scenario() -> None:
        async with backend_over(stage) as backend:
            with pytest.raises(BackendFailed, match="the engine failed the request"):
                await backend.load(version.sha256, stage.registry.path(version))
            await check_equal(stage, backend, [Request(prompt="x", prefix=await load(stage, backend, "triage"))])

    in_loop(scenario, 120)


def test_refusals_and_lengths(stage: Stage) -> None:
    async def scenario() -> None:
        async with backend_over(stage) as backend:
            assert backend.pool.max_model_len == 256
            with pytest.raises(BadRequest, match="the engine refuses logprobs"):
                await backend.submit([Request(prompt="x", logprobs=500)])
            with pytest.raises(BadRequest, match="the engine takes 256"):
                await backend.submit([Request(prompt="x", max_tokens=256)])
            request = Request(prompt_ids=[300], prefix=await load(stage, backend, "handbook"), ignore_eos=True)
            room = 256 - backend.loaded[request.prefix].num_positions - 1
            longest = Request(prompt_ids=[300], prefix=request.prefix, ignore_eos=True, max_tokens=room)
            assert len(ids((await answer(backend, longest))[0])) == room

    in_loop(scenario, 120)


def test_a_reader_that_leaves_frees_the_engine(stage: Stage) -> None:
    """Proves: the server stops in the middle, seen by the tokens it made; not merely that it is idle in the end."""
    asked = 240

    async def scenario() -> None:
        async with backend_over(stage) as backend:
            before = made = figures(stage.plugin)["vllm:generation_tokens_total"]
            stream = await backend.submit([Request(prompt="x", max_tokens=asked, ignore_eos=True)])
            async for _ in stream:
                break
            await stream.aclose()
            until = time.monotonic() + 10
            while True:  # its figures lag behind its answers: wait until they stand still
                await asyncio.sleep(0.5)
                found = figures(stage.plugin)
                if not found["vllm:num_requests_running"] and found["vllm:generation_tokens_total"] == made > before:
                    break
                made = found["vllm:generation_tokens_total"]
                assert time.monotonic() < until, found
            assert made - before < asked

    in_loop(scenario, 60)


def test_a_server_without_the_plugin_is_not_asked(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        source = CompiledSource(stage.registry, str(BASE), "float32")
        backend = VLLMBackend(demo_info(), demo_base().tokenizer, [str(stage.embeddings)], source)
        await backend.start()
        while "without the plug-in" not in caplog.text:
            await asyncio.sleep(0.05)
        with pytest.raises(BackendFailed, match="1 are down"):
            await backend.submit([Request(prompt="x")])
        await backend.aclose()

    in_loop(scenario, 60)


def test_a_gateway_over_vllm_answers_as_one_over_the_engine(stage: Stage) -> None:
    """The same request, the same body of the answer: text, log-probabilities' tokens, usage."""
    source = CompiledSource(stage.registry, str(BASE), "float32")
    vllm = VLLMBackend(demo_info(), demo_base().tokenizer, [str(stage.plugin)], source)
    engine = Engine(demo_base(), kv_memory="64MiB")
    engine.start()
    own = EmbeddedBackend(engine)
    with (
        served(create_app(vllm, stage.registry, base_name="base-3m"), vllm) as far,
        served(create_app(own, stage.registry, base_name="base-3m"), own) as near,
    ):
        for model in ("base-3m", *METHODS):
            body = {"model": model, "messages": list(TURNS), "temperature": 0, "logprobs": True, "top_logprobs": 2}
            here, there = (
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json() for url in (far.url, near.url)
            )
            assert here["usage"] == there["usage"]
            mine, theirs = here["choices"][0], there["choices"][0]
            assert (mine["message"], mine["finish_reason"]) == (theirs["message"], theirs["finish_reason"])
            tokens = [[entry["token"] for entry in choice["logprobs"]["content"]] for choice in (mine, theirs)]
            assert tokens[0] == tokens[1]


def test_vllm_killed_in_the_middle_of_an_answer(stage: Stage) -> None:
    """The last test of this file: it ends the server."""

    async def scenario() -> None:
        async with backend_over(stage, probe_every_s=0.1) as backend:
            stream = await backend.submit([Request(prompt="x", max_tokens=240, ignore_eos=True)])
            with pytest.raises(BackendFailed, match="in the middle of the answer"):
                async for _ in stream:
                    os.killpg(stage.plugin.process.pid, signal.SIGKILL)
            async with asyncio.timeout(20):
                while backend.states()[0].is_up:
                    await asyncio.sleep(0.05)
            with pytest.raises(BackendFailed, match="1 are down"):
                backend.check()

    in_loop(scenario, 60)
