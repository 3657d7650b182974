"""Labels that count the vectors' places, or stand beside their logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.doctor.lab.plant import Plant
from tests.doctor.lab.trainers import LENGTH, P, Trainer, batch_of, plain_labels, shifted_loss
from tests.doctor.lab.training_plants import plant


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
                lambda name=name, switches=switches: Trainer(name, **switches),
                told_wrong,
                cheap=name == "llama" and variant in ("zeros over the vectors", "moved twice"),
            )


PLANTS = [*labels_misaligned()]
