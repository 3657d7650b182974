import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foreword.core.template import TaskTemplate
from foreword.engine.request import Output, Request
from foreword.errors import BackendFailed, ConfigError, DataError
from foreword.eval.report import EvalReport
from foreword.eval.run import evaluate
from tests.eval.fakes import CharTokenizer, answering, make_task, random_model, said

NUMBERS = [{"input": str(n), "target": "even" if n % 2 == 0 else "odd"} for n in range(20)]
TEXTS = [{"input": str(n), "target": f"number {n}", "references": [f"number {n}", f"no {n}"]} for n in range(20)]


def engine(
    generate: Any, template: TaskTemplate | None, name: str = "t@1", max_positions: int | None = None
) -> SimpleNamespace:
    spec = SimpleNamespace(max_positions=max_positions)
    base = SimpleNamespace(tokenizer=CharTokenizer(), stop_ids=frozenset({3}), spec=spec)
    return SimpleNamespace(base=base, prefixes={name: SimpleNamespace(template=template)}, generate=generate)


def test_free_answers_are_judged_and_saved(tmp_path: Path) -> None:
    seen: list[Request] = []

    def generate(requests: Sequence[Request]) -> list[Output]:
        seen.extend(requests)
        return [said(" Even\n" if int(request.prompt or "") % 4 else "even", "length") for request in requests]

    task = make_task(tmp_path, NUMBERS, max_new_tokens=7)
    report = evaluate(generate, task, prefix="t@1", decoding="free", seed=5, out=tmp_path / "out" / "x.json")
    assert (report.score, report.num_rows, report.metric, report.decoding) == (0.5, 20, "exact_match", "free")
    assert report.interval[0] < 0.5 < report.interval[1]
    assert report.others == {"accuracy": 0.5, "f1": pytest.approx(1 / 3)}
    assert report.num_cut == 20 and report.prefix == "t@1" and report.seed == 5
    assert report.data_sha256 == task.data_sha256("test")
    assert [line["label"] for line in report.per_label] == ["even", "odd"]
    assert report.rows[1].output == "Even" and report.rows[1].score == 0 and report.rows[2].score == 1
    assert all(request.prefix == "t@1" and request.max_tokens == 7 and not request.temperature for request in seen)
    assert report.versions["foreword"] and report.date.endswith("+00:00")
    assert EvalReport.load(tmp_path / "out" / "x.json") == report
    assert len((tmp_path / "out" / "x.rows.jsonl").read_text().splitlines()) == 20
    text = report.summary()
    assert "exact_match 0.5000 [" in text and "20 answers were cut" in text and "weakest labels: odd" in text


def test_open_answers_take_every_reference_and_no_label_table(tmp_path: Path) -> None:
    task = make_task(tmp_path, TEXTS, metric="token_f1")
    report = evaluate(answering(lambda request: f"no {request.prompt}"), task, prefix="t")
    assert report.score == 1 and report.interval == (1, 1) and report.decoding == "free"
    assert report.others.keys() == {"exact_match", "squad_f1", "rouge_l", "bleu"}
    assert report.per_label == () and report.calibration is None


def test_limit_draws_the_same_rows_by_seed(tmp_path: Path) -> None:
    task = make_task(tmp_path, NUMBERS)
    generate = answering(lambda request: "even")
    first, again, other = (
        evaluate(generate, task, prefix="t", decoding="free", limit=6, seed=seed) for seed in (1, 1, 2)
    )
    assert first.data_sha256 == again.data_sha256 != other.data_sha256 != task.data_sha256("test")
    assert dataclasses.replace(first, date="", seconds=0) == dataclasses.replace(again, date="", seconds=0)
    with pytest.raises(ConfigError, match="limit = 0 judges no row"):
        evaluate(generate, task, prefix="t", limit=0)


