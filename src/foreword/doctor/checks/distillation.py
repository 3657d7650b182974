"""Does a distilled student keep the teacher's tail: the tokens outside the list of the teacher's best?"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foreword.doctor.finding import Finding
from foreword.doctor.probe_training import skipped

SIZES = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64)
"""Lengths of the list that are tried where all of the teacher's log-probabilities are known."""
LEAST_TAIL = 0.02
"""Mean mass of the teacher's tail below which there is nothing to lose, and what a student must lack of it at least."""
CERTAIN = 3.0
"""Standard errors, over positions, that a student's tail must lie below the teacher's."""
LEAST_PART = 1 / 3
"""Of the divergence within the list, what that of list against tail must come to: a student that is far from the
teacher anyhow, such as one that was not trained, proves nothing."""
SAME_LOSS = 1e-3
NAME = "teacher's tail"


@dataclass(frozen=True, slots=True)
class Tail:
    """Teacher and student beside each other, all tokens outside the teacher's list gathered in one place."""

    size: int
    """Tokens in the list, the most of any position."""
    teacher: float
    """Mean mass outside the list."""
    student: float
    missing: float
    """Mean of what the student has less there."""
    errors: float
    """`missing` in standard errors over positions."""
    by_mass: float
    """Divergence, in nats, of list against tail."""
    within: float
    """Divergence, in nats, within the list."""
    loss_without: float
    """Cross-entropy over the list alone."""
    loss_with: float
    """The same with the tail as one token."""

    @property
    def is_lost(self) -> bool:
        """Whether the student gives the tail too little, surely, and is otherwise near the teacher."""
        return self.missing > LEAST_TAIL and self.errors > CERTAIN and self.by_mass > LEAST_PART * self.within


def tail_finding(teacher: Tensor, student: Tensor, loss: float | None) -> Finding:
    """Compare a student's log-probabilities [N, V] with a teacher's (-inf where not kept).

    A student was trained without the tail where it gives the tail less than the teacher does, beyond chance over the
    positions, and where this is a fair part of its divergence: within the list it has learned what it was taught.
    Its `loss` (nats per position), where known, tells more: equal to the cross-entropy over the list alone it proves
    the fault, equal to that with the tail it clears it.
    """
    if teacher.shape != student.shape or teacher.ndim != 2 or len(teacher) < 2:
        shapes = f"teacher {list(teacher.shape)}, student {list(student.shape)}"
        return skipped(NAME, f"{shapes}, where both should be [N, V] of two or more positions")
    teacher, student = teacher.detach().double().cpu(), student.detach().double().cpu()
    tails = [_compare(teacher, student, listed) for listed in _lists(teacher)]
    tail = max(tails, key=lambda found: (found.is_lost, found.by_mass - found.within))
    verdict = "" if loss is None else _by_loss(tail, loss)
    lost = verdict == "without" or (tail.is_lost and verdict != "with")
    ok = tail.teacher < LEAST_TAIL or not lost
    entropies = [float(-(logprobs.exp() * logprobs.clamp_min(-100.0)).sum(1).mean()) for logprobs in (teacher, student)]
    measured = (
        f"outside the teacher's best {tail.size} lie {tail.teacher:.3g} of its mass and {tail.student:.3g} of the "
        f"student's ({tail.errors:.1f} standard errors less); divergence by this {tail.by_mass:.2g} nats, within the "
        f"list {tail.within:.2g}"
    )
    if bool(teacher.isfinite().all()):
        measured += f"; entropies {entropies[0]:.3g} and {entropies[1]:.3g} nats"
    if loss is not None:
        measured += f"; the loss is {loss:.4g}, over the list alone {tail.loss_without:.4g}, with the tail "
        measured += f"{tail.loss_with:.4g}"
    return Finding(
        check=NAME,
        ok=ok,
        measured=measured,
        expected="as much of the student's mass outside the list as of the teacher's, and a loss that counts it",
        fix="Add the tail bucket -(1 - sum p) log(1 - sum q) to the loss, and train again.",
        fault="" if ok else "tail-dropped",
        numbers=dataclasses.asdict(tail) | {"loss": loss},
    )


def _by_loss(tail: Tail, loss: float) -> str:
    """Say which cross-entropy a loss is: "with" the tail, "without", or "" where it is neither or both."""
    if tail.loss_with - tail.loss_without < 10 * SAME_LOSS * tail.loss_without:
        return ""
    for name, value in (("without", tail.loss_without), ("with", tail.loss_with)):
        if math.isclose(loss, value, rel_tol=SAME_LOSS):
            return name
    return ""


def _lists(teacher: Tensor) -> list[Tensor]:
    """Return which tokens [N, V] may be the teacher's list: those that were kept, or its best few where all were."""
    kept = teacher.isfinite()
    if not bool(kept.all()):
        return [kept]
    sizes = [size for size in SIZES if size < teacher.shape[1]]
    nothing = torch.zeros_like(kept)
    return [nothing.scatter(1, teacher.topk(size, dim=1).indices, True) for size in sizes] or [kept]


def _compare(teacher: Tensor, student: Tensor, listed: Tensor) -> Tail:
    p, q = teacher.exp() * listed, student.exp() * listed
    rest = [(1.0 - part.sum(1)).clamp(1e-12, 1.0) for part in (p, q)]
    lists = [(1.0 - part).clamp_min(1e-12) for part in rest]
    missing = rest[0] - rest[1]
    error = float(missing.std()) / math.sqrt(len(missing))
    logs = (q.clamp_min(1e-30)).log()
    whole = (p * (p.clamp_min(1e-30).log() - logs)).sum(1) + rest[0] * (rest[0] / rest[1]).log()
    by_mass = lists[0] * (lists[0] / lists[1]).log() + rest[0] * (rest[0] / rest[1]).log()
    without = float(-(p * logs).sum(1).mean())
    return Tail(
        size=int(listed.sum(1).max()),
        teacher=float(rest[0].mean()),
        student=float(rest[1].mean()),
        missing=float(missing.mean()),
        errors=float(missing.mean()) / max(error, 1e-9),
        by_mass=float(by_mass.mean()),
        within=float((whole - by_mass).mean()),
        loss_without=without,
        loss_with=without - float((rest[0] * rest[1].log()).mean()),
    )
