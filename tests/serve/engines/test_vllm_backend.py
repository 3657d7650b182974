"""The backend over vLLM with the plug-in, on stubs that speak as vLLM does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from foreword.core.artefact import file_sha256
from foreword.core.template import encode_plain
from foreword.engine.render import prepare
from foreword.engine.request import Request
from foreword.errors import (
    ArtefactCorrupt,
    BackendFailed,
    BadRequest,
    IncompatibleModel,
    NotFound,
    Overloaded,
)
from foreword.serve.backend import Caller
from foreword.serve.engines import http_backend as http_backend_module
from foreword.serve.engines.http_backend import drops_space
from foreword.serve.engines.replicas import Timeouts
from foreword.serve.engines.vllm_backend import VLLMBackend, placeholder_id, sampling_fields
from foreword.serve.vllm.wire import cache_salt, parse_params, scope_of
from tests.serve.artefacts import demo_base, write_artefact
from tests.serve.http_cases import FakeSource, answer, compiled_name, demo_info, ids, in_loop, load, text
from tests.serve.stub_vllm import END, StubVLLM, stubs
from tests.tiny import tiny

Scenario = Callable[[VLLMBackend, Sequence[StubVLLM]], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def backend_over(engines: Sequence[StubVLLM], **options: Any) -> AsyncIterator[VLLMBackend]:
    backend = VLLMBackend(
        demo_info(),
        demo_base().tokenizer,
        [engine.url for engine in engines],
        FakeSource(),  # type: ignore[arg-type]
        **({"probe_every_s": 0.02} | options),
    )
    try:
        await backend.start()
        yield backend
    finally:
        await backend.aclose()


def run(scenario: Scenario, count: int = 1, options: dict[str, Any] | None = None, **fields: Any) -> None:
    async def main() -> None:
        async with stubs(count, **fields) as engines, backend_over(engines, **(options or {})) as backend:
            await scenario(backend, engines)

    in_loop(main)


def test_a_task_is_placeholders_its_ids_and_the_name_of_its_file(tmp_path: Path) -> None:
    path = write_artefact(tmp_path, "triage")

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        sha256 = file_sha256(path)
        assert await backend.load(sha256, path) == 1234
        caller = Caller(scope="acme", request_id="req-1", trace={"traceparent": "00-1-2-03"})
        chunks = (await answer(backend, Request(prompt="hello", prefix=sha256, max_tokens=3), caller=caller))[0]
        assert text(chunks) == "w0 w1 w2 " and ids(chunks) == (100, 101, 102)
        proof, body = engines[0].bodies
        wanted = parse_params(body["kv_transfer_params"])
        assert (wanted.sha256, wanted.scope) == (compiled_name(sha256), scope_of("acme"))
        count = wanted.num_positions
        prepared = prepare(Request(prompt="hello"), demo_base(), backend.loaded[sha256])
        assert count == backend.loaded[sha256].num_positions > 6
        assert body["prompt"] == [backend.placeholder] * count + prepared.ids
        assert body["cache_salt"] == wanted.salt == cache_salt(scope_of("acme"), wanted.sha256)
        assert body["model"] == "base" and "prompt_embeds" not in body
        headers = engines[0].headers[1]
        assert (headers["x-request-id"], headers["traceparent"]) == ("req-1", "00-1-2-03")
        assert (proof["max_tokens"], parse_params(proof["kv_transfer_params"]).scope) == (1, scope_of(""))

    run(scenario)


def test_the_plain_base_is_asked_with_a_salt_of_its_tenant() -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        for tenant in ("", "acme"):
            stream = await backend.submit([Request(prompt="hello")], Caller(scope=tenant))
            async for _ in stream:
                pass
            body = engines[0].bodies[-1]
            assert body["prompt"] == encode_plain(demo_base().tokenizer, "hello")
            assert "kv_transfer_params" not in body and body["cache_salt"] == cache_salt(scope_of(tenant))
            assert stream.num_prompt_tokens == len(body["prompt"])

    run(scenario)


def test_the_default_limit_is_the_tasks_own(tmp_path: Path) -> None:
    path = write_artefact(tmp_path, "triage")

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        sha256 = await load(backend, path)
        await answer(backend, Request(prompt="x", prefix=sha256), Request(prompt="x"))
        limits = {bool(body.get("kv_transfer_params")): body["max_tokens"] for body in engines[0].bodies[1:]}
        assert limits == {True: 12, False: 16}  # write_artefact's, and the engine's

    run(scenario)


def test_every_sampling_field_is_said() -> None:
    """vLLM fills what is left out from the checkpoint's generation_config.json."""
    base = demo_base()
    prepared = prepare(Request(prompt="x"), base, None)
    plain = sampling_fields(Request(prompt="x"), prepared, {2, 1})
    assert plain == {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
        "ignore_eos": False,
        "stop_token_ids": [1, 2],
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "max_tokens": 16,
    }
    request = Request(
        prompt="x",
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        seed=-1,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        stop=("a", "bc"),
        ignore_eos=True,
        n=3,
        logprobs=0,
        allowed_ids=(4, 5),
    )
    said = sampling_fields(request, prepared, {2, 1})
    assert {name: value for name, value in said.items() if plain.get(name) != value} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 2**63 - 1,  # vLLM would take -1 for none
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "stop": ["bc", "a"],
        "ignore_eos": True,
        "stop_token_ids": [],
        "n": 3,
        "logprobs": 0,
        "return_tokens_as_token_ids": True,
        "allowed_token_ids": [4, 5],
    }
    assert sampling_fields(Request(prompt="x", temperature=1e-6), prepared, ())["temperature"] == 0.0
    assert sampling_fields(Request(prompt="x", seed=2**64 - 1), prepared, ())["seed"] < 2**63


