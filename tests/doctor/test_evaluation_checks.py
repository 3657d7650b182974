"""Checks of evaluations: each planted fault is named, sound ones have no finding, what is missing is said."""

import dataclasses
import json
import random

import pytest
import torch

from foreword.doctor import diagnose as doctor
from foreword.doctor.checks.evaluation import CHECKS
from foreword.doctor.faults import FAULTS
from foreword.doctor.subjects import Evaluation
from foreword.eval.metrics import bootstrap, get_metric, percentile_interval
from foreword.eval.report import EvalReport, EvalRow
from foreword.eval.tasks import Row, Task, rows_sha256
from tests.bundled import BASE


def rows_of(count, seed=0, width=6):
    """Rows whose answer is decided by their last word."""
    chance = random.Random(seed)
    rows = []
    for index in range(count):
        words = [f"w{chance.randrange(1000)}" for _ in range(width)]
        target = f"a{int(words[-1][1:]) % 3} b c"
        rows.append(Row(input=" ".join(words), target=target, references=(target,), messages=None, index=index))
    return rows


def answers_of(rows, right, seed=0):
    """Answers of which each is right with probability `right`; which rows are easy is the same for every seed."""
    easy, chance = random.Random(99), random.Random(seed)
    return [row.target if 0.7 * easy.random() + 0.3 * chance.random() < right else "a9 b c" for row in rows]


def report(rows, answers, **fields):
    metric = get_metric("exact_match")
    counts = metric.count(answers, [row.references for row in rows])
    judged = tuple(
        EvalRow(
            index=row.index,
            input=row.input,
            target=row.target,
            references=row.references,
            output=answer,
            score=score,
            finish_reason="stop",
        )
        for row, answer, score in zip(rows, answers, metric.row(counts).tolist(), strict=True)
    )
    known = {"task": "t", "split": "test", "kind": "prefix", "prefix": "v", "decoding": "free", "versions": {}}
    known |= {"seed": 0, "date": "", "seconds": 0.0, "data_sha256": rows_sha256(rows), "num_rows": len(rows)}
    known |= {"metric": "exact_match", "rows": judged}
    score = float(metric.total(counts.sum(axis=0, keepdims=True))[0])
    interval = percentile_interval(bootstrap(metric, counts, 300, 0))
    return EvalReport(
        **{**known, "metric": "exact_match", "score": score, "interval": interval, "rows": judged, **fields}
    )


def diagnose(evaluation):
    """Diagnose, and see to it that no check failed by itself."""
    diagnosis = doctor.diagnose(evaluation)
    broken = [finding.measured for finding in diagnosis.findings if "its probe failed" in finding.measured]
    assert not broken, broken
    for finding in diagnosis.findings:
        json.dumps(finding.to_json(), allow_nan=False)
        assert finding.fault in ("", *FAULTS) and (finding.skipped or finding.expected)
    return diagnosis


def found(**fields):
    first = diagnose(Evaluation(**fields)).first
    return None if first is None else first.fault or first.check


def test_an_empty_evaluation_says_what_each_check_needs():
    diagnosis = diagnose(Evaluation())
    assert diagnosis.ok and len(diagnosis.findings) == len(CHECKS)
    assert all(finding.skipped and len(finding.measured) > 20 for finding in diagnosis.findings)


