"""The whole path: OpenAI's client, a real server, the registry, the embedded engine, the demo base."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, BadRequestError, ConflictError, InternalServerError, OpenAI

from foreword.core.artefact import load_artefact
from foreword.core.compile import compile
from foreword.core.model import load_base
from foreword.engine.engine import Engine
from foreword.engine.request import Output, Request
from foreword.registry.store import Registry
from foreword.serve.engines.embedded import EmbeddedBackend
from foreword.serve.engines.token_bytes import token_bytes
from foreword.serve.gateway import create_app
from tests.serve.artefacts import BASE, demo_base, write_artefact
from tests.serve.fakes import Served, served

TEXTS = (
    "Please cancel my Team plan from January.",
    "The file that the desktop app exports is broken.",
    "You billed us twice",
    "Where is order 29412? It should have come on Saturday, and nobody at the desk can tell me anything about it.",
)
METHODS = {"triage": "prompt", "clause": "prefix", "handbook": "kv"}


class Stage:
    """A server over the real parts, and an engine of its own to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry.open(folder / "home")
        self.engine = Engine(demo_base(), kv_memory="64MiB", max_batch=32, max_queue=64)
        self.alone = Engine(load_base(str(BASE), dtype="float32"), kv_memory="64MiB")
        self.running: Served
        self.openai: OpenAI

    def publish(self, task: str, method: Any, seed: int, **options: Any) -> str:
        """Publish an artefact, give it to the reference engine too, and return its name."""
        path = write_artefact(self.folder, task, method, seed=seed, **options)
        reference = self.registry.publish(path).reference
        self.alone.add_prefix(reference, compile(self.alone.base, load_artefact(path)))
        return reference

    def greedy(self, prefix: str | None, text: str, *, chat: bool = False, **fields: Any) -> Output:
        given: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        return self.alone.generate([Request(prefix=prefix, **given, **fields)])[0]

    def complete(self, model: str, text: str, **fields: Any) -> str:
        return self.openai.completions.create(model=model, prompt=text, **{"temperature": 0, **fields}).choices[0].text

    def version(self, model: str) -> str | None:
        raw = self.openai.completions.with_raw_response.create(model=model, prompt="x", max_tokens=1)
        return raw.headers.get("x-foreword-version")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    found = Stage(tmp_path_factory.mktemp("serve"))
    for seed, (task, method) in enumerate(METHODS.items()):
        found.publish(task, method, seed)
    found.engine.start()
    backend = EmbeddedBackend(found.engine)
    app = create_app(backend, found.registry, base_name="base-3m")
    with served(app, backend) as found.running:
        found.openai = OpenAI(base_url=f"{found.running.url}/v1", api_key="none", max_retries=0, timeout=60)
        with found.openai:
            yield found
    found.registry.close()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_models(stage: Stage) -> None:
    assert {"base-3m", "triage", "clause", "handbook"} <= {model.id for model in stage.openai.models.list()}
    assert stage.openai.models.retrieve("triage").id == "triage"


@pytest.mark.parametrize("task", [*METHODS, None])
def test_completions_equal_the_engines(stage: Stage, task: str | None) -> None:
    reference = f"{task}@1" if task else None
    for text in TEXTS:
        expected = stage.greedy(reference, text)
        found = stage.openai.completions.create(model=task or "base-3m", prompt=text, temperature=0)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (expected.text, expected.finish_reason)
        assert found.usage is not None
        assert found.usage.prompt_tokens == expected.num_prompt_tokens  # without the prefix's positions
        assert found.usage.completion_tokens == len(expected.token_ids)
    raw = stage.openai.completions.with_raw_response.create(model=task or "base-3m", prompt="x", max_tokens=1)
    assert raw.headers.get("x-foreword-version") == reference
    if task:
        assert raw.headers["x-foreword-digest"] == stage.registry.resolve(task).sha256