def test_label_decoding_gives_probabilities_and_calibration(tmp_path: Path) -> None:
    task = make_task(tmp_path, NUMBERS, template="{soft:3}Say: {input}?")
    report = evaluate(engine(random_model, task.template), task, prefix="t@1")
    assert report.decoding == "labels" and {row.output for row in report.rows} <= {"even", "odd"}
    for row in report.rows:
        assert row.probabilities is not None
        assert sum(row.probabilities.values()) == pytest.approx(1)
        assert row.output == max((share, label) for label, share in row.probabilities.items())[1]
    assert report.calibration is not None
    assert report.calibration.keys() == {"ece", "confidence", "log_loss", "max_residual"}
    assert 0 < report.calibration["ece"] < 1 and report.calibration["max_residual"] == 0
    assert "ece" in report.summary()
    with_callable = evaluate(random_model, task, prefix="t@1", tokenizer=CharTokenizer())
    assert [row.probabilities for row in with_callable.rows] == [row.probabilities for row in report.rows]


@pytest.mark.parametrize("template", [None, TaskTemplate("{soft:3}{input}{soft:2}")])
def test_prefixes_that_need_their_template_are_constrained_greedily(tmp_path: Path, template: Any) -> None:
    def generate(requests: Sequence[Request]) -> list[Output]:
        assert all(request.choices == ("even", "odd") and request.max_tokens is None for request in requests)
        return [said("odd") for _ in requests]

    report = evaluate(engine(generate, template), make_task(tmp_path, NUMBERS), prefix="t@1", decoding="labels")
    assert (report.decoding, report.score, report.calibration) == ("choices", 0.5, None)


def test_conversations_are_sent_as_messages(tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "yes?"), ("user", "bye"), ("assistant", "ciao")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    seen: list[Request] = []

    def generate(requests: Sequence[Request]) -> list[Output]:
        seen.extend(requests)
        return [said("ciao")]

    task = make_task(tmp_path, rows, chat=True, metric="token_f1")
    assert evaluate(generate, task, prefix="t").score == 1
    assert seen[0].prompt is None and seen[0].messages == tuple(rows[0]["messages"][:-1])


def test_inputs_are_cut_to_what_fits_the_base(tmp_path: Path) -> None:
    rows = [{"input": "0123456789" * 5, "target": "x"}]
    task = make_task(tmp_path, rows, truncate="left", max_new_tokens=4, metric="token_f1")
    source = engine(answering(lambda request: request.prompt or ""), task.template, max_positions=34)
    report = evaluate(source, task, prefix="t@1")
    assert report.rows[0].output == "3456789" and report.rows[0].input == "0123456789" * 5
    with pytest.raises(DataError, match="row 1: the input has 50 tokens, the limit is 7"):
        evaluate(source, make_task(tmp_path, rows, max_new_tokens=4, metric="token_f1"), prefix="t@1")


def test_failed_answers_are_no_wrong_answers(tmp_path: Path) -> None:
    task = make_task(tmp_path, NUMBERS)
    with pytest.raises(BackendFailed, match="request 1 of 20 ended with error"):
        evaluate(lambda requests: [said("", "error") for _ in requests], task, prefix="t", decoding="free")
    with pytest.raises(BackendFailed, match="1 outputs for 20 requests"):
        evaluate(lambda requests: [said("x")], task, prefix="t", decoding="free")


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    task = make_task(tmp_path, TEXTS)
    with pytest.raises(ConfigError, match="has no closed set of answers"):
        evaluate(random_model, task, prefix="t", decoding="labels")
    with pytest.raises(ConfigError, match="unknown decoding 'label'\nDid you mean labels"):
        evaluate(random_model, task, prefix="t", decoding="label")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the engine has no prefix 't@2'\nDid you mean t@1"):
        evaluate(engine(random_model, task.template), task, prefix="t@2")


def test_reports_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        EvalReport.load(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.rows.jsonl").write_text("")
    with pytest.raises(DataError, match=r"x\.json is no evaluation report"):
        EvalReport.load(tmp_path / "x.json")


def test_the_report_is_json(tmp_path: Path) -> None:
    report = evaluate(answering(lambda request: "even"), make_task(tmp_path, NUMBERS), prefix="t", decoding="free")
    data = json.loads(json.dumps(report.to_json()))
    assert "rows" not in data and data["score"] == 0.5 and len(data["interval"]) == 2
    assert EvalReport.from_json(data, report.rows) == report
