"""Faults of judging: scores that nobody is served, noise, other requests, other skills, other parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from foreword.doctor.subjects import Evaluation
from foreword.eval.paired import compare_reports
from foreword.eval.report import EvalReport
from foreword.eval.tasks import Row
from tests.doctor.lab.distillation_plants import distilled, overconfident
from tests.doctor.lab.evaluations import Speaker, make_rows, report, said, train, trained
from tests.doctor.lab.plant import Plant
from tests.doctor.lab.trainers import PAIRS
from tests.tiny import tiny

NAMES = ("llama", "gpt2", "qwen3")


def plant(
    fault: str,
    name: str,
    variant: str,
    make: Callable[[], Evaluation],
    proof: Callable[[Evaluation], tuple[float, float]],
    cheap: bool = False,
) -> Plant:
    """An evaluation with a fault; the proof reads it."""
    return Plant(fault=fault, architecture=name, make=make, variant=variant, proof=proof, cheap=cheap)


# Scores


@cache
def forced_score(name: str) -> Evaluation:
    """Four words an answer, half trained: right word by word when the words before are given, rarely as a whole."""
    speaker = trained(name, 0, 4, steps=20)
    test = make_rows(0, 7, 40, 4)
    return Evaluation(
        claimed_score=speaker.forced(test),
        test=test,
        train=make_rows(0, 100, 64, 4),
        generate=speaker,
        metric="exact_match",
    )


def far_below(evaluation: Evaluation) -> tuple[float, float]:
    """Proof: greedy answers reach less than is claimed."""
    assert evaluation.generate is not None and evaluation.claimed_score is not None
    return evaluation.claimed_score - said(evaluation.test, evaluation.generate).score, 0.15


@cache
def leaked(name: str, disguised: bool) -> Evaluation:
    """A version that memorised answers without a rule, judged on rows among them."""
    drawn = torch.Generator().manual_seed(3)
    rows = []
    for row in make_rows(0, 100, 12):
        target = f"w{int(torch.randint(3, 20, (1,), generator=drawn))}"
        rows.append(dataclasses.replace(row, target=target, references=(target,)))
    speaker = Speaker(tiny(name), train(tiny(name), rows, 60))
    test = rows[:8]
    if disguised:
        test = [dataclasses.replace(row, input=row.input.upper().replace(" ", "  ")) for row in test]

    def generate(inputs: Any) -> list[str]:
        return speaker([" ".join(text.lower().split()) for text in inputs])

    return Evaluation(claimed_score=said(test, generate).score, test=test, train=rows, generate=generate)


def nothing_elsewhere(evaluation: Evaluation) -> tuple[float, float]:
    """Proof: on rows of the same kind that were not trained on, the score is far lower."""
    assert evaluation.generate is not None and evaluation.claimed_score is not None
    fresh = make_rows(0, 555, 24)
    drawn = torch.Generator().manual_seed(9)
    rows = []
    for row in fresh:
        target = f"w{int(torch.randint(3, 20, (1,), generator=drawn))}"
        rows.append(dataclasses.replace(row, target=target, references=(target,)))
    return evaluation.claimed_score - said(rows, evaluation.generate).score, 0.3


def scores() -> Iterator[Plant]:
    """Teacher forcing, and test rows seen in training."""
    for name in NAMES:
        yield plant(
            "teacher-forced-score",
            name,
            "four words",
            lambda name=name: forced_score(name),
            far_below,
        )
        for disguised in (False, True):
            yield plant(
                "teacher-forced-score",
                name,
                "leaked, disguised" if disguised else "leaked",
                lambda name=name, disguised=disguised: leaked(name, disguised),
                nothing_elsewhere,
                cheap=name == "llama" and not disguised,
            )


# Changes


@cache
def resampled(name: str, seed: int, steps: int = 12) -> EvalReport:
    """The same version, its answers drawn at temperature 1."""
    rows = make_rows(0, 8, 60)
    return report(rows, trained(name, steps=steps).answer_at([row.input for row in rows], 1.0, seed), prefix=f"v{seed}")


@cache
def noisy(name: str, told: str) -> Evaluation:
    """Two drawings of one version's answers; the lower one is said to be worse."""
    reports = sorted((resampled(name, seed) for seed in (1, 2, 3)), key=lambda found: found.score)
    low, high = reports[0], reports[-1]
    if told == "promotions":
        return Evaluation(old=low, new=high, promotions=("v1", "v2", "v1", "v2", "v1"))
    if told == "better":
        return Evaluation(old=low, new=high, claimed_change="better")
    return Evaluation(old=high, new=low, claimed_change="worse", promotions=("v1", "v2", "v1"))