def test_choices_have_room_for_any_spelling() -> None:
    prepared = prepare(Request(prompt="x", choices=("yes", "né")), demo_base(), None)
    fields = sampling_fields(Request(prompt="x", choices=("yes", "né")), prepared, {2})
    assert fields["structured_outputs"] == {"choice": ["yes", "né"]}
    assert fields["max_tokens"] == len(b"yes") + 1


def test_the_end_token_is_not_part_of_the_answer() -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        assert END in demo_info().stop_ids
        chunks = (await answer(backend, Request(prompt="x", logprobs=2)))[0]
        assert ids(chunks) == (100, 101, 102) and chunks[-1].finish_reason == "stop"
        logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
        assert [logprob.token_id for logprob in logprobs] == [100, 101, 102]
        assert logprobs[0].top == {100: -0.25, 7: -1.5}

    run(scenario)


def test_prompts_and_choices_are_counted_through(tmp_path: Path) -> None:
    path = write_artefact(tmp_path, "triage")

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        sha256 = await load(backend, path)
        requests = [Request(prompt="a", n=2), Request(prompt="b", prefix=sha256), Request(prompt_ids=[5, 6], n=2)]
        found = await answer(backend, *requests)
        assert sorted(found) == [0, 1, 2, 3, 4]
        assert all(text(chunks) == "w0 w1 w2 " for chunks in found.values())

    run(scenario)


def test_lengths_are_checked_with_the_prefix(tmp_path: Path) -> None:
    path = write_artefact(tmp_path, "triage")

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        sha256 = await load(backend, path)
        count = backend.loaded[sha256].num_positions
        request = Request(prompt_ids=[5] * 20, prefix=sha256, max_tokens=64 - 20 - count)
        await answer(backend, request)
        longer = Request(prompt_ids=[5] * 21, prefix=sha256, max_tokens=64 - 20 - count)
        with pytest.raises(BadRequest, match=f"prefix {count} .* prompt 21 .* = 65 positions, the engine takes 64"):
            await backend.submit([request, longer])
        assert len(engines[0].bodies) == 2  # nothing of the second was sent

    run(scenario, max_model_len=64)


