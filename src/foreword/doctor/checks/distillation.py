"""Does a distilled student keep the teacher's tail: the tokens outside the list of the teacher's best?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foreword.doctor.finding import Finding
from foreword.doctor.probe_training import skipped

TOP = 20
"""Tokens that count as the teacher's list where all of its log-probabilities are known."""
LEAST_TAIL = 0.02
"""Mean mass of the teacher's tail below which there is nothing to lose."""
KEPT = 1 / 3
"""Share of the teacher's tail that a student trained with it keeps at least."""
SAME_LOSS = 1e-3


def tail_finding(teacher: Tensor, student: Tensor, loss: float | None) -> Finding:
    """Compare a student's log-probabilities [N, V] with a teacher's (-inf where not kept).

    A student that gives the tail less than a third of what the teacher does was trained without it; so was one whose
    `loss` (in nats per position) equals the cross-entropy over the list alone. A loss that equals the one with the tail
    clears it: such a student is only not there yet.
    """
    if teacher.shape != student.shape or teacher.ndim != 2:
        shapes = f"teacher {list(teacher.shape)}, student {list(student.shape)}"
        return skipped("teacher's tail", f"{shapes}, where both should be [N, V]")
    teacher, student = teacher.detach().double().cpu(), student.detach().double().cpu()
    listed = _listed(teacher)
    p, q = _with_tail(teacher, listed), _with_tail(student, listed)
    tails = float(p[:, -1].mean()), float(q[:, -1].mean())
    entropies = float(_entropy(p).mean()), float(_entropy(q).mean())
    without = -(p[:, :-1] * q[:, :-1].clamp_min(1e-30).log()).sum(1).mean()
    bucket = -(p[:, -1] * q[:, -1].clamp_min(1e-30).log()).mean()
    known = loss is not None and float(bucket) > 10 * SAME_LOSS * float(without)
    leaves_out = known and math.isclose(loss or 0.0, float(without), rel_tol=SAME_LOSS)
    counts_in = known and math.isclose(loss or 0.0, float(without + bucket), rel_tol=SAME_LOSS)
    lost = tails[1] < KEPT * tails[0] and not counts_in
    ok = tails[0] < LEAST_TAIL or not (lost or leaves_out)
    measured = (
        f"outside the teacher's list lie {tails[0]:.3g} of its mass and {tails[1]:.3g} of the student's; entropies, "
        f"the tail as one, {entropies[0]:.3g} and {entropies[1]:.3g} nats"
    )
    if loss is not None:
        measured += f"; the loss is {loss:.4g}, over the list alone {float(without):.4g}, "
        measured += f"with the tail {float(without + bucket):.4g}"
    numbers: dict[str, Any] = {"teacher_tail": tails[0], "student_tail": tails[1]}
    numbers |= {"teacher_entropy": entropies[0], "student_entropy": entropies[1], "loss": loss}
    return Finding(
        check="teacher's tail",
        ok=ok,
        measured=measured,
        expected=f"at least {KEPT:.0%} of the teacher's tail, and a loss that counts it",
        fix="Add the tail bucket -(1 - sum p) log(1 - sum q) to the loss, and train again.",
        fault="" if ok else "tail-dropped",
        numbers=numbers | {"loss_without_tail": float(without), "loss_with_tail": float(without + bucket)},
    )


def _listed(teacher: Tensor) -> Tensor:
    """Return which tokens [N, V] are the teacher's list: those that were kept, or its best where all were."""
    kept = teacher.isfinite()
    if not bool(kept.all()):
        return kept
    best = teacher.topk(min(TOP, teacher.shape[1]), dim=1).indices
    return torch.zeros_like(kept).scatter(1, best, True)


def _with_tail(logprobs: Tensor, listed: Tensor) -> Tensor:
    """Return probabilities [N, V + 1], those outside the list gathered in the last place."""
    listed_only = logprobs.exp() * listed
    return torch.cat([listed_only, (1.0 - listed_only.sum(1, keepdim=True)).clamp_min(0.0)], dim=1)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp_min(1e-30).log()).sum(1)