def test_a_sound_evaluation_with_every_part_has_no_finding():
    rows, train = rows_of(200), rows_of(100, seed=7)
    now = rows_of(200, seed=3)
    good = answers_of(rows, 0.8)
    table = {row.input: answer for row, answer in zip(rows, good, strict=True)}
    skill = (report(rows, answers_of(rows, 0.6, 1)), report(rows, answers_of(rows, 0.6, 2)))
    teacher = torch.log_softmax(torch.randn(8, 50, generator=torch.Generator().manual_seed(0)), -1)
    diagnosis = diagnose(
        Evaluation(
            claimed_score=report(rows, good).score,
            test=rows,
            train=train,
            generate=lambda inputs: [table[text] for text in inputs],
            old=report(rows, answers_of(rows, 0.5)),
            new=report(rows, good),
            claimed_change="better",
            promotions=("1", "2", "3"),
            skills={"sums": skill},
            alone={"a": skill[0]},
            joined={"a": skill[1]},
            traffic={
                ("base", "then"): report(rows, answers_of(rows, 0.4)),
                ("base", "now"): report(now, answers_of(now, 0.4)),
                ("old", "then"): report(rows, answers_of(rows, 0.7)),
                ("old", "now"): report(now, answers_of(now, 0.7)),
            },
            decoding_then={"temperature": 0, "top_p": 0.9, "stop": ["\n"], "seed": 1},
            decoding_now={"temperature": 0.0, "stop": "\n", "seed": None, "logit_bias": {}, "top_k": -1},
            greedy_then=good,
            greedy_now=good,
            sweep={5: (0.80, 0.78), 20: (0.85, 0.82), 100: (0.86, 0.82)},
            teacher_logprobs=teacher,
            student_logprobs=teacher + 0.01,
        )
    )
    assert diagnosis.ok, diagnosis.first
    assert not any(finding.skipped for finding in diagnosis.findings)


def test_a_score_by_teacher_forcing():
    rows = rows_of(120)
    wrong = {row.input: "a9 b c" for row in rows}  # one word of three wrong: forced, two of three are right
    told = found(claimed_score=0.67, test=rows, generate=lambda inputs: [wrong[text] for text in inputs])
    assert told == "teacher-forced-score"
    noisy = dict(zip(wrong, answers_of(rows, 0.65), strict=True))
    assert found(claimed_score=0.67, test=rows, generate=lambda inputs: [noisy[text] for text in inputs]) is None
    assert found(claimed_score=0.5, test=rows, generate=lambda inputs: [noisy[text] for text in inputs]) is None


def test_leakage_exact_and_disguised():
    rows, train = rows_of(100), rows_of(300, seed=5)
    assert found(test=rows, train=[*train, *rows[:20]]) == "teacher-forced-score"
    loud = [dataclasses.replace(row, input=f"  {row.input.upper()}!") for row in rows[:20]]
    diagnosis = diagnose(Evaluation(test=rows, train=[*train, *loud]))
    assert diagnosis.first.fault == "teacher-forced-score" and diagnosis.first.numbers["exact"] == 0
    assert found(test=rows, train=[*train, *rows[:2]]) is None
    other = [dataclasses.replace(row, target="z") for row in rows]
    assert found(test=rows, train=[*train, *other]) is None


@pytest.mark.parametrize("path", sorted((BASE.parent / "tasks").rglob("*.toml")), ids=lambda path: path.stem)
def test_the_bundled_tasks_do_not_leak(path):
    task = Task.from_toml(path)
    assert found(test=task.rows("test"), train=task.rows("train")) is None


def test_metric_noise_is_told_from_a_real_change():
    rows = rows_of(150)
    old, close, far = (report(rows, answers_of(rows, right, seed)) for right, seed in ((0.7, 1), (0.68, 2), (0.4, 3)))
    assert found(old=old, new=close, claimed_change="worse") == "metric-noise"
    assert found(old=old, new=close) is None
    assert found(old=old, new=far, claimed_change="worse") is None
    assert found(old=old, new=close, promotions=("1", "2", "1", "2", "1")) == "metric-noise"
    assert found(old=old, new=close, promotions=("1", "2", "1")) is None
    assert found(old=old, new=far, claimed_change="better") == "change"
    elsewhere = report(rows_of(150, seed=4), answers_of(rows, 0.7))
    finding = next(f for f in diagnose(Evaluation(old=old, new=elsewhere)).findings if f.check == "change")
    assert finding.skipped and "other rows" in finding.measured