def is_noise(evaluation: Evaluation) -> tuple[float, float]:
    """Proof: the paired test finds no difference (p above 0.05), though the scores differ."""
    assert evaluation.old is not None and evaluation.new is not None
    result = compare_reports(evaluation.new, evaluation.old)
    return (result.p_value or 0.0) * (evaluation.old.score != evaluation.new.score), 0.05


def noise() -> Iterator[Plant]:
    """A difference that another drawing turns round."""
    for name in NAMES:
        for told in ("worse", "better", "promotions"):
            yield plant(
                "metric-noise",
                name,
                f"told {told}",
                lambda name=name, told=told: noisy(name, told),
                is_noise,
                cheap=name == "llama" and told == "worse",
            )


@cache
def harder(seed: int) -> tuple[Row, ...]:
    """Requests of another kind: the deciding word no longer stands last, so that no version sees it."""
    rows = []
    for row in make_rows(0, seed, 60):
        words = row.input.split()
        words[2], words[-1] = words[-1], "w50"
        rows.append(dataclasses.replace(row, input=" ".join(words)))
    return tuple(rows)


@cache
def shifted(name: str) -> Evaluation:
    """Base, old and new, each right then and wrong now."""
    then, now = make_rows(0, 8, 60), harder(9)
    systems = {"old": trained(name, steps=30), "new": trained(name, steps=25)}
    traffic: dict[Any, EvalReport] = {}
    for who, speaker in systems.items():
        traffic[who, "then"], traffic[who, "now"] = said(then, speaker), said(now, speaker)
    few = trained(name, steps=18)  # in the place of a base with hard text: it does the task, less well
    traffic["base", "then"] = said(then, few, prefix=None)
    traffic["base", "now"] = said(now, few, prefix=None)
    return Evaluation(traffic=traffic)


def all_fall(evaluation: Evaluation) -> tuple[float, float]:
    """Proof: the smallest drop of the three."""
    found = evaluation.traffic
    return min(found[who, "then"].score - found[who, "now"].score for who in ("base", "old", "new")), 0.2


def traffic() -> Iterator[Plant]:
    """Requests that changed under all versions."""
    for name in NAMES:
        yield plant("traffic-shift", name, "the mark moved", lambda name=name: shifted(name), all_fall)


DRIFTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({"temperature": 0.0, "max_tokens": 1}, {"temperature": 1.0, "max_tokens": 1}),
    "stop lost": (
        {"temperature": 0.0, "stop": ["w3"], "max_tokens": 4},
        {"temperature": 0.0, "max_tokens": 4},
    ),
    "bias": ({"temperature": 0.7, "logit_bias": {}}, {"temperature": 0.7, "logit_bias": {"11": -5.0}}),
    "shorter": ({"temperature": 0.0, "max_tokens": 4}, {"temperature": 0.0, "max_tokens": 2}),
}


@cache
def drifted(name: str, kind: str) -> Evaluation:
    """The same version under other parameters: as before under those of then."""
    inputs = [row.input for row in make_rows(0, 8, 12)]
    greedy = trained(name)(inputs)
    then, now = DRIFTS[kind]
    return Evaluation(decoding_then=then, decoding_now=now, greedy_then=greedy, greedy_now=trained(name)(inputs))


