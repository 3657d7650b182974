"""Rows as tokens: several answers of a conversation, rows up to the base's window, one huge row beside small ones."""

import json
from types import SimpleNamespace

import pytest

from foreword.config import TaskConfig
from foreword.core.artefact import load_artefact
from foreword.errors import ConfigError, DataError
from foreword.eval.tasks import Task
from foreword.train.data import encode_rows
from foreword.train.loop import fit
from foreword.train.loss import MICRO_TOKENS, micro_batches
from foreword.train.run import Run
from foreword.train.state import RunState
from tests.bundled import bundled, write_task
from tests.eval.fakes import END, CharTokenizer, write_rows

TALK = [
    "system: be brief",
    "user: hi",
    "assistant: yes?",
    "user: bye",
    "assistant: so long",
    "user: now",
    "assistant: ciao",
]


def turns(*texts, **weights):
    """Messages of texts such as "user: hi"; `a2=0` gives message 2 the weight 0."""
    made = [dict(zip(("role", "content"), text.split(": ", 1), strict=True)) for text in texts]
    for name, weight in weights.items():
        made[int(name[1:])]["weight"] = weight
    return {"messages": made}


def task_of(folder, record, **config):
    path = write_rows(folder / "rows.jsonl", record if isinstance(record, list) else [record])
    return Task(TaskConfig(**{"name": "t", "train": str(path), "chat": True, "learn": "all", **config}))


def encode(base, task):
    return encode_rows(base, task, task.template, task.rows("train"))


def learned(base, example):
    tokenizer = base.tokenizer
    return [tokenizer.decode(example.ids[first:end]) for first, end in example.spans]


def test_all_answers_are_learned_with_their_end(tmp_path):
    base = bundled()
    (example,) = encode(base, task_of(tmp_path, turns(*TALK)))
    assert learned(base, example) == ["yes?<|end|>", "so long<|end|>", "ciao<|end|>"]
    assert example.num_targets == example.spans[-1][1] - example.spans[-1][0]
    (last,) = encode(base, task_of(tmp_path, turns(*TALK), learn="last"))
    assert last.ids == example.ids and last.spans == () and last.learned == example.learned[-len(last.learned) :]


@pytest.mark.parametrize("template", ["{soft:4}{input}", "{soft:2}Say {input}!{soft:2}", "Hard: {soft:3}{input}"])
@pytest.mark.parametrize("system", [None, "{soft:2} be kind"])
def test_each_answer_stands_behind_what_serving_renders_for_it(tmp_path, template, system):
    base = bundled()
    record = turns(*TALK[1:])
    task = task_of(tmp_path, record, template=template, system=system)
    (example,) = encode(base, task)
    for (first, end), place in zip(example.spans, (1, 3, 5), strict=True):
        served = task.template.render_messages(base.tokenizer, record["messages"][:place])
        assert example.ids[:first] == served.ids
        assert served.slots == example.slots
        (alone,) = encode(base, task_of(tmp_path, {"messages": record["messages"][: place + 1]}, **_form(task)))
        assert example.ids[first:end] == alone.ids[len(alone.ids) - alone.num_targets :]


def _form(task):
    return {"template": task.config.template, "system": task.config.system}


def test_answers_of_weight_0_and_greetings_before_a_user_are_not_learned(tmp_path):
    base = bundled()
    (example,) = encode(base, task_of(tmp_path, turns(*TALK, a2=0, a4=1)))
    assert learned(base, example) == ["so long<|end|>", "ciao<|end|>"]
    (example,) = encode(base, task_of(tmp_path, turns("system: s", "assistant: welcome", *TALK[1:])))
    assert learned(base, example) == ["yes?<|end|>", "so long<|end|>", "ciao<|end|>"]
    (example,) = encode(base, task_of(tmp_path, turns(*TALK, a2=0, a4=0)))
    assert example.spans == ()
    with pytest.raises(DataError, match=r"row 1: messages\[6\]\.weight is 0"):
        encode(base, task_of(tmp_path, turns(*TALK, a6=0)))
    with pytest.raises(DataError, match=r"row 1: messages\[4\]\.weight is 0\.5"):
        encode(base, task_of(tmp_path, turns(*TALK, a4=0.5)))


class Rewriter(CharTokenizer):
    """Writes two letters of earlier answers, as templates do that drop what was thought."""

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=False):
        last = len(messages) if not add_generation_prompt else len(messages) - 1
        kept = [
            {**turn, "content": turn["content"][:2]} if turn["role"] == "assistant" and place < last else turn
            for place, turn in enumerate(messages)
        ]
        return super().apply_chat_template(kept, tokenize, add_generation_prompt)


def fake(tokenizer=None, window=None):
    spec = SimpleNamespace(max_positions=window)
    return SimpleNamespace(tokenizer=tokenizer or CharTokenizer(), stop_ids=frozenset({END}), spec=spec)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_first_place(tmp_path):
    task = task_of(tmp_path, turns("user: hi", "assistant: yes?", "user: bye", "assistant: ciao"))
    assert len(encode(fake(), task)[0].spans) == 2
    with pytest.raises(DataError) as error:
        encode(fake(Rewriter()), task)
    first = len("user>hi" + "_" + "<assistant>" + "ye")  # "<" is in the block, "_" stands for the end
    assert "row 1: the answer messages[1] stands otherwise in the whole conversation" in error.value.message
    assert f"token {first} behind the block is '\\x03' there, 's' here" in error.value.message
    assert 'set learn = "last"' in error.value.hint
    assert encode(fake(Rewriter()), task_of(tmp_path, turns("user: hi", "assistant: yes?"))) is not None


