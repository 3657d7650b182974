"""Faults of training: what trains, and how far a step goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from foreword.doctor.subjects import TrainingRun
from tests.doctor.lab.plant import Plant
from tests.doctor.lab.trainers import (
    PAIRS,
    SANE,
    P,
    Trainer,
    Tuned,
    histories,
)
from tests.tiny import tiny

STEPS = 40


@cache
def sane_loss(name: str, method: str) -> float:
    """Return the loss that the right trainer reaches on fresh rows."""
    trainer = Trainer(name, method)
    trainer.run(STEPS)
    return trainer.judge()


def plant(
    fault: str,
    name: str,
    method: str,
    variant: str,
    make: Callable[[], Trainer],
    proof: Callable[[Trainer], tuple[float, float]],
    *,
    before: int = 0,
    cheap: bool = False,
    also: frozenset[str] = frozenset(),
    **handed: Any,
) -> Plant:
    """A trainer with a fault, held after `before` steps; the proof gets a fresh one."""

    def subject() -> TrainingRun:
        trainer = make()
        trainer.run(before)
        return trainer.subject(**handed)

    return Plant(
        fault=fault,
        architecture=name,
        make=subject,
        variant=f"{method} {variant}",
        proof=lambda _: proof(make()),
        cheap=cheap,
        also=also,
    )


def learns_less(name: str, method: str, margin: float = 0.3) -> Callable[[Trainer], tuple[float, float]]:
    """Proof: after the same steps the loss on fresh rows is higher than that of the right trainer."""

    def proof(trainer: Trainer) -> tuple[float, float]:
        trainer.run(STEPS)
        return trainer.judge() - sane_loss(name, method), margin

    return proof


# What trains


def everything(model: Tuned) -> list[nn.Parameter]:
    """All parameters, as `model.parameters()` gives them."""
    model.base.requires_grad_(True)
    return list(model.parameters())


def norms_too(model: Tuned) -> list[nn.Parameter]:
    """The vectors and all that is called norm: a pattern that matched too much."""
    chosen = [p for name, p in model.base.named_parameters() if "norm" in name or "ln_" in name]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return [model.vectors, *chosen]


def head_too(model: Tuned) -> list[nn.Parameter]:
    """The vectors and the output head."""
    head = model.base.get_output_embeddings().weight.requires_grad_(True)
    return [model.vectors, head]


def unfrozen(model: Tuned) -> None:
    """Gradients flow into the base, though no optimizer holds it."""
    model.base.requires_grad_(True)


def base_moves(trainer: Trainer) -> tuple[float, float]:
    """Proof: base tensors have other values after three steps."""
    before = {name: p.detach().clone() for name, p in trainer.model.base.named_parameters()}
    trainer.run(3)
    moved = sum(bool((p.detach() != before[name]).any()) for name, p in trainer.model.base.named_parameters())
    return float(moved), 0.5


def base_has_gradients(trainer: Trainer) -> tuple[float, float]:
    """Proof: base tensors hold gradients after a step."""
    trainer.run(1)
    return float(sum(p.grad is not None for p in trainer.model.base.parameters())), 0.5


def base_trainable() -> Iterator[Plant]:
    """All of the base, a part of it, or gradients for nothing."""
    for name, method in PAIRS:
        for variant, trained in (("all", everything), ("norms", norms_too), ("head", head_too)):
            yield plant(
                "base-trainable",
                name,
                method,
                variant,
                lambda name=name, method=method, trained=trained: Trainer(name, method, trained=trained),
                base_moves,
                cheap=variant == "norms" and (name, method) in PAIRS[:2],
            )
        yield plant(
            "base-trainable",
            name,
            method,
            "gradients alone",
            lambda name=name, method=method: Trainer(name, method, prepare=unfrozen),
            base_has_gradients,
        )


def masked_rows(model: Tuned) -> None:
    """A gradient mask left over from a pruning experiment."""
    keep = torch.ones_like(model.vectors)
    keep[P // 2 :] = 0
    model.vectors.register_hook(lambda gradient: gradient * keep)


class Cut(Tuned):
    """Half of the rows cut from the graph."""

    def rows(self) -> Tensor:
        """Return the first rows with gradients, the others without."""
        return torch.cat([self.vectors[: P // 2], self.vectors[P // 2 :].detach()]).float()


class Pruned(Tuned):
    """A prune mask that multiplies some rows by 0."""

    def rows(self) -> Tensor:
        """Return the rows times the mask."""
        keep = torch.ones(P, 1)
        keep[[1, 4, 6]] = 0
        return (self.vectors * keep).float()


def rows_stay(trainer: Trainer) -> tuple[float, float]:
    """Proof: some rows are where they were after ten steps, others are not."""
    before = trainer.model.vectors.detach().clone()
    trainer.run(10)
    moved = (trainer.model.vectors.detach() != before).flatten(1).any(1)
    return float(moved.any()) * float((~moved).sum()), 0.5


def rows_frozen() -> Iterator[Plant]:
    """A part of the rows without gradients."""
    for name, method in PAIRS:

        def recast(kind: type[Tuned]) -> Callable[[Tuned], None]:
            return lambda model: setattr(model, "__class__", kind)

        ways: dict[str, Callable[[Tuned], None]] = {
            "gradient mask": masked_rows,
            "cut from the graph": recast(Cut),
            "prune mask": recast(Pruned),
        }
        for variant, prepare in ways.items():
            yield plant(
                "rows-frozen",
                name,
                method,
                variant,
                lambda name=name, method=method, prepare=prepare: Trainer(name, method, prepare=prepare),
                rows_stay,
                cheap=variant == "gradient mask" and (name, method) in PAIRS[:2],
            )


def drop_cache(model: Tuned) -> None:
    """Checkpointing as transformers does it: no cache, the embeddings made to need gradients."""
    model.base.activation_checkpointing_enable() if hasattr(
        model.base, "activation_checkpointing_enable"
    ) else model.base.gradient_checkpointing_enable()
    model.base.train()
    model.checkpointed = True


def nothing_moves(trainer: Trainer) -> tuple[float, float]:
    """Proof: after ten steps the vectors are where they were."""
    before = trainer.model.vectors.detach().clone()
    trainer.run(10)
    return float(torch.equal(trainer.model.vectors.detach(), before)), 0.5


def checkpointing() -> Iterator[Plant]:
    """Keys and values in a cache that is thrown away: the loss does not know the vectors."""
    for name in ("llama", "gpt2", "qwen3"):
        yield plant(
            "checkpointing-drops-prefix",
            name,
            "kv",
            "in a training run",
            lambda name=name: Trainer(name, "kv", prepare=drop_cache),
            nothing_moves,
            cheap=name == "llama",
        )


# How far a step goes


def grows(trainer: Trainer) -> tuple[float, float]:
    """Proof: the vectors grow out of all proportion."""
    before = float(trainer.model.vectors.detach().norm())
    trainer.run(STEPS)
    return float(trainer.model.vectors.detach().norm()) / before, 20.0


def learning_rate() -> Iterator[Plant]:
    """A thousand times too large, or too small."""
    for name, method in [*PAIRS, ("mistral", "prompt"), ("bloom", "kv")]:
        for before in (0, 30):
            held = f", held after {before} steps" if before else ""
            yield plant(
                "learning-rate",
                name,
                method,
                f"x 1000{held}",
                lambda name=name, method=method: Trainer(name, method, relative_lr=SANE * 1000),
                grows,
                before=before,
                cheap=name == "llama" and before == 0,
            )
            yield plant(
                "learning-rate",
                name,
                method,
                f"/ 1000{held}",
                lambda name=name, method=method: Trainer(name, method, relative_lr=SANE / 1000),
                learns_less(name, method),
                before=before,
                cheap=name == "gpt2" and before == 0,
            )


SWALLOWED = 0.001
"""Of the root mean square: below half of bfloat16's spacing, above what a slow but sound run takes."""


