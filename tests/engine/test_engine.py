"""The engine as its callers meet it: threads, tickets, limits, failures, prefixes that come and go."""

import logging
import threading

import pytest
import torch

from foreword.core.compile import compile
from foreword.core.prompt import SoftPrompt
from foreword.engine.engine import Engine
from foreword.engine.request import Request
from foreword.errors import BackendFailed, NotFound, Overloaded
from tests.engine.cases import engine_for, ids, mixed, prefixes, tokens
from tests.tiny import tiny

PATIENCE_S = 60


class Client:
    """Collects one request's chunks."""

    def __init__(self, n=1):
        self.chunks, self.left, self.done, self.threads = [], n, threading.Event(), set()

    def __call__(self, chunk):
        self.chunks.append(chunk)
        self.threads.add(threading.current_thread().name)
        if chunk.finish_reason:
            self.left -= 1
            if not self.left:
                self.done.set()

    def wait(self):
        assert self.done.wait(PATIENCE_S), "no end came"
        return self

    @property
    def tokens(self):
        return sum((chunk.token_ids for chunk in self.chunks), ())

    @property
    def reason(self):
        return self.chunks[-1].finish_reason


def endless(**fields):
    return Request(**{"prompt_ids": ids(5, 1), "max_tokens": 240, "ignore_eos": True, **fields})


def wait_until(condition):
    gate = threading.Event()
    for _ in range(PATIENCE_S * 200):
        if condition():
            return
        gate.wait(0.005)
    raise AssertionError("it did not come about")


def slow(engine, monkeypatch, seconds=0.01):
    """Make steps slow, so that tests can act in between."""
    decode = engine._loop.runner.decode

    def wait_and_decode(rows):
        threading.Event().wait(seconds)
        return decode(rows)

    monkeypatch.setattr(engine._loop.runner, "decode", wait_and_decode)


def all_free(engine):
    stats = engine.stats()
    return stats.blocks_free + stats.prefix_blocks == stats.blocks_total


def test_submitted_equals_generated():
    requests = mixed(ignore_eos=True)
    expected = tokens(engine_for("llama").generate(requests))
    with engine_for("llama") as engine:
        clients = [Client() for _ in requests]
        tickets = [engine.submit(request, client) for request, client in zip(requests, clients, strict=True)]
        assert [[client.wait().tokens] for client in clients] == expected
        assert tokens(engine.generate(requests)) == expected
        for request, ticket in zip(requests, tickets, strict=True):
            assert ticket.num_prompt_tokens == len(request.prompt_ids)
            positions = engine.prefixes[request.prefix].num_positions if request.prefix else 0
            assert ticket.num_prefix_positions == positions
    assert set.union(*(client.threads for client in clients)) == {"foreword-engine"}
    for client in clients:
        assert [chunk.finish_reason for chunk in client.chunks[:-1]] == [None] * (len(client.chunks) - 1)
        assert all(len(chunk.token_ids) == 1 for chunk in client.chunks[:-1])
        assert client.reason == "length"


def test_many_threads_submit_at_once():
    requests = mixed(ignore_eos=True)
    expected = tokens(engine_for("qwen3").generate(requests))
    found = {}
    with engine_for("qwen3", max_batch=5) as engine:

        def work(worker):
            if worker % 2:
                found[worker] = tokens(engine.generate(requests))
            else:
                clients = [Client() for _ in requests]
                for request, client in zip(requests, clients, strict=True):
                    engine.submit(request, client)
                found[worker] = [[client.wait().tokens] for client in clients]

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert [found.get(worker) for worker in range(4)] == [expected] * 4
        assert all_free(engine)