@pytest.mark.parametrize(
    "request_",
    [
        Request(prompt="x", temperature=float("nan")),
        Request(prompt="x", prompt_ids=[1]),
        Request(prompt_ids=[10**9]),
        Request(prompt="", n=0),
        Request(prompt="x", choices=()),
    ],
    ids=repr,
)
def test_fields_are_checked_before_anything_is_sent(request_: Request) -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        with pytest.raises(BadRequest):
            await backend.submit([request_])
        assert not engines[0].bodies

    run(scenario)


def test_long_texts_are_rendered_in_a_thread_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        for short in (10**6, 0):
            monkeypatch.setattr(http_backend_module, "SHORT", short)
            await answer(backend, Request(messages=[{"role": "user", "content": "hello " * 10}]))
        here, there = engines[0].bodies
        assert here["prompt"] == there["prompt"]

    run(scenario)


def test_a_replica_without_the_plugin_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """It would answer from placeholders, with status 200."""

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        with pytest.raises(BackendFailed, match="1 are down"):
            await backend.submit([Request(prompt="x")])
        engines[0].has_plugin = True
        await engines[0].until(lambda: backend.states()[0].is_up)
        await answer(backend, Request(prompt="x"))

    run(scenario, has_plugin=False)
    assert "runs without the plug-in" in caplog.text


def test_a_file_that_cannot_be_loaded_fails_at_load(tmp_path: Path) -> None:
    good, bad = write_artefact(tmp_path, "good"), write_artefact(tmp_path, "bad", seed=1)

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        engines[0].lost.add(compiled_name(file_sha256(bad)))
        with pytest.raises(BackendFailed, match="the engine failed the request"):
            await backend.load(file_sha256(bad), bad)
        with pytest.raises(NotFound):
            await backend.submit([Request(prompt="x", prefix=file_sha256(bad))])
        sha256 = await load(backend, good)
        engines[0].lost.add(compiled_name(sha256))  # lost later: that request fails, alone
        with pytest.raises(BackendFailed):
            await answer(backend, Request(prompt="x", prefix=sha256))
        assert text((await answer(backend, Request(prompt="x")))[0])
        backend.check()

    run(scenario)


def test_a_load_while_all_is_full_is_no_lack_of_room(tmp_path: Path) -> None:
    """Overloaded would have every idle version unloaded."""
    path = write_artefact(tmp_path, "triage")

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        engines[0].hangs = "middle"
        stream = await backend.submit([Request(prompt="x")])
        sha256 = await load(backend, path)
        assert len(engines[0].bodies) == 1
        engines[0].hangs = ""
        await stream.aclose()
        assert text((await answer(backend, Request(prompt="x", prefix=sha256)))[0]) == "w0 w1 w2 "

    run(scenario, 1, {"max_inflight": 1})


def test_what_cannot_be_served_is_refused_before_it_is_compiled(tmp_path: Path) -> None:
    path, other = write_artefact(tmp_path, "triage"), write_artefact(tmp_path, "other", base=tiny_other())

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        with pytest.raises(ArtefactCorrupt, match="its version says ffff"):
            await backend.load("f" * 64, path)
        with pytest.raises(IncompatibleModel, match="trained for another base"):
            await load(backend, other)
        source: FakeSource = backend.compiled  # type: ignore[assignment]
        assert not source.asked
        source.num_positions = 3
        with pytest.raises(ArtefactCorrupt, match="has 3 positions"):
            await load(backend, path)
        assert not engines[0].bodies

    run(scenario)


def tiny_other() -> Any:
    return tiny("llama", vocab_size=512, tokenizer=demo_base().tokenizer)


def test_unload_forgets(tmp_path: Path) -> None:
    path = write_artefact(tmp_path, "triage")

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        sha256 = await load(backend, path)
        await backend.unload(sha256)
        with pytest.raises(NotFound):
            await backend.submit([Request(prompt="x", prefix=sha256)])

    run(scenario)


