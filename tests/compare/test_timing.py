import pytest

from foreword.compare.judging import Stage, paired_tests, text_bytes
from foreword.compare.plan import make_plan
from foreword.compare.timing import answer_tokens, make_subjects, plain_request, time_request
from foreword.engine.engine import Engine
from foreword.engine.request import Request
from foreword.errors import BackendFailed
from foreword.eval.report import EvalReport, EvalRow
from foreword.eval.tasks import read_rows
from tests.bundled import bundled
from tests.compare.cases import FEW, quick, small_task
from tests.tiny import tiny


@pytest.fixture
def stage(tmp_path):
    return Stage(bundled(), make_plan(small_task(tmp_path), bundled(), quick(), FEW))


def rows_of(stage):
    return stage.plan.task.rows("test")[:6]


@pytest.mark.parametrize("method", ["hard_text", "few_shot"])
def test_a_cached_start_changes_no_token(stage, method):
    whole, cached = make_subjects(stage, method, rows_of(stage), 5)
    lengths = [[len(request.prompt_ids) for request in subject.requests] for subject in (whole, cached)]
    assert all(long > short for long, short in zip(*lengths, strict=True))
    answers = [stage.engine.generate(list(subject.requests)) for subject in (whole, cached)]
    assert [output.token_ids for output in answers[0]] == [output.token_ids for output in answers[1]]


def test_every_method_makes_as_many_tokens(stage):
    subjects = [one for method in ("hard_text", "few_shot") for one in make_subjects(stage, method, rows_of(stage), 7)]
    for subject in subjects:
        assert {len(output.token_ids) for output in subject.engine.generate(list(subject.requests))} == {7}
    plain = [plain_request(stage, row, 7) for row in rows_of(stage)]
    assert {len(output.token_ids) for output in stage.engine.generate(plain)} == {7}


def test_the_number_of_tokens_is_the_median_right_answers(stage):
    tokenizer = bundled().tokenizer
    lengths = sorted(len(tokenizer(row.target, add_special_tokens=False).input_ids) + 1 for row in rows_of(stage))
    assert lengths[0] <= answer_tokens(stage) <= lengths[-1]


def test_first_token_comes_before_the_last():
    with Engine(tiny("llama")) as engine:
        first, whole = time_request(engine, Request(prompt_ids=[5, 6, 7], max_tokens=20, ignore_eos=True))
    assert 0 < first < whole


def test_a_request_that_fails_is_no_measurement(monkeypatch):
    engine = Engine(tiny("llama", seed=3))

    def broken(*args, **kwargs):
        raise RuntimeError("kernel")

    monkeypatch.setattr(engine._loop.runner, "prefill", broken)
    with engine, pytest.raises(BackendFailed, match="ended with error"):
        time_request(engine, Request(prompt_ids=[5, 6, 7], max_tokens=2))


def test_text_is_counted_in_utf8_bytes(tmp_path):
    plan = make_plan(small_task(tmp_path, hard_text="Grün oder blau?"), bundled(), quick(), FEW)
    text = len("Grün oder blau?\n".encode())
    assert text_bytes(plan, "hard_text") == text
    shots = text_bytes(plan, "few_shot") - text
    rows = [len(row.input.encode()) + len(row.target.encode()) for row in read_rows(plan.task.path("train"))]
    assert 2 * min(rows) <= shots <= 2 * max(rows)  # two examples


def test_pairs_share_the_level_and_name_both():
    def judged(right):
        rows = tuple(
            EvalRow(index=i, input="x", target="a", references=("a",), output="a" if i < right else "b",
                    score=float(i < right), finish_reason="stop")
            for i in range(40)
        )  # fmt: skip
        return EvalReport(
            task="t", split="test", metric="exact_match", score=right / 40, interval=(0.0, 1.0), num_rows=40,
            kind="prefix", prefix="p", decoding="free", data_sha256="d", seed=0, date="", versions={}, seconds=0.0,
            rows=rows,
        )  # fmt: skip

    reports = {"hard_text": judged(4), "kv": judged(38), "lora": judged(40)}
    tests = paired_tests(reports, seed=0)
    assert [(one.role, one.method, one.against, one.verdict) for one in tests] == [
        ("best", "hard_text", "lora", "worse"),
        ("best", "kv", "lora", "no difference"),
        ("hard_text", "kv", "hard_text", "better"),
        ("hard_text", "lora", "hard_text", "better"),
    ]
    assert {one.alpha for one in tests} == {0.025}
    assert paired_tests({}, 0) == ()
    assert paired_tests({"kv": judged(3)}, 0) == ()
    text_best = paired_tests({**reports, "hard_text": judged(40), "lora": judged(39)}, 0)
    assert {one.role for one in text_best} == {"best"}  # the two kinds are one then
    # six rows alone right: p 0.031 is below 5 % and not below 2.5 %
    near = paired_tests({"hard_text": judged(34), "kv": judged(40), "lora": judged(33)}, 0)
    assert near[0].p_value == pytest.approx(2 / 2**6) and near[0].verdict == "no difference"
