"""Distillation from a context into vectors, with a bucket for the teacher's tail and without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from foreword.doctor.subjects import TrainingRun
from tests.doctor.lab.plant import Plant
from tests.doctor.lab.trainers import LENGTH, PAIRS, Trainer


class Distilled(Trainer):
    """A student with vectors in the place of a context, trained toward the teacher's most probable tokens."""

    def __init__(self, name: str, method: str, *, top: int = 4, tail: bool = False) -> None:
        super().__init__(name, method, relative_lr=0.1)
        self.top, self.tail = top, tail
        generator = torch.Generator().manual_seed(77)
        context = torch.randint(20, 97, (1, 12), generator=generator)
        self.ids = torch.randint(20, 97, (6, LENGTH), generator=generator)
        with torch.no_grad():
            whole = torch.cat([context.expand(6, -1), self.ids], dim=1)
            logits = self.base.model(input_ids=whole).logits[:, -4:]
        self.teacher = torch.log_softmax(logits.float(), -1).flatten(0, 1)
        self.kept = torch.full_like(self.teacher, float("-inf"))
        best = self.teacher.topk(top).indices
        self.kept.scatter_(1, best, self.teacher.gather(1, best))

    def student(self) -> Tensor:
        """Return the student's log-probabilities at the teacher's places."""
        return torch.log_softmax(self.model(self.ids)[:, -4:].float(), -1).flatten(0, 1)

    def distil_loss(self) -> Tensor:
        """Return the cross entropy over the kept tokens, with a bucket for the others or without."""
        student, known = self.student(), self.kept.isfinite()
        shares = self.kept.exp()
        loss = -(shares * student.masked_fill(~known, 0.0)).sum(-1)
        if self.tail:
            rest = 1 - shares.sum(-1)
            loss = loss - rest * torch.log1p(-(student.exp() * known).sum(-1).clamp(max=1 - 1e-6))
        return loss.mean()

    def step(self) -> float:
        """Take a step."""
        self.optimizer.zero_grad()
        loss = self.distil_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.taken += 1
        return float(loss.detach())

    def subject(self, **more: Any) -> TrainingRun:
        """Hand the distillation over."""
        given = {
            "labels": None,
            "input_ids": None,
            "logits": None,
            "loss": self.distil_loss,
            "teacher_logprobs": self.kept,
            "student_logprobs": self.student,
        }
        return super().subject(**{**given, **more})


@cache
def distilled(name: str, method: str, tail: bool) -> Distilled:
    """Return a distillation after 150 real steps."""
    trainer = Distilled(name, method, tail=tail)
    trainer.run(150)
    return trainer


def overconfident(trainer: Distilled) -> tuple[float, float]:
    """Proof: the student is surer than the teacher, in nats of entropy; with a tail it is so by 0.06 at most."""
    with torch.no_grad():
        student = trainer.student()
    entropies = [-(row.exp() * row).sum(-1).mean() for row in (trainer.teacher, student)]
    return float(entropies[0] - entropies[1]), 0.1


def tail_dropped() -> Iterator[Plant]:
    """Cross entropy over the top four alone."""
    for name, method in PAIRS:
        yield Plant(
            fault="tail-dropped",
            architecture=name,
            make=lambda name=name, method=method: distilled(name, method, False).subject(),
            variant=f"{method} top 4 of 97",
            proof=lambda _, name=name, method=method: overconfident(distilled(name, method, False)),
        )


PLANTS = [*tail_dropped()]
