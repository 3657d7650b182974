"""How long the vectors are, against what the base itself holds at the same place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftPrefix, SoftPrompt, Vectors
from foreword.explain.ablate import Form, block_of, text_batch
from foreword.explain.examples import Example

TEXT_ROWS = 8
"""Rows whose layer inputs, keys and values the vectors are compared with."""
VOCABULARY_PART = 8192

Kind = Literal["embedding", "layer input", "key", "value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormComparison:
    """Euclidean norms of the vectors and of what they are compared with."""

    kind: Kind
    layer: int | None
    """None for embeddings."""
    median: float
    """Of the vectors; of keys and values over all heads."""
    least: float
    largest: float
    reference: float
    """Median of the vocabulary's embeddings, or of real text in the same layer."""
    percentile: float
    """How much of the reference lies below the vectors' median, in percent."""

    @property
    def ratio(self) -> float | None:
        """median / reference; None where the reference is zero."""
        return self.median / self.reference if self.reference else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """All comparisons that the method allows."""

    comparisons: tuple[NormComparison, ...]
    vectors: tuple[tuple[float, float], ...]
    """Of a prompt, each vector's norm and its percentile among the vocabulary's; else empty."""


def measure_norms(base: FrozenModel, vectors: Vectors, form: Form, examples: Sequence[Example]) -> Norms:
    """Return the norms: of a prompt's rows against the vocabulary, of a prefix's against layer inputs of real text, of
    keys and values (a prompt's and a prefix's as they compile) against those of real text.
    """
    found: list[NormComparison] = []
    each: tuple[tuple[float, float], ...] = ()
    inputs, keys, values = _text_states(base, form, examples[:TEXT_ROWS])
    if isinstance(vectors, SoftPrompt):
        rows = vectors.vectors if vectors.after is None else torch.cat([vectors.vectors, vectors.after])
        norms, vocabulary = rows.float().norm(dim=-1), vocabulary_norms(base)
        each = tuple((float(norm), _percentile(norm, vocabulary)) for norm in norms)
        found.append(_compare("embedding", None, norms, vocabulary))
    if isinstance(vectors, SoftPrefix):
        for layer, (own, text) in enumerate(zip(vectors.vectors, inputs, strict=True)):
            found.append(_compare("layer input", layer, own.float().norm(dim=-1), text.norm(dim=-1)))
    soft = block_of(vectors).soft_positions()
    kinds: list[tuple[Kind, Sequence[Tensor], list[Tensor]]] = [
        ("key", form.keys, keys),
        ("value", form.values, values),
    ]
    for kind, own_layers, text_layers in kinds:
        for layer, (own, text) in enumerate(zip(own_layers, text_layers, strict=True)):
            if soft:
                found.append(_compare(kind, layer, own[:, soft].float().norm(dim=-1).cpu(), text.norm(dim=-1)))
    return Norms(comparisons=tuple(found), vectors=each)


def vocabulary_norms(base: FrozenModel) -> Tensor:
    """Return the norm of every token's input embedding [V], float32 on the CPU."""
    with torch.no_grad():
        return torch.cat([rows.float().norm(dim=-1).cpu() for _, rows in embedding_parts(base)])


def embedding_parts(base: FrozenModel) -> Iterator[tuple[int, Tensor]]:
    """Yield (first id, rows [n, D]) over the vocabulary, as `inputs_embeds` takes them."""
    for start in range(0, base.spec.vocab_size, VOCABULARY_PART):
        ids = torch.arange(start, min(start + VOCABULARY_PART, base.spec.vocab_size), device=base.device)
        yield start, base.embed(ids)


def _compare(kind: Kind, layer: int | None, own: Tensor, reference: Tensor) -> NormComparison:
    own, reference = own.flatten(), reference.flatten()
    return NormComparison(
        kind=kind,
        layer=layer,
        median=float(own.median()),
        least=float(own.min()),
        largest=float(own.max()),
        reference=float(reference.median()),
        percentile=_percentile(own.median(), reference),
    )


def _percentile(value: Tensor, reference: Tensor) -> float:
    return 100.0 * float((reference < value.to(reference.device)).float().mean())


def _text_states(
    base: FrozenModel, form: Form, examples: Sequence[Example]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return every layer's inputs [tokens, D], keys and values [Hkv, tokens, Dh] of real text behind the block."""
    inputs: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).detach())

    batch = text_batch(base, form, examples)
    real = batch.is_text
    with ExitStack() as hooks, torch.no_grad():
        for layer in base.layers:
            handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
            hooks.callback(handle.remove)
        base.run_decoder(batch.embeds, positions=batch.positions, cache=batch.cache, mask=batch.mask)
    num = len(form.is_open)
    pairs = [
        [part[:, :, num:].transpose(1, 2)[real].transpose(0, 1).float().cpu() for part in (layer.keys, layer.values)]
        for layer in batch.cache.layers
    ]
    return (
        [hidden[real].float().cpu() for hidden in inputs],
        [keys for keys, _ in pairs],
        [values for _, values in pairs],
    )
