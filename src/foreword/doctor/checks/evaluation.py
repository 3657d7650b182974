"""Checks of an evaluation: was the score earned as served, and does a change of it mean what is said of it?

See `foreword.doctor.subjects.Evaluation`; a check whose part is missing says so and is skipped.
"""

from __future__ import annotations

from collections.abc import Callable

from foreword.doctor.checks.distillation import tail_finding
from foreword.doctor.checks.evaluation_changes import check_change, check_decoding, check_traffic
from foreword.doctor.checks.evaluation_scores import check_claimed_score, check_leakage, check_sweep
from foreword.doctor.checks.evaluation_skills import check_composition, check_skills
from foreword.doctor.finding import Finding
from foreword.doctor.probe_training import skipped
from foreword.doctor.subjects import Evaluation


def check_tail(evaluation: Evaluation) -> Finding:
    """Give the distillation loss a bucket for all tokens that the teacher's top list leaves out."""
    if evaluation.teacher_logprobs is None or evaluation.student_logprobs is None:
        return skipped("teacher's tail", "the subject brings no teacher_logprobs, student_logprobs")
    return tail_finding(evaluation.teacher_logprobs, evaluation.student_logprobs, None)


CHECKS: tuple[Callable[[Evaluation], Finding], ...] = (
    check_leakage,
    check_decoding,
    check_traffic,
    check_change,
    check_composition,
    check_skills,
    check_tail,
    check_sweep,
    check_claimed_score,
)
"""In this order: what makes figures meaningless before what they mean, comparisons of reports before new answers."""
