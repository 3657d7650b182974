"""The memory of one training step on one GPU, by parts. Imports no torch.

For pre-norm decoders with a gated feed-forward, compiled layers and rows packed without padding (docs/large-bases.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from foreword.advise.bases.shapes import BaseShape

BYTES = 2
"""Bytes of a weight and of an activation: bfloat16."""
OPTIMISED = 16
"""Bytes of a trained number: value, gradient and AdamW's two averages in float32."""
LOGIT = 14
"""Bytes of a logit at a target: bfloat16, float32, its log-softmax and its gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """Bytes on each GPU."""

    weights: float
    """The GPU's share of the layers, embeddings and head whole; and, where sharded, two layers gathered."""
    activations: float
    """What the backward pass needs of the tokens of this GPU's rows."""
    logits: float
    vectors: float
    """Vectors, their gradients and optimizer states, of all tasks: the same on every GPU."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.activations + self.logits + self.vectors


def step_memory(
    base: BaseShape, *, tokens: int, targets: int, vectors: int, gpus: int = 1, recompute: bool = False
) -> StepMemory:
    """Return the memory of a step over `tokens` text tokens and blocks, `targets` of them learned.

    Rows are shared out evenly; `vectors` counts the trained numbers of all tasks; `recompute` keeps the inputs of
    layers only, and one layer's activations while that layer is computed again.
    """
    outside = base.vocab_size * base.hidden_size
    layers = base.num_parameters - outside * untied(base)
    gathered = 2 * layers / base.num_layers if gpus > 1 else 0
    saved, mine = saved_numbers(base), tokens / gpus
    kept = base.num_layers * base.hidden_size + saved if recompute else base.num_layers * saved
    return StepMemory(
        weights=BYTES * (layers / gpus + outside * untied(base) + gathered),
        activations=BYTES * mine * kept,
        logits=LOGIT * targets / gpus * base.vocab_size,
        vectors=OPTIMISED * vectors,
    )


def saved_numbers(base: BaseShape) -> int:
    """Return the numbers that a layer saves of a token: 2·F + 2·H·Dh + 2·Hkv·Dh + 2·D.

    Gate and up of the feed-forward, queries and attention's output, keys and values, the inputs of both norms. Frozen
    weights need no inputs of their products.
    """
    layer = base.layers[0]
    heads = base.num_heads * layer.head_dim
    return 2 * base.ffn_size + 2 * heads + layer.elements_per_token + 2 * base.hidden_size


def untied(base: BaseShape) -> int:
    """Return how many vocabulary matrices there are: 1 where embeddings and head are one, else 2."""
    inner = sum(linear.num_parameters for linear in base.linears)
    return 2 if base.num_parameters - inner > 1.5 * base.vocab_size * base.hidden_size else 1
