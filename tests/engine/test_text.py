"""Text: streamed pieces join to the whole, stop strings span tokens, choices come out as they are written."""

import dataclasses
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.core.compile import compile
from foreword.core.forward import forward_rows
from foreword.core.prompt import SoftPrompt
from foreword.core.template import TaskTemplate, encode_plain, encode_target, render_chat
from foreword.engine.engine import Engine
from foreword.engine.request import Request
from foreword.engine.stream import TextStream, decode
from foreword.engine.trie import build_trie, forced_tokens, longest_answer
from foreword.errors import BadRequest
from tests.bundled import bundled

PROMPT = "The history of the"


@pytest.fixture(scope="module")
def engine():
    return Engine(bundled(), kv_memory="64MiB")


def one(engine, **options):
    return engine.generate([Request(**{"prompt": PROMPT, "max_tokens": 24, **options})])[0]


def streamed(engine, **options):
    """Submit and step by hand; return the chunks of the first completion."""
    chunks = []
    engine.submit(Request(**{"prompt": PROMPT, "max_tokens": 24, **options}), chunks.append)
    while engine._loop.has_work:
        engine._loop.step()
    return [chunk for chunk in chunks if chunk.index == 0]


pieces = st.one_of(
    st.integers(3, 4095).map(lambda i: [i]),
    st.text(max_size=6).map(lambda text: bundled().tokenizer(text).input_ids),
    st.sampled_from([[1], [2], [0]]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(pieces, max_size=12), st.integers(1, 5))
def test_pieces_join_to_the_whole(parts, step):
    tokenizer = bundled().tokenizer
    ids = [token for part in parts for token in part]
    stream = TextStream(tokenizer)
    out = [stream.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert "".join(out) + stream.flush() == decode(tokenizer, ids)
    assert not any(piece.endswith("\ufffd") for piece in out)


@settings(max_examples=200, deadline=None)
@given(st.text("ab c🙂é", max_size=30), st.lists(st.text("ab c🙂", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_behind_a_stop_string_comes_out(text, stops):
    tokenizer = bundled().tokenizer
    ids = tokenizer(text).input_ids
    stream = TextStream(tokenizer, stops)
    out = ""
    for token in ids:
        out += stream.push([token])
        if stream.is_stopped:
            break
    out += stream.flush()
    assert not any(stop in out for stop in stops)
    if stream.is_stopped:
        assert text.startswith(out)
        assert any(text[len(out) :].startswith(stop) for stop in stops)
    else:
        assert out == text


def test_streamed_text_equals_generated(engine):
    whole = one(engine)
    chunks = streamed(engine)
    assert "".join(chunk.text for chunk in chunks) == whole.text == decode(engine.base.tokenizer, whole.token_ids)
    assert sum((chunk.token_ids for chunk in chunks), ()) == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_stop_string_that_spans_tokens(engine):
    text = one(engine).text
    middle = len(text) // 2
    stop = text[middle : middle + 7]
    cut = text[: text.index(stop)]
    for output in (one(engine, stop=[stop]), one(engine, stop=["never there", stop])):
        assert (output.text, output.finish_reason) == (cut, "stop")
        assert len(output.token_ids) < 24
    chunks = streamed(engine, stop=[stop])
    assert "".join(chunk.text for chunk in chunks) == cut
    assert chunks[-1].finish_reason == "stop"


def test_start_of_a_stop_string_comes_out_in_the_end(engine):
    text = one(engine).text
    output = one(engine, stop=[text[-3:] + "never"])
    assert (output.text, output.finish_reason) == (text, "length")


def test_end_token_ends_and_is_not_part_of_the_answer(engine):
    base = engine.base
    first = one(engine).token_ids
    stopping = Engine(base, kv_memory="8MiB")
    stopping._loop.stop_ids = frozenset({first[5]})
    output = one(stopping)
    assert (output.token_ids, output.finish_reason) == (first[: first.index(first[5])], "stop")
    assert one(stopping, ignore_eos=True).token_ids == first


def test_texts_from_many_threads():
    """Prompts are encoded by the submitting threads while the loop's thread decodes answers."""
    texts = [f"{PROMPT} {'word ' * index}" for index in range(6)]
    requests = [Request(prompt=text, max_tokens=12, ignore_eos=True, stop=["zzz"]) for text in texts]
    with Engine(bundled(), kv_memory="64MiB") as engine:
        expected = engine.generate(requests)
        found = {}
        threads = [
            threading.Thread(target=lambda worker=worker: found.update({worker: engine.generate(requests)}))
            for worker in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [found.get(worker) for worker in range(4)] == [expected] * 4


CHOICES = ["red", "red wine", "Bordeaux", "white wine, dry", " red", "naïve café 🙂"]


@pytest.mark.parametrize("options", [{}, {"temperature": 5.0}], ids=["greedy", "hot"])
def test_choices_come_out_exactly(engine, options):
    requests = [
        Request(prompt=f"{PROMPT} {index}", choices=CHOICES, seed=index, n=1 + index % 2, **options)
        for index in range(24)
    ]
    outputs = engine.generate(requests)
    found = [completion for output in outputs for completion in output.completions]
    assert {completion.text for completion in found} <= set(CHOICES)
    assert {completion.finish_reason for completion in found} == {"stop"}
    for completion in found:
        row = encode_target(engine.base.tokenizer, completion.text, engine.base.stop_ids)
        assert [*completion.token_ids, row[-1]] == row
    if options:
        assert len({completion.text for completion in found}) == len(CHOICES)


def test_choices_follow_the_most_likely_branches(engine):
    """Greedy decoding by hand, over the logits of core's forward."""
    base = engine.base
    rows = [encode_target(base.tokenizer, choice, base.stop_ids) for choice in CHOICES]
    node = build_trie(CHOICES, rows)
    ids = encode_plain(base.tokenizer, PROMPT)
    while node.answer is None:
        if len(node.children) == 1:
            tokens, node = forced_tokens(node)
            ids += tokens
            continue
        logits = forward_rows(base, [ids], [None])[0, -1]
        best = max(node.children, key=lambda token: logits[token].item())
        node = node.children[best]
        ids.append(best)
    assert one(engine, choices=CHOICES, max_tokens=None).text == node.answer


def test_single_choice_needs_no_forward(engine):
    steps = engine.stats().steps
    output = one(engine, choices=["Bordeaux"], max_tokens=None, logprobs=1)
    assert (output.text, output.finish_reason) == ("Bordeaux", "stop")
    assert engine.stats().steps == steps
    assert [entry.logprob for entry in output.completions[0].logprobs] == [0.0] * len(output.token_ids)


def test_forced_tokens_run_as_one_span(engine):
    long = ["left " + "a long tail of words that are all forced", "right " + "another tail without any branching"]
    before = engine.stats().steps
    output = one(engine, choices=long, max_tokens=None, logprobs=2)
    assert output.text in long
    assert engine.stats().steps - before <= 3
    assert len(output.completions[0].logprobs) == len(output.token_ids)


def test_trie():
    root = build_trie(["a", "ab", "a"], [[1, 0], [1, 2, 0], [1, 0]])
    assert longest_answer(root) == 3
    tokens, node = forced_tokens(root)
    assert tokens == [1]
    assert sorted(node.children) == [0, 2]
    assert forced_tokens(node.children[0]) == ([], node.children[0])
    with pytest.raises(BadRequest, match="has the end token inside"):
        build_trie(["x"], [[1, 0, 2, 0]])


def test_prompts_are_rendered_as_documented(engine):
    base = engine.base
    tokenizer = base.tokenizer
    template = TaskTemplate("{soft:4}Say: {input}\n")
    chat = TaskTemplate("{soft:4}{input}", chat=True)
    vectors = base.embed(base.embedding.weight.new_zeros(4).long()) * 3
    for name, made in (("plain", template), ("chat", chat), ("bare", None)):
        block = made.block(tokenizer) if made else None
        engine.add_prefix(name, dataclasses.replace(compile(base, SoftPrompt(vectors, block)), template=made))
    turns = [{"role": "user", "content": "Hello"}]
    expected = {
        ("prompt", None): encode_plain(tokenizer, "Hello"),
        ("prompt", "plain"): template.render(tokenizer, "Hello").ids,
        ("prompt", "chat"): chat.render(tokenizer, "Hello").ids,
        ("prompt", "bare"): tokenizer("Hello").input_ids,
        ("messages", None): encode_plain(tokenizer, render_chat(tokenizer, turns)),
        ("messages", "chat"): chat.render_messages(tokenizer, turns).ids,
    }
    for (field, prefix), ids in expected.items():
        given = {field: turns if field == "messages" else "Hello"}
        answer = engine.generate([Request(prefix=prefix, max_tokens=6, **given)])[0]
        same = engine.generate([Request(prefix=prefix, max_tokens=6, prompt_ids=ids)])[0]
        assert answer == same
        assert answer.num_prompt_tokens == len(ids)
        assert answer.num_prefix_positions == (engine.prefixes[prefix].num_positions if prefix else 0)
    with pytest.raises(BadRequest, match="this task has no chat template"):
        engine.generate([Request(messages=turns, prefix="plain")])


@pytest.mark.parametrize("chunk_tokens", [512, 3, 1])
def test_soft_slots_behind_the_text(chunk_tokens):
    """Slots among and behind the prompt's tokens take the embeddings path, however the prompt is cut."""
    base = bundled()
    template = TaskTemplate("{soft:3}Sort: {input}{soft:2} now{soft:4}")
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(9, base.spec.embed_size, generator=generator) * 0.3
    prefix = compile(base, SoftPrompt(vectors[:3], template.block(base.tokenizer), vectors[3:]))
    prefix = dataclasses.replace(prefix, template=template)
    engine = Engine(base, kv_memory="16MiB", block_size=4, chunk_tokens=chunk_tokens)
    engine.add_prefix("task", prefix)
    requests = [
        Request(prompt=text, prefix="task", max_tokens=8, ignore_eos=True) for text in ("a b", "some longer text")
    ]
    requests.append(Request(prompt="plain text", max_tokens=8, ignore_eos=True))
    requests.append(Request(prompt="a b", prefix="task", max_tokens=8, ignore_eos=True, n=2, repetition_penalty=1.3))
    outputs = engine.generate(requests)
    for request, output in zip(requests[:2], outputs[:2], strict=True):
        rendered = template.render(base.tokenizer, request.prompt)
        splices = [(0, offset, prefix.after[row : row + count]) for offset, row, count in rendered.slots]
        ids = [*rendered.ids, *output.token_ids]
        with torch.no_grad():
            logits = forward_rows(base, [ids], [prefix], splices=splices)[0]
        assert logits[len(rendered.ids) - 1 : -1].argmax(-1).tolist() == list(output.token_ids)
    assert outputs[3].completions[0] == outputs[3].completions[1]
    with pytest.raises(BadRequest, match="has 6 soft slots behind the text"):
        engine.generate([Request(prompt_ids=[5], prefix="task")])