def unchanged_share(trainer: Trainer) -> tuple[float, float]:
    """Proof: most numbers are bit for bit the same after three steps."""
    before = trainer.model.vectors.detach().clone()
    trainer.run(3)
    return float((trainer.model.vectors.detach() == before).float().mean()), 0.5


def updates_swallowed() -> Iterator[Plant]:
    """Parameters in bfloat16, with steps smaller than its spacing."""
    for name, method in [*PAIRS, ("bloom", "prompt")]:
        for before in (0, 20):
            held = f", held after {before} steps" if before else ""
            yield plant(
                "updates-swallowed",
                name,
                method,
                f"bfloat16{held}",
                lambda name=name, method=method: Trainer(name, method, dtype=torch.bfloat16, relative_lr=SWALLOWED),
                unchanged_share,
                before=before,
                cheap=before == 0 and (name, method) == PAIRS[0],
            )


def drawn_wide(name: str, seed: int) -> Trainer:
    """Return a trainer from N(0, 1), with the learning rate that is right for embeddings."""
    start = torch.randn(P, 64, generator=torch.Generator().manual_seed(seed))
    spread = float(tiny(name).embedding.weight.detach().square().mean().sqrt())
    return Trainer(name, start=start, relative_lr=SANE * spread, seed=seed)


def random_init() -> Iterator[Plant]:
    """Rows from N(0, 1) beside embeddings of 0.08."""
    for name in ("llama", "gpt2", "qwen3", "mistral", "opt"):
        for variant, handed in (("N(0, 1)", {}), ("N(0, 1), held after 20 steps", {"before": 20})):
            yield plant(
                "random-init",
                name,
                "prompt",
                variant,
                lambda name=name: drawn_wide(name, 0),
                learns_less(name, "prompt"),
                cheap=name == "llama" and not handed,
                **handed,
            )
    for name in ("llama", "gpt2"):

        def with_seeds(name: str = name) -> TrainingRun:
            trainer = drawn_wide(name, 0)
            trainer.run(STEPS)
            return trainer.subject(seeds=histories(lambda seed: drawn_wide(name, seed), STEPS))

        yield Plant(
            fault="random-init",
            architecture=name,
            make=with_seeds,
            variant="prompt N(0, 1), with seeds",
            proof=lambda _, name=name: learns_less(name, "prompt")(drawn_wide(name, 0)),
        )


PLANTS = [
    *base_trainable(),
    *rows_frozen(),
    *checkpointing(),
    *learning_rate(),
    *updates_swallowed(),
    *random_init(),
]
