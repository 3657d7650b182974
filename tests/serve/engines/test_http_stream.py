"""From bytes on the wire to chunks, and what is done when a replica fails on the way."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.engine.request import Chunk
from foreword.errors import BackendFailed, BadRequest, ForewordError, Overloaded
from foreword.serve.backend import Timings
from foreword.serve.engines import http_events as http_events_module
from foreword.serve.engines import replicas as replicas_module
from foreword.serve.engines.http_events import Post, Reader
from foreword.serve.engines.http_stream import HttpClient, HttpStream
from foreword.serve.engines.replicas import Pool, Timeouts
from tests.serve.stub_vllm import END, StubVLLM, event, stubs

BODY: dict[str, Any] = {
    "prompt": [1, 2, 3],
    "max_tokens": 16,
    "n": 1,
    "stop_token_ids": [END],
    "stream": True,
    "return_tokens_as_token_ids": True,
}


def post(**changes: Any) -> Post:
    fields = {name: changes.pop(name) for name in list(changes) if name in ("prompt", "max_tokens", "logprobs")}
    body = BODY | {"n": changes.get("n", 1)} | fields
    given = {"path": "/v1/completions", "body": json.dumps(body).encode(), "key": "key", "stop_ids": frozenset({END})}
    return Post(**(given | {"num_prompt_tokens": len(body["prompt"])} | changes))


def read(pieces: Sequence[bytes], **changes: Any) -> tuple[list[Chunk], bool]:
    reader = Reader(post(**changes), Timings())
    found = [chunk for data in pieces for event in reader.events(data) for chunk in reader.chunks(event)]
    return found, reader.is_done


def choice(text: str, ids: Sequence[int] = (), finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "token_ids": list(ids), "finish_reason": finish, **more}]}


STREAM = b"".join(
    [
        b": keep-alive\n\n",
        event(choice("hé", [5], prompt_token_ids=[1, 2, 3])),
        b"event: message\r\ndata:" + json.dumps(choice(" you", [6, 7])).encode() + b"\r\n\r\n",
        event(choice("", [END], "stop", stop_reason=END)),
        event({"choices": [], "usage": {"prompt_tokens": 3}}),
        b"data: [DONE]\n\n",
    ]
)
CHUNKS = [
    Chunk(index=0, text="hé", token_ids=(5,)),
    Chunk(index=0, text=" you", token_ids=(6, 7)),
    Chunk(index=0, text="", finish_reason="stop"),
]


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_chunks_do_not_depend_on_how_bytes_arrive(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[start:end] for start, end in itertools.pairwise(places)]
    assert read(pieces) == (CHUNKS, True)


def test_only_an_end_token_is_cut_off() -> None:
    for data, ids in (
        (choice("", [END], "stop", stop_reason=None), ()),  # vLLM's own end of sequence
        (choice("x", [5, END], "stop", stop_reason="stop text"), (5, END)),
        (choice("x", [5], "stop", stop_reason="stop text"), (5,)),
        (choice("x", [END], "length"), (END,)),
    ):
        chunks, _ = read([event(data)])
        assert [chunk.token_ids for chunk in chunks] == [ids]
    chunks, _ = read([event(choice("", [END], "stop", stop_reason=END))], stop_ids=frozenset())
    assert chunks[0].token_ids == (END,)  # ignore_eos


def test_an_answer_is_whole_when_every_choice_has_ended() -> None:
    first, second = choice("a", [5], "stop"), choice("b", [5], "length")
    second["choices"][0]["index"] = 1
    assert not read([event(first) + b"data: [DONE]\n\n"], n=2)[1]
    chunks, is_done = read([event(first) + event(second) + b"data: [DONE]\n\n"], n=2, first=4)
    assert is_done and [chunk.index for chunk in chunks] == [4, 5]
    assert not read([event(first)])[1]


def test_logprobs_of_a_completion() -> None:
    told = {
        "tokens": ["token_id:5", "token_id:6"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"token_id:5": -0.5, "token_id:9": -0.1, "token_id:8": -9999.0}, None],
        "text_offset": [0, 1],
    }
    (chunk,), _ = read([event(choice("ab", [5, 6], logprobs=told))], num_logprobs=1)
    first, second = chunk.logprobs
    assert (first.token_id, first.logprob, first.top) == (5, -0.5, {9: -0.1})
    assert (second.token_id, second.logprob, second.top) == (6, -9999.0, {})
    (chunk,), _ = read([event(choice("ab", [5, 6], logprobs=told))], num_logprobs=5)
    assert list(chunk.logprobs[0].top.items()) == [(9, -0.1), (5, -0.5)]
    (chunk,), _ = read([event(choice("ab", [5, 6], logprobs=told))])
    assert chunk.logprobs == ()
    ended = {"tokens": ["token_id:2"], "token_logprobs": [-0.1], "top_logprobs": [{}], "text_offset": [0]}
    (chunk,), _ = read([event(choice("", [END], "stop", logprobs=ended))], num_logprobs=0)
    assert (chunk.token_ids, chunk.logprobs) == ((), ())


def test_a_chat_of_foreword() -> None:
    entry = {"token": "token_id:5", "logprob": -0.5, "bytes": [1], "top_logprobs": []}
    entry["top_logprobs"] = [{"token": "token_id:5", "logprob": -0.5}, {"token": "token_id:6", "logprob": -2.0}]
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {
            "choices": [
                {
                    "index": 0,
                    "delta": {"content": "hi"},
                    "token_ids": [5],
                    "logprobs": {"content": [entry], "refusal": None},
                    "finish_reason": None,
                }
            ]
        },
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]},
    ]
    chunks, _ = read([event(data) for data in events], num_logprobs=2)
    assert [(chunk.text, chunk.token_ids, chunk.finish_reason) for chunk in chunks] == [
        ("hi", (5,), None),
        ("", (), "length"),
    ]
    assert chunks[0].logprobs[0].top == {5: -0.5, 6: -2.0}


def test_the_first_space_goes_where_the_base_drops_it() -> None:
    events = [event(choice("", [4])), event(choice(" a", [5])), event(choice(" b", [6], "length"))]
    assert "".join(chunk.text for chunk in read(events, drops_space=True)[0]) == "a b"
    assert "".join(chunk.text for chunk in read(events)[0]) == " a b"


@pytest.mark.parametrize(
    "data",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: 3\n\n",
        event({"choices": [{}]}),
        event({"choices": [{"index": 0}]}),
        event(choice("x", [5], "stop") | {"usage": {"nothing": 1}}),
        event({"choices": [{"index": 7, "text": "x", "finish_reason": "stop"}]}),
        event(choice("x", [5], logprobs={"tokens": ["x"]})),
    ],
)
def test_what_is_not_understood_fails_the_request(data: bytes) -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        stream = HttpStream(client, pool, [], explain)
        reader = Reader(post(num_logprobs=1, num_prompt_tokens=None), Timings())
        with pool.attempt("key") as attempt:
            for found in reader.events(data):
                stream._take(found, reader, attempt)

    with pytest.raises(BackendFailed, match="not understood"):
        run(scenario)


def test_an_endless_event_is_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_events_module, "MAX_EVENT_BYTES", 1000)
    with pytest.raises(BackendFailed, match="not understood"):
        read([b"data: " + b"x" * 500, b"x" * 600])


def test_an_engine_that_gives_up_fails_the_request() -> None:
    with pytest.raises(BackendFailed, match="ended the request"):
        read([event(choice("x", [5], "abort"))])


def explain(status: int, error: Mapping[str, Any]) -> ForewordError:
    return (BadRequest if status < 500 else BackendFailed)(f"explained {status} {error.get('param')}")


Scenario = Callable[[Pool, HttpClient, Sequence[StubVLLM]], Coroutine[Any, Any, None]]


def run(scenario: Scenario, count: int = 1, timeouts: Timeouts | None = None, **fields: Any) -> None:
    async def main() -> None:
        async with stubs(count, **fields) as engines:
            client = HttpClient()
            urls = [engine.url for engine in engines]
            pool = Pool(urls, client.probe, timeouts=timeouts, probe_every_s=0.02)
            try:
                async with asyncio.timeout(20):
                    await pool.start()
                    await scenario(pool, client, engines)
            finally:
                await pool.aclose()
                await client.aclose()
            leftover = asyncio.all_tasks() - {asyncio.current_task()}
            assert not [task for task in leftover if "http_stream" in repr(task)]

    asyncio.run(main())


async def gather(client: HttpClient, pool: Pool, *posts: Post) -> tuple[HttpStream, dict[int, str]]:
    stream = HttpStream(client, pool, posts, explain)
    await stream.start()
    texts: dict[int, str] = {}
    async for chunk in stream:
        texts[chunk.index] = texts.get(chunk.index, "") + chunk.text
    return stream, texts


def first_engine(pool: Pool, engines: Sequence[StubVLLM], key: str = "key") -> StubVLLM:
    url = pool.attempt(key).replica.url
    return next(engine for engine in engines if engine.url == url)


def test_a_stream_starts_with_its_first_token() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        engines[0].hangs = "token"
        stream = HttpStream(client, pool, [post()], explain)
        starting = asyncio.create_task(stream.start())
        await engines[0].until(lambda: engines[0].num_running == 1)
        _, pending = await asyncio.wait([starting], timeout=0.05)
        assert pending and pool.num_waiting == 1
        await engines[0].stop()
        with pytest.raises(BackendFailed, match=r"before the first token came|1 are down"):
            await starting

    run(scenario)


def test_several_prompts_and_choices_come_together() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        stream, texts = await gather(client, pool, post(n=2), post(first=2, prompt=[1] * 5, max_tokens=2))
        assert texts == {0: "w0 w1 w2 ", 1: "w0 w1 w2 ", 2: "w0 w1 "}
        assert stream.num_prompt_tokens == 8 and stream.num_cached_tokens == 1 + 2
        assert stream.timings.num_tokens == {0: 3, 1: 3, 2: 2} and stream.timings.num_completion_tokens == 8
        assert len(stream.timings.first_token_s()) == 3
        assert pool.num_waiting == 0

    run(scenario)


def test_bodies_are_kept_only_while_they_may_be_sent_again() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        large = post(prompt=[1] * 100_000)
        stream = HttpStream(client, pool, [large], explain)
        assert len(large.body) > 100_000
        await stream.start()
        assert large.body == b""
        await stream.aclose()

    run(scenario)


def test_prompt_tokens_that_only_the_engine_knows() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        stream, _ = await gather(client, pool, post(num_prompt_tokens=None, prompt=[1] * 9))
        assert stream.num_prompt_tokens == 9

    run(scenario)


def test_a_connection_is_used_again() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        for _ in range(5):
            await gather(client, pool, post())
            while pool.num_inflight:
                await asyncio.sleep(0)
        assert sum(map(len, client.session.connector._conns.values())) <= 2  # type: ignore[union-attr]  # its own, and the probes'

    run(scenario)


@pytest.mark.parametrize(
    "fault",
    [{"dies_after": -1}, {"dies_after": 0}, {"statuses": [502]}, {"statuses": [503]}, {"statuses": [504]}],
    ids=str,
)
def test_what_a_replica_loses_before_a_token_another_one_answers(fault: dict[str, Any]) -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        first = first_engine(pool, engines)
        for name, value in fault.items():
            setattr(first, name, copy.copy(value))
        _, texts = await gather(client, pool, post())
        assert texts == {0: "w0 w1 w2 "}
        assert sorted(len(engine.bodies) for engine in engines) == [1, 1]
        failures = {state.url: state.failures for state in pool.states()}
        assert failures[first.url] == (fault != {"statuses": [503]})
        assert sum(state.retries for state in pool.states()) == 1

    run(scenario, 2)


def test_a_killed_replica_is_passed_over() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        await first_engine(pool, engines).stop()
        assert (await gather(client, pool, post()))[1] == {0: "w0 w1 w2 "}

    run(scenario, 2)


def test_after_a_token_nothing_is_asked_again() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        first_engine(pool, engines).dies_after = 2
        stream = HttpStream(client, pool, [post()], explain)
        await stream.start()
        texts = []
        with pytest.raises(BackendFailed, match="in the middle of the answer"):
            async for chunk in stream:
                texts.append(chunk.text)
        assert texts == ["w0 ", "w1 "] and sum(len(engine.bodies) for engine in engines) == 1

    run(scenario, 2)


def test_an_answer_without_an_end_is_not_whole() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        engines[0].has_end = False
        with pytest.raises(BackendFailed, match="in the middle"):
            await gather(client, pool, post())

    run(scenario)


def test_tries_are_bounded() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        for engine in engines:
            engine.dies_after = -1
        with pytest.raises(BackendFailed, match="3 engines were lost"):
            await gather(client, pool, post())
        assert sum(len(engine.bodies) for engine in engines) == 3

    run(scenario, 5)


def test_a_single_replica_is_asked_again() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        engines[0].statuses = [502, 502]
        assert (await gather(client, pool, post()))[1] == {0: "w0 w1 w2 "}

    run(scenario)


def test_full_replicas_say_when_to_come_back() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        for engine in engines:
            engine.statuses = [503] * 3
        with pytest.raises(Overloaded) as caught:
            await gather(client, pool, post())
        assert caught.value.retry_after_s == 7
        assert all(state.breaker == "closed" and state.failures == 0 for state in pool.states())

    run(scenario, 2)


@pytest.mark.parametrize("status", [400, 404, 422, 500, 501])
def test_a_refusal_is_explained_and_not_tried_elsewhere(status: int) -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        for engine in engines:
            engine.statuses, engine.refusal = [status], {"param": "logprobs"}
        with pytest.raises(ForewordError, match=f"explained {status} logprobs"):
            await gather(client, pool, post())
        assert sum(len(engine.bodies) for engine in engines) == 1

    run(scenario, 2)


def test_a_request_that_the_engine_fails_is_not_tried_elsewhere() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        first_engine(pool, engines).fails_after = 0
        with pytest.raises(BackendFailed, match="explained 500"):  # at the start: it has a status still
            await HttpStream(client, pool, [post()], explain).start()
        assert sum(len(engine.bodies) for engine in engines) == 1
        assert all(state.failures == 0 for state in pool.states())

    run(scenario, 2)


def test_an_engine_that_fails_and_is_not_well_is_passed_over() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        first = first_engine(pool, engines)
        first.fails_after, first.health = 0, "bad"
        assert (await gather(client, pool, post()))[1] == {0: "w0 w1 w2 "}

    run(scenario, 2)


def test_one_fault_ends_the_whole_stream() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        engine = engines[0]
        engine.statuses, engine.hangs = [400], "token"
        with pytest.raises(BadRequest):
            await gather(client, pool, *(post(first=place) for place in range(4)))
        await engine.until(lambda: engine.num_running == 0)
        assert pool.num_inflight == 0

    run(scenario)


@pytest.mark.parametrize("hangs", ["head", "token"])
def test_a_replica_that_hangs_is_passed_over_in_time(hangs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "WATCH_S", 0.01)

    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        first = first_engine(pool, engines)
        first.hangs = hangs
        assert (await gather(client, pool, post()))[1] == {0: "w0 w1 w2 "}
        assert [state.failures for state in pool.states() if state.url == first.url] == [1]

    run(scenario, 2, Timeouts(head_s=0.5, first_token_s=0.5))


def test_a_replica_that_hangs_with_its_health_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        first = first_engine(pool, engines)
        first.hangs, first.health = "token", "hang"
        assert (await gather(client, pool, post()))[1] == {0: "w0 w1 w2 "}
        assert [state.is_up for state in pool.states() if state.url == first.url] == [False]

    run(scenario, 2, Timeouts(probe_s=0.3))


def test_a_stream_that_stands_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "WATCH_S", 0.01)

    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        engines[0].hangs = "middle"
        with pytest.raises(BackendFailed, match="in the middle"):
            await gather(client, pool, post())
        await engines[0].until(lambda: engines[0].num_aborted == 1)

    run(scenario, 1, Timeouts(token_s=0.1))


def test_a_server_that_reads_nothing_holds_up_no_cancellation() -> None:
    """A body larger than all buffers, to a port that accepts and does not read."""

    async def main() -> None:
        over = asyncio.Event()

        async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await over.wait()
            writer.transport.abort()

        async with stubs(1) as engines:
            client = HttpClient()
            pool = Pool([engines[0].url], client.probe, timeouts=Timeouts(head_s=60))
            await pool.start()
            server = await asyncio.start_server(ignore, "127.0.0.1", 0, limit=1)
            pool.replicas[0].url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            stream = HttpStream(client, pool, [post(prompt=[1] * 8_000_000)], explain)
            starting = asyncio.create_task(stream.start())
            while not pool.num_inflight:
                await asyncio.sleep(0.01)
            starting.cancel()
            async with asyncio.timeout(5):
                with pytest.raises(asyncio.CancelledError):
                    await starting
                assert pool.num_inflight == 0
                await pool.aclose()
                await client.aclose()
                over.set()
                server.close()
                await server.wait_closed()

    asyncio.run(main())


@pytest.mark.parametrize("when", ["start", "reading", "aclose"])
def test_going_away_reaches_the_engine(when: str) -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        engine = engines[0]
        engine.hangs = "head" if when == "start" else "middle"
        stream = HttpStream(client, pool, [post()], explain)
        if when == "start":
            task = asyncio.create_task(stream.start())
            await engine.until(lambda: engine.bodies)
            task.cancel()
            await asyncio.wait([task])
        else:
            await stream.start()
            iterator = aiter(stream)
            assert (await anext(iterator)).text == "w0 "
            if when == "reading":
                task = asyncio.create_task(anext(iterator))  # type: ignore[arg-type]
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            await stream.aclose()
            await engine.until(lambda: engine.num_aborted == 1)
        assert pool.num_inflight == 0
        await stream.aclose()

    run(scenario)


def test_what_came_before_a_fault_is_read_first() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        engines[0].dies_after = 2
        stream = HttpStream(client, pool, [post()], explain)
        await stream.start()
        while pool.num_inflight:  # all has happened before anything is read
            await asyncio.sleep(0)
        iterator = aiter(stream)
        assert [(await anext(iterator)).text, (await anext(iterator)).text] == ["w0 ", "w1 "]
        with pytest.raises(BackendFailed):
            await anext(iterator)

    run(scenario)


def test_a_reader_that_is_slow_holds_up_no_replica() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        stream = HttpStream(client, pool, [post()], explain)
        await stream.start()
        await engines[0].until(lambda: engines[0].num_running == 0)
        while pool.num_inflight:
            await asyncio.sleep(0)
        assert [chunk.text async for chunk in stream] == ["w0 ", "w1 ", "w2 ", ""]
        assert len(stream.timings.first_token_s()) == 1

    run(scenario)


def test_facts_and_probes() -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        facts = pool.replicas[0].facts
        assert facts is not None and (facts.model, facts.max_model_len) == ("base", 512)
        asked = engines[0].num_calls["models"]
        await engines[0].until(lambda: engines[0].num_calls["health"] > 4)
        assert engines[0].num_calls["models"] == asked  # once is enough while it is up

    run(scenario)


def test_a_wrong_key_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(pool: Pool, client: HttpClient, engines: Sequence[StubVLLM]) -> None:
        with pytest.raises(BackendFailed, match="1 are down"):
            pool.check()
        good = HttpClient(key="secret")
        assert (await good.probe(pool.replicas[0])).model == "base"
        await good.aclose()

    run(scenario, key="secret")
    assert "is its key right?" in caplog.text and "secret" not in caplog.text