@pytest.mark.parametrize(
    ("status", "told", "kind", "message"),
    [
        (400, {"param": "logprobs", "message": "SECRET 77"}, BadRequest, "the engine refuses logprobs"),
        (400, {"param": "prompt", "message": "SECRET 77"}, BadRequest, "the engine refuses this request"),
        (401, {}, BackendFailed, "does not take the gateway's key"),
        (404, {}, BackendFailed, "does not know what it was asked for"),
        (500, {"message": "SECRET 77"}, BackendFailed, "the engine failed the request"),
        (501, {}, BackendFailed, "the engine failed the request"),
    ],
)
def test_refusals_are_told_without_vllms_words(
    status: int, told: dict[str, Any], kind: type[Exception], message: str
) -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        engines[0].statuses, engines[0].refusal = [status], told
        with pytest.raises(kind, match=message) as caught:
            await backend.submit([Request(prompt="x")])
        assert "SECRET" not in str(caught.value) and engines[0].url not in str(caught.value)

    run(scenario)


def test_one_task_stays_on_one_replica_and_tasks_spread(tmp_path: Path) -> None:
    paths = [write_artefact(tmp_path, "triage", seed=seed) for seed in range(12)]

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        for path in paths:
            sha256 = await load(backend, path)
            for _ in range(3):
                await answer(backend, Request(prompt="x", prefix=sha256))
        homes: dict[str, set[str]] = {}
        for engine in engines:
            for body in engine.bodies:
                homes.setdefault(body["kv_transfer_params"]["foreword"]["sha256"], set()).add(engine.url)
        assert len(homes) == 12 and all(len(urls) == 1 for urls in homes.values())
        assert len(set.union(*homes.values())) > 1  # all twelve on one of three: 6 in a million, by the ports

    run(scenario, 3)


def test_a_killed_replica_loses_what_it_streams_and_nothing_else(tmp_path: Path) -> None:
    path = write_artefact(tmp_path, "triage")

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        sha256 = await load(backend, path)
        home = next(engine for engine in engines if engine.bodies)
        home.hangs = "middle"
        stream = await backend.submit([Request(prompt="x", prefix=sha256)])
        chunks = aiter(stream)
        assert (await anext(chunks)).text == "w0 "
        await home.stop()
        with pytest.raises(BackendFailed, match="in the middle of the answer"):
            await anext(chunks)
        for _ in range(5):  # the other one answers, before and after probes have noticed
            assert text((await answer(backend, Request(prompt="x", prefix=sha256)))[0]) == "w0 w1 w2 "
        home.hangs = ""
        await home.start(int(home.url.rpartition(":")[2]))
        asked = len(home.bodies)
        async with asyncio.timeout(10):
            while len(home.bodies) == asked:
                await answer(backend, Request(prompt="x", prefix=sha256))
        assert not backend.pool.attempts

    run(scenario, 2)


def test_a_hung_replica_is_found_and_passed_over() -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        hung = engines[0]
        hung.hangs, hung.health = "head", "hang"
        answers = await asyncio.gather(*(answer(backend, Request(prompt="x")) for _ in range(8)))
        assert all(text(found[0]) == "w0 w1 w2 " for found in answers)
        await engines[1].until(lambda: not backend.states()[0].is_up)
        backend.check()

    run(scenario, 2, {"timeouts": Timeouts(probe_s=0.1)})


def test_all_dead_is_told_and_recovers() -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        backend.check()
        port = int(engines[0].url.rpartition(":")[2])
        await engines[0].stop()
        with pytest.raises(BackendFailed) as caught:
            await answer(backend, Request(prompt="x"))
        assert engines[0].url not in str(caught.value)
        while backend.states()[0].is_up:
            await asyncio.sleep(0.01)
        for call in (backend.check, backend.stats):
            with pytest.raises(BackendFailed, match="1 are down"):
                call()
        await engines[0].start(port)
        await engines[0].until(lambda: backend.states()[0].is_up)
        assert text((await answer(backend, Request(prompt="x")))[0]) == "w0 w1 w2 "

    run(scenario)


