"""Faults that a run's records tell: rows learnt by heart, and numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from tests.doctor.lab.plant import Plant
from tests.doctor.lab.trainers import PAIRS, Trainer, batch_of
from tests.doctor.lab.training_plants import plant


class FewRows(Trainer):
    """A run over the same few rows again and again, with answers that follow no rule: nothing to learn but the rows."""

    def batch(self, seed: int) -> Tensor:
        """Return four rows with drawn answers."""
        ids, _ = batch_of(seed, 4)
        drawn = torch.randint(0, 20, (4,), generator=torch.Generator().manual_seed(seed))
        ids[:, -1] = drawn
        return ids

    def step(self) -> float:
        """Take a step on the four rows."""
        self.optimizer.zero_grad()
        loss = self.loss_on(self.batch(0))
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.taken += 1
        return float(loss.detach())

    def run_watched(self, steps: int, every: int = 10) -> None:
        """Take steps; keep the loss on rows of the same kind that are not trained on."""
        for _ in range(steps):
            loss = self.step()
            self.history.append({"step": self.taken, "train_loss": loss, "lr": self.lr})
            if self.taken % every == 0:
                with torch.no_grad():
                    self.history[-1]["dev_loss"] = float(
                        torch.stack([self.loss_on(self.batch(seed)) for seed in (1, 2, 3, 4)]).mean()
                    )


@cache
def overtrained(name: str, method: str) -> FewRows:
    """Return a run that went on long after the dev loss had turned."""
    trainer = FewRows(name, method, relative_lr=0.3)
    trainer.run_watched(120)
    return trainer


def dev_rises(trainer: Trainer) -> tuple[float, float]:
    """Proof: the last dev loss lies above the best, while the training loss fell."""
    dev = [record["dev_loss"] for record in trainer.history if "dev_loss" in record]
    fell = trainer.history[-1]["train_loss"] < 0.7 * trainer.history[0]["train_loss"]
    return (dev[-1] - min(dev)) * fell, 0.2


def overfit() -> Iterator[Plant]:
    """Real runs over four rows, far past their best."""
    for name, method in (("llama", "prompt"), ("opt", "kv"), ("gpt2", "kv"), ("qwen3", "kv")):
        yield Plant(
            fault="overfit",
            architecture=name,
            make=lambda name=name, method=method: overtrained(name, method).subject(),
            variant=f"{method} four rows, 120 steps",
            proof=lambda _, name=name, method=method: dev_rises(overtrained(name, method)),
        )


def half_precision(trainer: Trainer) -> tuple[float, float]:
    """Proof: the vectors or the loss are not finite."""
    with torch.no_grad():
        loss = trainer.loss_on(batch_of(0)[0])
    finite = bool(loss.isfinite()) and bool(trainer.model.vectors.isfinite().all())
    return float(not finite), 0.5


def not_finite() -> Iterator[Plant]:
    """A run that went on after a NaN."""
    for name, method in PAIRS[:3]:

        def poisoned(name: str = name, method: str = method) -> Trainer:
            trainer = Trainer(name, method)
            trainer.run(3)
            with torch.no_grad():
                trainer.model.vectors[2, 3] = float("nan")
            return trainer

        yield plant("not-finite", name, method, "one NaN", poisoned, half_precision, cheap=name == "llama")


PLANTS = [*overfit(), *not_finite()]