def test_traffic_shift_is_told_from_a_prompt_that_fell():
    rows, now = rows_of(200), rows_of(200, seed=3)

    def systems(**scores):
        made = {}
        for name, (then, later) in scores.items():
            made[(name, "then")] = report(rows, answers_of(rows, then))
            made[(name, "now")] = report(now, answers_of(now, later))
        return made

    all_fall = systems(base=(0.6, 0.3), old=(0.8, 0.4), new=(0.85, 0.5))
    assert found(traffic=all_fall) == "traffic-shift"
    same = {"old": all_fall[("old", "now")], "new": report(now, answers_of(now, 0.4, 5)), "claimed_change": "worse"}
    assert found(traffic=all_fall, **same) == "traffic-shift"
    assert found(traffic=systems(base=(0.6, 0.58), old=(0.8, 0.5), new=(0.85, 0.5))) is None
    assert found(traffic=systems(base=(0.6, 0.6), old=(0.8, 0.8), new=(0.85, 0.85))) is None
    assert found(traffic={("old", "then"): all_fall[("old", "then")]}) is None


def test_decoding_drift():
    then = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 64}
    diagnosis = diagnose(Evaluation(decoding_then=then, decoding_now=then | {"temperature": 0.7}))
    assert diagnosis.first.fault == "decoding-drift" and "temperature was None, is 0.7" in diagnosis.first.measured
    for drift in ({"stop": ["\n"]}, {"logit_bias": {"5": -100}}, {"max_tokens": 16}, {"repetition_penalty": 1.3}):
        assert found(decoding_then=then, decoding_now=then | drift) == "decoding-drift", drift
    assert found(decoding_then=then, decoding_now=then | {"top_p": 0.5}) is None  # greedy knows no top_p
    warm = then | {"temperature": 0.7}
    assert found(decoding_then=warm, decoding_now=warm | {"top_p": 0.5}) == "decoding-drift"


def test_side_effects_and_compositions():
    rows = rows_of(150)
    good, hurt, level = (report(rows, answers_of(rows, right, 1)) for right in (0.7, 0.4, 0.69))
    assert found(skills={"sums": (hurt, good), "dates": (level, good)}) == "side-effects"
    assert found(skills={"sums": (level, good)}) is None
    assert found(skills={"sums": (good, hurt)}) is None
    assert found(alone={"a": good}, joined={"a": hurt}) == "composed-untrained"
    assert found(alone={"a": good}, joined={"a": level}) is None
    assert found(alone={"a": good}, joined={"b": hurt}) is None


def test_a_sweep_over_p():
    assert found(sweep={5: (0.8, 0.75), 20: (0.85, 0.78), 100: (0.99, 0.65)}) == "overfit"
    assert found(sweep={5: (0.8, 0.75), 20: (0.85, 0.78), 100: (0.9, 0.8)}) is None
    assert found(sweep={5: (0.8, 0.75), 100: (0.7, 0.6)}) is None  # both fell: not learned, rather than overfit


def test_a_student_without_the_teachers_tail():
    teacher = torch.log_softmax(torch.randn(8, 60, generator=torch.Generator().manual_seed(0)), -1)
    kept = torch.zeros(8, 60, dtype=torch.bool).scatter(1, teacher.topk(20).indices, True)
    sharp = torch.log_softmax(teacher.masked_fill(~kept, -30.0), -1)
    assert found(teacher_logprobs=teacher, student_logprobs=sharp) == "tail-dropped"
    assert found(teacher_logprobs=teacher.masked_fill(~kept, -torch.inf), student_logprobs=sharp) == "tail-dropped"
    assert found(teacher_logprobs=teacher, student_logprobs=teacher) is None
    untrained = torch.log_softmax(3 * torch.randn(8, 60, generator=torch.Generator().manual_seed(1)), -1)
    assert found(teacher_logprobs=teacher, student_logprobs=untrained) is None
    near = torch.log_softmax(teacher + 0.3 * torch.randn(8, 60, generator=torch.Generator().manual_seed(2)), -1)
    assert found(teacher_logprobs=teacher, student_logprobs=near) is None
    flat = torch.full((8, 60), 1 / 60).log()
    assert found(teacher_logprobs=teacher, student_logprobs=flat) is None
    assert found(teacher_logprobs=sharp, student_logprobs=sharp) is None  # this teacher has no tail