def test_two_threads_generate_without_a_loop_thread():
    requests = mixed(ignore_eos=True)
    engine = engine_for("llama", max_queue=3)
    expected = tokens(engine_for("llama").generate(requests))
    found = []
    threads = [threading.Thread(target=lambda: found.append(tokens(engine.generate(requests)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found == [expected, expected]


def test_generate_takes_more_requests_than_the_queue():
    engine = engine_for("llama", max_queue=2, max_batch=3)
    requests = mixed(ignore_eos=True)
    assert tokens(engine.generate(requests * 3)) == tokens(engine_for("llama").generate(requests)) * 3
    with engine:
        assert tokens(engine.generate(requests * 2)) == tokens(engine_for("llama").generate(requests)) * 2


def test_abort_frees_blocks(monkeypatch):
    engine = engine_for("llama", max_batch=2)
    slow(engine, monkeypatch)
    with engine:
        clients = [Client(2), Client(), Client()]
        tickets = [engine.submit(endless(n=client.left, prefix="kv"), client) for client in clients]
        wait_until(lambda: clients[0].chunks)
        for ticket, client in zip(tickets, clients, strict=True):
            engine.abort(ticket)
            client.wait()
            engine.abort(ticket)
        assert [client.reason for client in clients] == ["abort"] * 3
        assert sorted(chunk.index for chunk in clients[0].chunks if chunk.finish_reason) == [0, 1]
        wait_until(lambda: all_free(engine))
        assert engine.stats().rows_aborted == 4
        assert engine.generate([Request(prompt_ids=[5], max_tokens=2)])[0].finish_reason in ("length", "stop")


def test_abort_without_a_thread():
    engine = engine_for("llama")
    client = Client()
    ticket = engine.submit(endless(), client)
    engine._loop.step()
    engine.abort(ticket)
    assert client.reason == "abort"
    assert len(client.tokens) == 1
    assert all_free(engine)


def test_full_queue_says_so_with_a_time():
    engine = engine_for("llama", max_queue=3)
    for _ in range(3):
        engine.submit(endless(max_tokens=3), Client())
    with pytest.raises(Overloaded, match="3 completions wait and 2 more are asked for, the queue takes 3") as caught:
        engine.submit(endless(n=2), Client())
    assert 1 <= caught.value.retry_after_s <= 60
    assert engine.stats().waiting == 3
    engine.start()
    wait_until(lambda: not engine.stats().waiting)
    client = Client()
    engine.submit(endless(max_tokens=3), client)
    client.wait()
    engine.close()


def test_replaced_prefix_drains_while_new_requests_get_the_new_one():
    base = tiny("llama")
    old, new = (prefixes(base, seed=seed)["prompt"] for seed in (0, 1))
    expected = []
    for prefix in (old, new):
        engine = Engine(base, kv_memory="2MiB", block_size=4)
        engine.add_prefix("task", prefix)
        expected.append(engine.generate([endless(prefix="task", max_tokens=30)])[0].token_ids)
    assert expected[0] != expected[1]

    engine = Engine(base, kv_memory="2MiB", block_size=4, max_batch=2)
    engine.add_prefix("task", old)
    clients = [Client() for _ in range(4)]
    for client in clients[:3]:
        engine.submit(endless(prefix="task", max_tokens=30), client)
    for _ in range(5):
        engine._loop.step()  # two run, one waits
    engine.add_prefix("task", new)
    assert engine.prefixes["task"] is new
    engine.submit(endless(prefix="task", max_tokens=30), clients[3])
    while engine._loop.has_work:
        engine._loop.step()
    assert [client.tokens for client in clients] == [expected[0]] * 3 + [expected[1]]
    assert engine.stats().prefix_blocks == 2
    engine.remove_prefix("task")
    assert engine.stats().blocks_free == engine.stats().blocks_total
    with pytest.raises(NotFound):
        engine.submit(endless(prefix="task"), Client())


def test_changed_tensors_of_a_caller_do_not_matter_once_resident():
    base = tiny("llama")
    engine = engine_for(base)
    request = endless(prefix="kv", max_tokens=5)
    first = tokens(engine.generate([request]))
    for tensor in engine.prefixes["kv"].keys:
        tensor.zero_()
    assert tokens(engine.generate([request])) == first


def test_failing_rows_end_with_error_and_neighbours_go_on(monkeypatch, caplog):
    engine = engine_for("llama")
    requests = mixed(ignore_eos=True)
    expected = tokens(engine.generate(requests))
    run = engine.base.run

    def fail_on(**inputs):
        if (inputs["ids"] == 96).any():
            raise RuntimeError("a kernel failed")
        return run(**inputs)

    monkeypatch.setattr(engine.base, "run", fail_on)
    bad = Request(prompt_ids=[4, 96, 5], prefix="prompt", max_tokens=5)
    outputs = engine.generate([*requests[:4], bad, *requests[4:]])
    assert outputs[4].finish_reason == "error"
    assert tokens(outputs[:4] + outputs[5:]) == expected
    assert "a kernel failed" in caplog.text
    stats = engine.stats()
    assert (stats.rows_failed, stats.failed_steps) == (1, 1)
    assert all_free(engine)


def test_row_whose_text_fails_ends_alone(caplog):
    engine = engine_for("llama")
    clients = [Client(), Client()]
    tickets = [engine.submit(endless(max_tokens=4), client) for client in clients]

    class Broken:
        def push(self, ids):
            raise OSError("no text")

        flush = push

    tickets[0].rows[0].stream = Broken()
    while engine._loop.has_work:
        engine._loop.step()
    assert [client.reason for client in clients] == ["error", "length"]
    assert "the end of a text is lost" in caplog.text


def test_engine_that_always_fails_hangs_nobody(monkeypatch, caplog):
    engine = engine_for("llama")
    monkeypatch.setattr(engine.base, "run", lambda **inputs: 1 / 0)
    with caplog.at_level(logging.CRITICAL), engine:
        outputs = [engine.generate([request])[0] for request in mixed()[:4]]
    assert {output.finish_reason for output in outputs} == {"error"}
    assert "steps in a row have failed" in caplog.text


def test_close_ends_what_is_in_flight(monkeypatch):
    engine = engine_for("llama", max_batch=1)
    slow(engine, monkeypatch)
    clients = [Client(), Client()]
    engine.start()
    engine.start()
    for client in clients:
        engine.submit(endless(), client)
    wait_until(lambda: clients[0].chunks)
    engine.close()
    engine.close()
    assert [client.reason for client in clients] == ["abort", "abort"]
    with pytest.raises(BackendFailed, match="the engine is closed"):
        engine.submit(endless(), Client())
    with pytest.raises(BackendFailed, match="the engine is closed"):
        engine.generate([endless()])
    with pytest.raises(BackendFailed, match="the engine is closed"):
        engine.start()


def test_close_wakes_a_waiting_generate(monkeypatch):
    engine = engine_for("llama")
    slow(engine, monkeypatch)
    engine.start()
    errors = []

    def work():
        try:
            engine.generate([endless()])
        except BackendFailed as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: engine.stats().running)
    engine.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_interrupted_generate_leaves_nothing_behind(monkeypatch):
    engine = engine_for("llama")
    decode, count = engine._loop.runner.decode, []

    def interrupt(rows):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return decode(rows)

    monkeypatch.setattr(engine._loop.runner, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(mixed(ignore_eos=True))
    assert all_free(engine)
    assert not engine._loop.has_work
    assert tokens(engine.generate(mixed()))


def test_generate_from_on_chunk_is_refused():
    caught = []
    with engine_for("llama") as engine:

        def on_chunk(chunk):
            try:
                engine.generate([endless()])
            except RuntimeError as error:
                caught.append(error)

        engine.submit(endless(max_tokens=1), on_chunk)
        wait_until(lambda: caught)
    assert "generate cannot be called from on_chunk" in str(caught[0])


def test_prefixes_can_be_read_but_not_written():
    engine = engine_for("llama")
    assert set(engine.prefixes) == {"prompt", "prefix", "kv", "blocked"}
    with pytest.raises(TypeError):
        engine.prefixes["x"] = engine.prefixes["kv"]


def test_more_prefixes_than_the_pool_holds():
    base = tiny("gpt2")
    engine = Engine(base, kv_memory=40 * 16 * 3 * 2 * 64 * 4, block_size=16)
    kept = {}
    for index in range(30):
        generator = torch.Generator().manual_seed(index)
        prefix = compile(base, SoftPrompt(torch.randn(20, 64, generator=generator)))
        engine.add_prefix(str(index), kept.setdefault(str(index), prefix))
    requests = [Request(prompt_ids=ids(6, 2), prefix=name, max_tokens=4, ignore_eos=True) for name in kept]
    first = tokens(engine.generate(requests))
    assert tokens(engine.generate(requests[::-1]))[::-1] == first
    assert engine.stats().prefixes_known == 30
    assert 0 < engine.stats().prefixes_resident < 30


def test_empty_call():
    assert engine_for("llama").generate([]) == []