def test_an_early_answer_over_max_new_tokens_is_named(tmp_path):
    task = task_of(tmp_path, turns("user: hi", "assistant: 12345", "user: bye", "assistant: 1"), max_new_tokens=5)
    with pytest.raises(DataError, match=r"row 1: messages\[1\] takes 6 tokens with its end, max_new_tokens is 5"):
        encode(fake(), task)


def test_learning_all_answers_needs_a_chat():
    with pytest.raises(ConfigError, match=r"task\.learn = 'all' is for conversations, and task\.chat is false"):
        TaskConfig(name="t", train="x", learn="all")


def test_learning_all_answers_lowers_the_loss_of_all_and_joint_is_alone(tmp_path):
    base = bundled()
    talks = [
        turns(f"user: my name is {name}", "assistant: noted", f"user: say {word}", f"assistant: {word} {name}")
        for name in ("ann", "bob", "cid", "dan")
        for word in ("hello", "bye")
    ]
    write_rows(tmp_path / "talks.jsonl", talks)
    other = Run.from_toml(write_task(tmp_path), steps=4, batch_size=4)
    toml = tmp_path / "talks.toml"
    toml.write_text('[task]\nname = "talks"\ntrain = "talks.jsonl"\ndev = "talks.jsonl"\nchat = true\nlearn = "all"\n')
    run = Run.from_toml(toml, method="kv", steps=12, batch_size=4, num_vectors=4, warmup_steps=1)
    joint, _ = fit(base, [run, other], out=tmp_path / "joint")
    (alone,) = fit(base, [run], out=tmp_path / "alone")
    assert joint.history[-1]["loss"] < 0.7 * joint.history[0]["loss"]
    ours, theirs = (load_artefact(result.artefact).tensors for result in (joint, alone))
    start = RunState(base, run).snapshot()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-3 * (tensor - start[name]).norm()


@pytest.mark.parametrize(("num_chars", "fits"), [(51, True), (52, False)])
def test_an_input_fills_the_window_and_not_one_token_more(tmp_path, num_chars, fits):
    # 4 vectors and "<" in the block; "user>x", its end, "<assistant>" and 2 to spare; 10 for the answer: 51 are left
    task = task_of(tmp_path, {"input": "x" * num_chars, "target": "y"}, max_new_tokens=10, template="{soft:4}{input}")
    base = fake(window=5 + 18 + 2 + 10 + 51)
    if fits:
        (example,) = encode(base, task)
        assert len(example.ids) == 51 + 17 + 2
    else:
        with pytest.raises(DataError, match="row 1: the input has 52 tokens, the limit is 51"):
            encode(base, task)


def test_a_conversation_fills_the_window_to_its_last_position(tmp_path):
    record = turns(*TALK[1:])
    task = task_of(tmp_path, record, template="{soft:4}{input}", max_new_tokens=10)
    rendered = len(task.template.render_messages(CharTokenizer(), record["messages"][:-1]).ids)
    block = task.template.block(CharTokenizer()).num_positions
    needed = block + rendered + 10
    assert encode(fake(window=needed), task)
    message = f"row 1: block, conversation and max_new_tokens take {needed} positions, the base has {needed - 1}"
    with pytest.raises(DataError, match=message):
        encode(fake(window=needed - 1), task)


@pytest.mark.slow
def test_a_row_that_fills_the_window_is_trained_beside_small_ones(tmp_path):
    base, toml = bundled(), write_task(tmp_path, rows=12)
    task = Run.from_toml(toml).task
    limit = task.input_limit(base.tokenizer, base.spec.max_positions)
    word = " the"
    assert len(base.tokenizer(word * 10, add_special_tokens=False).input_ids) == 10
    for split in ("train", "dev"):
        with (tmp_path / f"colour.{split}.jsonl").open("a") as file:
            file.write(json.dumps({"input": word * limit, "target": "warm"}) + "\n")
    run = Run.from_toml(toml, method="kv", steps=1, batch_size=9)
    state = RunState(base, run)
    longest = max(state.train, key=lambda row: len(row.ids))
    taken = state.block.num_positions + len(longest.ids) - longest.num_targets + task.config.max_new_tokens
    assert base.spec.max_positions - 3 <= taken <= base.spec.max_positions
    (result,) = fit(base, [run], out=tmp_path / "out")
    assert result.status == "done" and result.history[-1]["dev_loss"] < 20


def test_a_huge_row_is_alone_in_its_forward():
    rows = [(0, SimpleNamespace(ids=[0] * length)) for length in (30, MICRO_TOKENS * 3, 20, 25, 31)]
    parts = list(micro_batches(rows, MICRO_TOKENS))
    assert [[len(row.ids) for _, row in part] for part in parts] == [[20, 25, 30, 31], [MICRO_TOKENS * 3]]
    assert all(max(len(row.ids) for _, row in part) * len(part) <= MICRO_TOKENS for part in parts[:-1])
