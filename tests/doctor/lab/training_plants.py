"""Faults of training: labels, what trains, how far a step goes, and what the run's records tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreword.doctor.subjects import TrainingRun
from tests.doctor.lab.plant import Plant
from tests.doctor.lab.trainers import (
    LENGTH,
    SANE,
    P,
    Trainer,
    Tuned,
    batch_of,
    histories,
    plain_labels,
    shifted_loss,
)
from tests.tiny import tiny

STEPS = 40
PAIRS = [("llama", "prompt"), ("gpt2", "prompt"), ("qwen3", "kv"), ("gpt2", "kv")]


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


# Labels


def told_wrong(trainer: Trainer) -> tuple[float, float]:
    """Proof: logits that know each next token of [vectors ; text] for certain still get a loss from this trainer."""
    ids, _ = batch_of(0)
    whole = torch.cat([torch.full((len(ids), P), 98), ids], dim=1)  # no token stands at the vectors' places
    best = torch.roll(whole, -1, 1)
    logits = torch.nn.functional.one_hot(best, 99).float()[..., :97] * 50
    return float(trainer.compute_loss(logits, trainer.labels(ids, trainer.num_front))), 1.0


def zeros_in_front(ids: Tensor, num: int) -> Tensor:
    """Labels filled up with the padding id, which the loss counts."""
    labels = plain_labels(ids, num)
    labels[:, :num] = 0
    return labels


def too_late(ids: Tensor, num: int) -> Tensor:
    """Labels moved one place to the right by hand, although the loss moves them, too."""
    labels = torch.full((len(ids), num + ids.shape[1]), -100)
    labels[:, num + LENGTH - 2] = ids[:, -1]
    return labels


def whole_text(ids: Tensor, num: int) -> Tensor:
    """Labels of all of the text, filled up behind instead of in front: each stands P places early."""
    labels = torch.full((len(ids), num + ids.shape[1]), -100)
    labels[:, : ids.shape[1]] = ids
    return labels


def text_alone(ids: Tensor, num: int) -> Tensor:
    """Labels of the text alone, as long as the text."""
    return plain_labels(ids, 0)


def front_cut_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits fitted to the labels by dropping the last ones."""
    return shifted_loss(logits[:, : labels.shape[1]], labels)


def unshifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Each label by the logits of its own place, which have seen it."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def labels_misaligned() -> Iterator[Plant]:
    """Labels that count the vectors' places, or stand beside their logits."""
    makers: dict[str, dict[str, Any]] = {
        "zeros over the vectors": {"labels": zeros_in_front},
        "moved twice": {"labels": too_late},
        "filled up behind": {"labels": whole_text},
        "logits cut behind": {"labels": text_alone, "loss": front_cut_loss},
        "not moved": {"loss": unshifted_loss},
    }
    for name in ("llama", "gpt2", "qwen3"):
        for variant, switches in makers.items():
            yield plant(
                "labels-misaligned",
                name,
                "prompt",
                variant,
                lambda name=name, switches=switches: Trainer(name, **switches),  # type: ignore[misc]
                told_wrong,
                cheap=name == "llama" and variant in ("zeros over the vectors", "moved twice"),
            )


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
                lambda name=name, method=method, trained=trained: Trainer(name, method, trained=trained),  # type: ignore[misc]
                base_moves,
                cheap=variant == "norms" and (name, method) in PAIRS[:2],
            )
        yield plant(
            "base-trainable",
            name,
            method,
            "gradients alone",
            lambda name=name, method=method: Trainer(name, method, prepare=unfrozen),  # type: ignore[misc]
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
                lambda name=name, method=method, prepare=prepare: Trainer(name, method, prepare=prepare),  # type: ignore[misc]
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
            lambda name=name: Trainer(name, "kv", prepare=drop_cache),  # type: ignore[misc]
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
                lambda name=name, method=method: Trainer(name, method, relative_lr=SANE * 1000),  # type: ignore[misc]
                grows,
                before=before,
                cheap=name == "llama" and before == 0,
            )
            yield plant(
                "learning-rate",
                name,
                method,
                f"/ 1000{held}",
                lambda name=name, method=method: Trainer(name, method, relative_lr=SANE / 1000),  # type: ignore[misc]
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
                lambda name=name, method=method: Trainer(  # type: ignore[misc]
                    name, method, dtype=torch.bfloat16, relative_lr=SWALLOWED
                ),
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
                lambda name=name: drawn_wide(name, 0),  # type: ignore[misc]
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
            proof=lambda _, name=name: learns_less(name, "prompt")(drawn_wide(name, 0)),  # type: ignore[misc]
        )


# Records


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
    for name, method in (("llama", "prompt"), ("llama", "kv"), ("gpt2", "kv"), ("qwen3", "kv")):
        yield Plant(
            fault="overfit",
            architecture=name,
            make=lambda name=name, method=method: overtrained(name, method).subject(),  # type: ignore[misc]
            variant=f"{method} four rows, 120 steps",
            proof=lambda _, name=name, method=method: dev_rises(overtrained(name, method)),  # type: ignore[misc]
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


# Distillation


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
            make=lambda name=name, method=method: distilled(name, method, False).subject(),  # type: ignore[misc]
            variant=f"{method} top 4 of 97",
            proof=lambda _, name=name, method=method: overconfident(distilled(name, method, False)),  # type: ignore[misc]
        )


PLANTS = [
    *labels_misaligned(),
    *base_trainable(),
    *rows_frozen(),
    *checkpointing(),
    *learning_rate(),
    *updates_swallowed(),
    *random_init(),
    *overfit(),
    *not_finite(),
    *tail_dropped(),
]
