"""What doctor examines, as plain data: an implementation, a training run, an evaluation.

An artefact is a path, a server a URL; those have rooms of their own. A check asks only for what it needs, and says
what was missing where a subject does not bring it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreword.core.spec import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from foreword.core.model import FrozenModel
    from foreword.core.prompt import Vectors

Forward = Callable[["Tensor", "Tensor"], "Tensor"]
"""(ids [B, T], mask [B, T] with 1 at real tokens; padding at either side) -> logits [B, T, V], or [B, P + T, V]."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A model with vectors in it, whoever wrote it; nothing of it is changed by being examined."""

    declared: Method
    """What its maker says it is: prompt, prefix (hidden states in every layer) or kv."""
    num_vectors: int
    """P, as declared."""
    base: FrozenModel
    """The base without vectors, to compare with; it may share its modules with `model`."""
    forward: Forward
    """One forward with the vectors, as in production, text only given."""
    model: nn.Module | None = None
    """The module that runs inside `forward`, so that its layers can be watched; None: `forward` is a black box."""
    vectors: Vectors | Mapping[str, Tensor] | None = None
    """What was trained; with `Vectors`, the exact reference is computed from them and `base`."""
    training_forward: Forward | None = None
    """The same forward as it runs while training (training mode, gradient checkpointing as set)."""
    generate: Callable[[Tensor, Tensor, int], Tensor] | None = None
    """(ids [B, T], mask [B, T], n) -> the n new token ids [B, n], greedy, without stopping at an end token."""
    turns: Callable[[Sequence[Sequence[int]]], Tensor] | None = None
    """Token ids of successive turns, given one after the other with the cache kept between them -> the logits [V]
    behind the last token of the last turn."""
    probes: Sequence[Mapping[str, Any]] = ()
    """Conformance probes made where the vectors were trained; see foreword.core.conformance."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A trainer held between two steps. Checks that take steps put every tensor and the optimizer back afterwards."""

    model: nn.Module
    """Everything that has parameters: the base, and the vectors or the modules that make them."""
    vectors: Mapping[str, Tensor]
    """The tensors that should train, by name, with their P rows along dimension 0 (or 1 where `layered`)."""
    num_vectors: int
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    """The training loss of one fixed batch, with gradients, without a step."""
    step: Callable[[], float]
    """One whole optimizer step on the next batch; returns its loss."""
    layered: bool = False
    """Whether `vectors` are [L, P, ...]."""
    labels: Tensor | None = None
    """Labels [B, W] of the fixed batch, as the loss gets them, -100 where none."""
    input_ids: Tensor | None = None
    """Text ids [B, T] of the same batch."""
    logits: Callable[[], Tensor] | None = None
    """Logits [B, W, V] of the fixed batch, as the loss gets them (before any shift inside the loss)."""
    vocabulary: Tensor | None = None
    """Embedding rows [V, D] of the base, for norms."""
    history: Sequence[Mapping[str, float]] = ()
    """The run's records so far: step, train_loss, and where there are any dev_loss, dev_metric, lr."""
    seeds: Mapping[int, Sequence[Mapping[str, float]]] | None = None
    """Histories of the same run under other seeds, by seed."""
