from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from foreword.engine.request import Output, Request
from foreword.errors import ConfigError, DataError
from foreword.eval.baselines import baseline_requests, choose_shots, evaluate_baseline, evaluate_baselines
from foreword.eval.run import evaluate
from tests.eval.fakes import CharTokenizer, answering, make_task, random_model, said
from tests.eval.test_run import NUMBERS, TEXTS, engine

TOKENIZER = CharTokenizer()


def prompts(task: Any, kind: Any, **options: Any) -> list[str]:
    requests = baseline_requests(task, TOKENIZER, kind, task.rows("test"), **options)
    return [TOKENIZER.decode(list(request.prompt_ids or [])) for request in requests]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hard_text": "Even or odd?"}, "Even or odd?\n0\nAnswer:"),
        ({}, "0\nAnswer:"),
        ({"template": "{soft:9}Is {{n}} = {input} even?\nSay: "}, "Is {n} = 0 even?\nSay: "),
        ({"template": "{soft:9}Number {input}{soft:2}"}, "Number 0\nAnswer:"),
        ({"hard_text": "Parity?", "template": "{soft:9}Number {input}"}, "Parity?\n0\nAnswer:"),
        ({"chat": True, "hard_text": "Parity?"}, "<user>Parity?\n0\x03<assistant>"),
        ({"chat": True, "template": "{soft:9}Number {input}!"}, "<user>Number 0!\x03<assistant>"),
        ({"chat": True, "system": "{soft:4} Be brief."}, "<system>Be brief.\x03<user>0\x03<assistant>"),
    ],
)
def test_hard_text_prompts(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    assert prompts(make_task(tmp_path, NUMBERS, **config), "hard_text")[0] == expected


def test_few_shot_prompts(tmp_path: Path) -> None:
    train = [{"input": "7", "target": "odd"}, {"input": "8", "target": "even"}] * 5
    test = [{"input": "0", "target": "even"}]
    plain = make_task(tmp_path, test, train=train, hard_text="Parity?")
    first, second = (shot.input for shot in choose_shots(plain, 2, seed=0))
    names = {"7": "odd", "8": "even"}
    assert prompts(plain, "few_shot", num_shots=2) == [
        f"Parity?\n{first}\nAnswer: {names[first]}\n\n{second}\nAnswer: {names[second]}\n\n0\nAnswer:"
    ]
    chat = make_task(tmp_path, test, train=train, hard_text="Parity?", chat=True)
    assert prompts(chat, "few_shot", num_shots=2) == [
        f"<user>Parity?\n{first}\x03<assistant>{names[first]}\x03<user>{second}\x03<assistant>{names[second]}\x03"
        "<user>0\x03<assistant>"
    ]


def test_examples_are_seeded_balanced_and_never_the_row_itself(tmp_path: Path) -> None:
    train = [{"input": f"x{n}", "target": "abc"[min(n % 10, 2)]} for n in range(60)]
    task = make_task(tmp_path, train[:5], train=train)
    shots = choose_shots(task, 7, seed=1)
    assert shots == choose_shots(task, 7, seed=1) != choose_shots(task, 7, seed=2)
    counts = sorted([shot.target for shot in shots].count(label) for label in "abc")
    assert counts == [2, 2, 3] and len({shot.input for shot in shots}) == 7
    for row, prompt in zip(train, prompts(task, "few_shot", num_shots=60), strict=False):
        assert prompt.count(f"{row['input']}\nAnswer:") == 1
    open_task = make_task(tmp_path, TEXTS, metric="bleu")
    assert len(choose_shots(open_task, 7, seed=1)) == 7


def test_as_many_examples_as_fit(tmp_path: Path) -> None:
    test = [{"input": "0" * length, "target": "even"} for length in (1, 30)]
    task = make_task(tmp_path, test, train=NUMBERS, max_new_tokens=5)
    short, long = prompts(task, "few_shot", max_positions=60)
    assert short.count("Answer:") > long.count("Answer:") and max(len(short), len(long)) <= 55
    with pytest.raises(DataError, match="row 2: the input has 30 tokens, the limit is"):
        prompts(task, "few_shot", max_positions=40)
    cut = make_task(tmp_path, test, train=NUMBERS, max_new_tokens=5, truncate="right")
    assert all(len(prompt) <= 35 for prompt in prompts(cut, "few_shot", max_positions=40))
    with pytest.raises(ConfigError, match="leave no token of the base's 15"):
        prompts(task, "hard_text", max_positions=15)


def test_conversations_keep_their_turns(tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "yes?"), ("user", "bye"), ("assistant", "ciao")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    task = make_task(tmp_path, rows, chat=True, hard_text="Be kind.")
    assert prompts(task, "hard_text") == ["<user>Be kind.\nhi\x03<assistant>yes?\x03<user>bye\x03<assistant>"]
    with pytest.raises(DataError, match="no training rows of one turn"):
        prompts(task, "few_shot")


def test_plain_text_stops_at_the_line_and_labels_start_with_a_space(tmp_path: Path) -> None:
    seen: list[Request] = []

    def generate(requests: Sequence[Request]) -> list[Output]:
        seen.extend(requests)
        return random_model(requests) if requests[0].allowed_ids else [said(" even") for _ in requests]

    task = make_task(tmp_path, NUMBERS, max_new_tokens=5)
    reports = evaluate_baselines(engine(generate, None), task)
    assert [(report.kind, report.decoding) for report in reports] == [
        ("hard_text", "free"),
        ("hard_text", "labels"),
        ("few_shot", "free"),
        ("few_shot", "labels"),
    ]
    assert reports[0].score == 0.5 and reports[0].prefix is None and reports[2].num_shots == 8
    assert len({report.data_sha256 for report in reports}) == 1
    assert seen[0].stop == ("\n",) and seen[0].max_tokens == 5 and seen[0].prefix is None
    assert TOKENIZER.decode(list(seen[20].prompt_ids or [])) == "0\nAnswer: "
    assert "base with examples, 8.0 examples" in reports[2].summary()
    lines = make_task(tmp_path, [{"input": "x", "target": "a\nb"}])
    assert baseline_requests(lines, TOKENIZER, "hard_text", lines.rows("test"))[0].stop == ("\n\n",)


def test_an_open_task_is_judged_freely_and_saved(tmp_path: Path) -> None:
    task = make_task(tmp_path, TEXTS, metric="bleu", hard_text="Name it.")
    source = engine(answering(lambda request: "number 3"), None)
    assert [report.decoding for report in evaluate_baselines(source, task)] == ["free", "free"]
    report = evaluate_baseline(source, task, "few_shot", num_shots=2, limit=5, out=tmp_path / "x.json")
    assert report.num_rows == 5 and (tmp_path / "x.rows.jsonl").exists()


def test_no_prefix_is_the_base_with_the_hard_text(tmp_path: Path) -> None:
    task = make_task(tmp_path, NUMBERS, hard_text="Parity?")
    report = evaluate(random_model, task, prefix=None, tokenizer=TOKENIZER)
    assert (report.kind, report.prefix, report.decoding) == ("hard_text", None, "labels")


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    task = make_task(tmp_path, NUMBERS)
    with pytest.raises(ConfigError, match="needs the base's tokenizer"):
        evaluate_baseline(random_model, task, "hard_text")
    with pytest.raises(ConfigError, match="unknown baseline 'few_shots'\nDid you mean few_shot"):
        evaluate_baseline(random_model, task, "few_shots", tokenizer=TOKENIZER)  # type: ignore[arg-type]
