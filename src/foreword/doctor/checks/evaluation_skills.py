"""Checks of skills beside the one that was trained: do they suffer, and do joined prefixes keep theirs?"""

from __future__ import annotations

from typing import Any

from foreword.doctor.finding import Finding
from foreword.doctor.probe_training import skipped
from foreword.doctor.subjects import Evaluation
from foreword.errors import ForewordError
from foreword.eval.paired import compare_reports
from foreword.eval.report import EvalReport

LEAST_LOSS = 0.02
"""What a skill must lose, besides being told from 0 by the test: a hundredth hurts nobody."""


def check_skills(evaluation: Evaluation) -> Finding:
    """Train with a penalty on the divergence from the base, use fewer vectors, or route other requests to the base.

    Skills that were not trained, with the vectors and without, compared row by row.
    """
    if not evaluation.skills:
        return skipped("other skills", "reports of other skills with the vectors and without")
    return _compared(
        "other skills",
        evaluation.skills,
        ("with the vectors", "without"),
        "side-effects",
        "Train with a KL penalty to the base on general text, or keep other requests on the base.",
    )


def check_composition(evaluation: Evaluation) -> Finding:
    """Train prefixes with others as distractors before they are joined, or do not join them.

    Each task's score with its own prefix alone, and with all of them in one sequence, compared row by row.
    """
    both = sorted(evaluation.alone.keys() & evaluation.joined.keys())
    if not both:
        return skipped("composition", "reports of the same tasks with prefixes alone and joined")
    return _compared(
        "composition",
        {name: (evaluation.joined[name], evaluation.alone[name]) for name in both},
        ("joined", "alone"),
        "composed-untrained",
        "Serve one prefix per request, or train them with changing distractors in front (arXiv:2606.04557).",
    )


def _compared(check: str, pairs: Any, words: tuple[str, str], fault: str, fix: str) -> Finding:
    lines, worse, numbers = [], [], {}
    for name, (mine, other) in pairs.items():
        try:
            found = _change(mine, other)
        except ForewordError as error:
            lines.append(f"{name}: {error.message}")
            continue
        lines.append(f"{name} {found['score']:.3f} {words[0]}, {found['other']:.3f} {words[1]}, {found['told']}")
        numbers[name] = found
        if found["verdict"] == "worse" and found["difference"] < -LEAST_LOSS:
            worse.append(name)
    if not numbers:
        return skipped(check, "; ".join(lines))
    return Finding(
        check=check,
        ok=not worse,
        measured="; ".join(lines),
        expected=f"no skill that loses more than {LEAST_LOSS}, beyond chance",
        fix=fix,
        fault=fault if worse else "",
        numbers=numbers | {"worse": worse},
    )


def _change(mine: EvalReport, other: EvalReport) -> dict[str, Any]:
    result = compare_reports(mine, other)
    low, high = result.interval
    return {
        "score": result.score_a,
        "other": result.score_b,
        "difference": result.difference,
        "interval": [low, high],
        "verdict": result.verdict,
        "told": f"{result.difference:+.3f} [{low:+.3f}, {high:+.3f}]",
    }