def test_chat_equals_the_engines(stage: Stage) -> None:
    for model, reference in (("triage", "triage@1"), ("base-3m", None)):
        expected = stage.greedy(reference, TEXTS[0], chat=True, max_tokens=10)
        messages: Any = [{"role": "user", "content": TEXTS[0]}]
        whole = stage.openai.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=10)
        assert whole.choices[0].message.content == expected.text
        chunks = list(
            stage.openai.chat.completions.create(
                model=model,
                messages=messages,
                temperature=0,
                max_completion_tokens=10,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
        assert chunks[-2].choices[0].finish_reason == expected.finish_reason
        assert chunks[-1].usage == whole.usage


def test_a_conversation_of_several_turns(stage: Stage) -> None:
    messages: Any = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": [{"type": "text", "text": TEXTS[1]}]},
    ]
    turns = [*messages[:2], {"role": "user", "content": TEXTS[1]}]
    expected = stage.alone.generate([Request(messages=turns, prefix="triage@1")])[0]
    found = stage.openai.chat.completions.create(model="triage", messages=messages, temperature=0)
    assert found.choices[0].message.content == expected.text


def test_token_ids_and_lists_of_prompts(stage: Stage) -> None:
    ids = demo_base().tokenizer("Once upon a time").input_ids
    expected = stage.alone.generate([Request(prompt_ids=ids, max_tokens=5)])[0].text
    assert stage.complete("base-3m", ids, max_tokens=5) == expected
    found = stage.openai.completions.create(model="triage", prompt=[*TEXTS], temperature=0)
    assert [choice.text for choice in found.choices] == [stage.greedy("triage@1", text).text for text in TEXTS]
    with pytest.raises(BadRequestError, match="the base's vocabulary has 4096"):
        stage.complete("base-3m", [1, 99999])


def test_stop_n_and_seed(stage: Stage) -> None:
    text = stage.complete("base-3m", "Once upon a time", max_tokens=20)
    middle = text[len(text) // 2 :][:3]
    assert stage.complete("base-3m", "Once upon a time", max_tokens=20, stop=[middle]) == text.partition(middle)[0]

    def drawn(seed: int) -> list[str]:
        found = stage.openai.completions.create(model="clause", prompt=TEXTS[0], n=4, seed=seed, max_tokens=8)
        return [choice.text for choice in found.choices]

    first = drawn(7)
    assert drawn(7) == first != drawn(8) and len(set(first)) > 1


def test_logprobs(stage: Stage) -> None:
    found = stage.openai.completions.create(
        model="triage", prompt=TEXTS[0], temperature=0, logprobs=3, max_tokens=5, extra_body={"ignore_eos": True}
    ).choices[0]
    told = found.logprobs
    assert told is not None and told.tokens is not None and told.token_logprobs is not None
    assert len(told.tokens) == 5 and told.text_offset == sorted(told.text_offset or [])
    assert told.top_logprobs is not None
    for token, value, best in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert value == max(best.values()) and best[token] == value
    chat = stage.openai.chat.completions.create(
        model="triage",
        messages=[{"role": "user", "content": TEXTS[0]}],
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        max_tokens=5,
    ).choices[0]
    assert chat.logprobs is not None and chat.logprobs.content
    text = b"".join(bytes(token.bytes or []) for token in chat.logprobs.content).decode(errors="replace")
    assert text.startswith(chat.message.content or "")
    assert all(len(token.top_logprobs) == 2 for token in chat.logprobs.content)


def test_token_bytes_join_to_the_text(stage: Stage) -> None:
    tokenizer = demo_base().tokenizer
    text = "naïve café, 12,345 – 日本 <x> \n\t end"
    ids = tokenizer(text).input_ids
    assert b"".join(token_bytes(tokenizer, token) for token in ids).decode() == text
    assert token_bytes(tokenizer, 2) == b"<|end|>" and token_bytes(tokenizer, 10**6) == b""


def test_choices(stage: Stage) -> None:
    choices = ["cancel", "bug", "billing"]
    for model in ("triage", "base-3m"):
        found = stage.complete(model, TEXTS[0], extra_body={"structured_outputs": {"choice": choices}})
        assert found in choices
    with pytest.raises(BadRequestError, match="stop"):
        stage.complete("triage", "x", stop="a", extra_body={"structured_outputs": {"choice": choices}})


def test_refusals_come_from_the_engine_too(stage: Stage) -> None:
    with pytest.raises(BadRequestError, match="the base takes 2048") as caught:
        stage.complete("triage", "word " * 100, max_tokens=2000)
    assert caught.value.response.headers["x-foreword-version"] == "triage@1"
    with pytest.raises(BadRequestError, match="'suffix' is not supported"):
        stage.complete("triage", "x", suffix="y")
    with pytest.raises(BadRequestError, match="best_of"):
        stage.complete("triage", "x", best_of=2)
    stage.publish("textual", "prompt", 50, chat=False)
    with pytest.raises(BadRequestError, match=r"this task has no chat template\. Use /v1/completions"):
        stage.openai.chat.completions.create(model="textual", messages=[{"role": "user", "content": "x"}])


def test_many_tasks_at_once_answer_as_each_alone(stage: Stage) -> None:
    kinds = [(task, f"{task}@1") for task in METHODS] + [("base-3m", None)]
    work = [(*kinds[i % 4], TEXTS[i // 4 % 4], 4 + 3 * (i % 5), i % 3) for i in range(24)]
    expected = [
        stage.greedy(prefix, text, chat=form == 2, max_tokens=count).text for _, prefix, text, count, form in work
    ]
    together = threading.Barrier(24)

    def ask(item: tuple[str, str | None, str, int, int]) -> str:
        model, _, text, count, form = item
        together.wait()
        if form == 0:
            return stage.complete(model, text, max_tokens=count)
        if form == 1:
            stream = stage.openai.completions.create(
                model=model, prompt=text, temperature=0, max_tokens=count, stream=True
            )
            return "".join(chunk.choices[0].text for chunk in stream)
        found = stage.openai.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=count
        )
        return found.choices[0].message.content or ""

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, work)) == expected


def test_loading_does_not_disturb_running_answers(stage: Stage) -> None:
    """Compiling a hidden-state prefix hooks into layers; requests that run meanwhile must not see it."""
    fields = {"max_tokens": 120, "ignore_eos": True}
    expected = stage.greedy(None, "Once upon a time", **fields).text
    references = [stage.publish("loading", "prefix", 10 + index, num_vectors=40) for index in range(6)]
    with ThreadPoolExecutor(4) as pool:
        running = [
            pool.submit(stage.complete, "base-3m", "Once upon a time", max_tokens=120, extra_body={"ignore_eos": True})
            for _ in range(3)
        ]
        for reference in references:
            assert stage.complete(reference, TEXTS[0]) == stage.greedy(reference, TEXTS[0]).text
        assert [found.result() for found in running] == [expected] * 3


def test_promotion_and_rollback_take_effect_without_a_restart(stage: Stage) -> None:
    first, second = stage.publish("moving", "prompt", 20), stage.publish("moving", "prompt", 21)
    stage.registry.promote(first)
    expected = {name: stage.greedy(name, TEXTS[0], max_tokens=30, ignore_eos=True).text for name in (first, second)}
    assert expected[first] != expected[second]
    seen: list[tuple[str, str]] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            raw = stage.openai.completions.with_raw_response.create(
                model="moving", prompt=TEXTS[0], temperature=0, max_tokens=30, extra_body={"ignore_eos": True}
            )
            seen.append((raw.headers["x-foreword-version"], raw.parse().choices[0].text))

    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(ask) for _ in range(3)]
        wait_for(lambda: len(seen) > 3)
        stage.registry.promote(second)
        time.sleep(1.0)
        assert stage.version("moving") == second
        wait_for(lambda: (second, expected[second]) in seen)
        stage.registry.rollback("moving")
        time.sleep(1.0)
        assert stage.version("moving") == first
        is_over.set()
        for asker in askers:
            asker.result()
    assert {version for version, _ in seen} == {first, second}
    assert all(text == expected[version] for version, text in seen)
    stage.registry.tag(second, "canary")
    assert stage.version("moving@canary") == second and stage.version(first) == first


def test_a_damaged_file_is_never_answered_without_it(stage: Stage) -> None:
    stage.publish("damaged", "prompt", 30)
    path = stage.registry.path(stage.registry.resolve("damaged"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\0\0\0\0")
    with pytest.raises(APIStatusError, match="has sha256") as caught:
        stage.complete("damaged", "x")
    assert caught.value.status_code == 422
    assert caught.value.response.headers["x-foreword-version"] == "damaged@1"
    path.unlink()
    time.sleep(1.1)
    with pytest.raises(InternalServerError, match="is gone"):
        stage.complete("damaged", "x")
    path.write_bytes(whole)
    time.sleep(1.1)
    assert stage.complete("damaged", TEXTS[0]) == stage.greedy("damaged@1", TEXTS[0]).text


def test_a_version_of_another_base_is_refused(stage: Stage) -> None:
    other = load_base(str(BASE), dtype="float32")
    other.model.get_input_embeddings().weight.data.mul_(2.0)
    stage.registry.publish(write_artefact(stage.folder, "foreign", base=other))
    with pytest.raises(ConflictError, match="trained for another base: weights_sha256"):
        stage.complete("foreign", "x")
    assert "foreign" not in {model.id for model in stage.openai.models.list()}


def test_a_file_that_changes_after_it_was_proved_is_refused(stage: Stage) -> None:
    backend = EmbeddedBackend(stage.engine)
    path = write_artefact(stage.folder, "changed", seed=40)
    with pytest.raises(Exception, match="its version says ffff"):
        asyncio.run(backend.load("f" * 64, path))


def test_a_client_that_leaves_frees_the_engine(stage: Stage) -> None:
    before = stage.engine.stats().rows_aborted
    stream = stage.openai.completions.create(
        model="triage", prompt="x", max_tokens=1500, stream=True, n=2, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: stage.engine.stats().running == 0)
    assert stage.engine.stats().rows_aborted == before + 2
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{stage.running.url}/v1/completions",
            json={"model": "triage", "prompt": "x", "max_tokens": 1500, "ignore_eos": True},
            timeout=0.5,
        )
    wait_for(lambda: stage.engine.stats().rows_aborted == before + 3)


def test_a_reader_that_does_not_read_holds_up_nobody(stage: Stage) -> None:
    body = '{"model": "base-3m", "prompt": "x", "n": 8, "max_tokens": 200, "stream": true, "ignore_eos": true}'
    host, _, port = stage.running.url.removeprefix("http://").partition(":")
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        raw.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        wait_for(lambda: stage.engine.stats().running == 8)
        assert stage.complete("triage", TEXTS[0]) == stage.greedy("triage@1", TEXTS[0]).text
        wait_for(lambda: stage.engine.stats().running == 0, 30)  # although nobody has read a byte


def test_a_full_queue_is_503(stage: Stage) -> None:
    fields: dict[str, Any] = {"max_tokens": 300, "extra_body": {"ignore_eos": True}}
    with pytest.raises(InternalServerError, match="the queue takes 64") as caught:
        stage.openai.completions.create(model="triage", prompt=["x"] * 120, **fields)
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) >= 1
    wait_for(lambda: stage.engine.stats().running == 0)  # all or none


def test_metrics_of_the_engine(stage: Stage) -> None:
    stage.complete("triage", TEXTS[0], max_tokens=4, extra_body={"ignore_eos": True})
    lines = httpx.get(f"{stage.running.url}/metrics").text.splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
    assert values["foreword_kv_blocks"] > values["foreword_free_kv_blocks"] > 0
    assert values["foreword_resident_prefixes"] == len(stage.engine.prefixes)
    assert values["foreword_resident_prefix_bytes"] == sum(p.num_bytes for p in stage.engine.prefixes.values())
    assert values['foreword_completion_tokens_total{task="triage",tenant="",version="1"}'] > 0
    for name in ("first_token", "token", "queue"):
        assert values[f'foreword_{name}_seconds_count{{task="triage"}}'] > 0
    assert values['foreword_queue_seconds_sum{task="triage"}'] >= 0