def test_back_pressure_has_numbers_and_a_time() -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        for engine in engines:
            engine.hangs = "middle"
        streams = [await backend.submit([Request(prompt="x")]) for _ in range(4)]
        with pytest.raises(Overloaded, match="4 requests are in flight, 2 replicas take 2 each") as caught:
            await backend.submit([Request(prompt="x")])
        assert caught.value.retry_after_s > 0
        with pytest.raises(Overloaded):
            await backend.submit([Request(prompt="x")] * 5)
        stats = backend.stats()
        assert stats.num_running + stats.num_waiting == 4
        await streams.pop().aclose()
        streams.append(await backend.submit([Request(prompt="x")]))
        for stream in streams:
            await stream.aclose()
        assert backend.stats().num_running == 0

    run(scenario, 2, {"max_inflight": 2})


def test_all_of_several_prompts_or_none() -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        engines[0].hangs = "middle"
        with pytest.raises(Overloaded):
            await backend.submit([Request(prompt="x")] * 3)
        await engines[0].until(lambda: engines[0].num_running == 0)
        assert not backend.pool.attempts

    run(scenario, 1, {"max_inflight": 2})


def test_a_reader_that_leaves_ends_the_engines_work() -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        engines[0].hangs = "middle"
        stream = await backend.submit([Request(prompt="x"), Request(prompt="y")])
        async for _ in stream:
            break
        await stream.aclose()
        await engines[0].until(lambda: engines[0].num_aborted == 2)

    run(scenario)


def test_draining_replicas_end_what_they_have() -> None:
    draining: set[str] = set()

    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        for engine in engines:
            engine.delay_s = 0.02
        streams = [await backend.submit([Request(prompt="x")]) for _ in range(12)]
        draining.add(engines[0].url)
        for _ in range(12):
            streams.append(await backend.submit([Request(prompt="x")]))
        for stream in streams:
            assert text([chunk async for chunk in stream]) == "w0 w1 w2 "
        assert len(engines[0].bodies) + len(engines[1].bodies) == 24 and len(engines[1].bodies) >= 12
        assert [state.is_draining for state in backend.states()] == [True, False]

    run(scenario, 2, {"draining": lambda: draining})


def test_closing_ends_what_is_in_flight() -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        engines[0].hangs = "middle"
        stream = await backend.submit([Request(prompt="x")])
        await backend.aclose()
        with pytest.raises(BackendFailed):
            async for _ in stream:
                pass

    run(scenario)


def test_many_streams_at_once() -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        found = await asyncio.gather(*(answer(backend, Request(prompt=f"x{n}")) for n in range(200)))
        assert all(text(chunks[0]) == "w0 w1 w2 " for chunks in found)

    run(scenario, 3)


def test_tokens_are_told_in_bytes() -> None:
    async def scenario(backend: VLLMBackend, engines: Sequence[StubVLLM]) -> None:
        tokenizer = demo_base().tokenizer
        pieces = tokenizer("hello you", add_special_tokens=False).input_ids
        assert b"".join(map(backend.token_bytes, pieces)) == b"hello you"

    run(scenario)


def test_placeholders_are_ids_that_no_answer_holds() -> None:
    class Has:
        def __init__(self, **ids: int | None) -> None:
            self.__dict__.update(ids)

    assert placeholder_id(Has(bos_token_id=1, pad_token_id=0), {2}) == 1
    assert placeholder_id(Has(bos_token_id=2, pad_token_id=3), {2}) == 3
    assert placeholder_id(Has(bos_token_id=None, pad_token_id=2), {2}) == 0
    assert placeholder_id(Has(), {2}) == 0


def test_bases_that_drop_a_first_space() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(decoder: Any) -> Any:
        vocab = {"\u2581a": 0, "a": 1, "\u2581": 2, "<unk>": 3}
        tokenizer = Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoder
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    parts = [decoders.Replace("\u2581", " "), decoders.Fuse()]
    assert drops_space(make(decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])))
    assert not drops_space(make(decoders.Sequence(parts)))
    assert not drops_space(demo_base().tokenizer)