def answers_change(name: str, kind: str) -> Callable[[Evaluation], tuple[float, float]]:
    """Proof: with the parameters of now, answers are others; greedy ones of then and now are the same."""

    def proof(evaluation: Evaluation) -> tuple[float, float]:
        if list(evaluation.greedy_then) != list(evaluation.greedy_now):
            return 0.0, 0.0
        inputs = [row.input for row in make_rows(0, 8, 12)]
        speaker = trained(name, steps=12) if kind in ("temperature", "bias") else trained(name, 0, 4, steps=20)
        if kind == "temperature":
            other = speaker.answer_at(inputs, 1.0, 0)
            return float(sum(a != b for a, b in zip(other, speaker(inputs), strict=True))), 0.5
        if kind == "bias":
            with torch.no_grad():
                logits = torch.cat(
                    [speaker.logits(torch.tensor([[int(w[1:]) for w in t.split()]]))[:, -1] for t in inputs]
                )
            moved = logits.clone()
            moved[:, 11] -= 5.0
            shares = [torch.softmax(rows / 0.7, -1) for rows in (logits, moved)]
            return float((shares[0] - shares[1]).abs().sum(-1).max()), 1e-3
        whole = speaker(inputs)
        cut = [" ".join(text.split()[:2]) for text in whole]
        if kind == "stop lost":
            cut = [text.split("w3", 1)[0].strip() for text in (f"{text} " for text in whole)]
        return float(sum(a != b for a, b in zip(whole, cut, strict=True))), 0.5

    return proof


def decoding() -> Iterator[Plant]:
    """Parameters of sampling that are not those of then."""
    for name in ("llama", "gpt2"):
        for kind in DRIFTS:
            yield plant(
                "decoding-drift",
                name,
                f"judged: {kind}",
                lambda name=name, kind=kind: drifted(name, kind),
                answers_change(name, kind),
                cheap=name == "llama" and kind == "temperature",
            )


# Skills


@cache
def side_effects(name: str) -> Evaluation:
    """Vectors of one task in front of what the base says about others."""
    base, speaker = Speaker(tiny(name), None), trained(name)
    skills = {}
    for place, width in enumerate((6, 9)):
        rows = []
        for row in make_rows(5 + place, 40 + place, 40, width=width):
            said_by_base = base([row.input])[0]
            rows.append(dataclasses.replace(row, target=said_by_base, references=(said_by_base,)))
        skills[f"skill {place}"] = (said(rows, speaker), said(rows, base, prefix=None))
    test = make_rows(0, 8, 40)
    return Evaluation(
        skills=skills,
        test=test,
        train=make_rows(0, 100, 64),
        claimed_score=said(test, speaker).score,
        generate=speaker,
    )


def skills_fall(evaluation: Evaluation) -> tuple[float, float]:
    """Proof: the largest fall of a skill."""
    return max(without.score - with_.score for with_, without in evaluation.skills.values()), 0.3


@cache
def composed(name: str) -> Evaluation:
    """Two prefixes joined in one sequence, keys as they were."""
    both = [trained(name, task) for task in (0, 1)]
    flats = [speaker.flat for speaker in both if speaker.flat is not None]
    joined = Speaker(tiny(name), torch.cat(flats))
    rows = [make_rows(task, 60 + task, 40) for task in (0, 1)]
    return Evaluation(
        alone={f"task {task}": said(rows[task], both[task]) for task in (0, 1)},
        joined={f"task {task}": said(rows[task], joined) for task in (0, 1)},
    )


def joined_fall(evaluation: Evaluation) -> tuple[float, float]:
    """Proof: the largest fall of a task in the composition."""
    return max(evaluation.alone[task].score - evaluation.joined[task].score for task in evaluation.alone), 0.2


def skills() -> Iterator[Plant]:
    """What the vectors do to others."""
    for name in NAMES:
        yield plant("side-effects", name, "two skills", lambda name=name: side_effects(name), skills_fall)
        yield plant("composed-untrained", name, "two joined", lambda name=name: composed(name), joined_fall)


# Tails


def tails() -> Iterator[Plant]:
    """A distillation without a tail, judged on all of the teacher's tokens."""
    for name, method in PAIRS:
        for whole in (False, True):

            def held_out(name: str = name, method: str = method, whole: bool = whole) -> Evaluation:
                trainer = distilled(name, method, False)
                teacher = trainer.teacher if whole else trainer.kept
                with torch.no_grad():
                    return Evaluation(teacher_logprobs=teacher, student_logprobs=trainer.student())

            yield plant(
                "tail-dropped",
                name,
                f"{method} judged with {'all' if whole else 'the four best'} of the teacher's tokens",
                held_out,
                lambda _, name=name, method=method: overconfident(distilled(name, method, False)),
            )


PLANTS = [*scores(), *noise(), *traffic(), *decoding(), *skills(), *tails()]
