"""Nearest tokens, and whether they explain anything: the loss of the prompt that they spell.

A vector's nearest token is a reading, not a meaning: a trained prompt can lie near any text, even one of another task,
at hardly any loss (Khashabi et al. 2022, arXiv:2112.08348). So the tokens are put in the vectors' place and the loss
is measured: of what the vectors gain, how much do the tokens keep?
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt, Vectors
from foreword.explain.ablate import answer_losses, block_of, form_without
from foreword.explain.effects import NUM_CONTROLS
from foreword.explain.estimate import Array, Estimate, Resamples
from foreword.explain.examples import Example
from foreword.explain.norms import VOCABULARY_PART, embedding_parts

FAITHFUL = 0.8
"""Of the gain. Tokens that keep less, at the interval's low end, are no explanation."""
NEIGHBOUR_SAMPLE = 64

FaithVerdict = Literal["faithful", "not faithful", "nothing to explain", "too few rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NearToken:
    """A token of the vocabulary near a vector."""

    token_id: int
    text: str | None
    """None without a tokenizer."""
    cosine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The tokens nearest to each vector."""

    near: tuple[tuple[NearToken, ...], ...]
    """Per vector, nearest first."""
    neighbour_cosine: float
    """Median cosine of a vocabulary token and its own nearest neighbour: what near means here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faithfulness:
    """How much of the vectors' gain the nearest tokens keep."""

    discrete: Estimate
    """Loss behind the nearest tokens."""
    random: Estimate
    """Loss behind random tokens."""
    score: Estimate | None
    """(without - discrete) / (without - trained); None where the vectors gain nothing for certain."""
    random_score: Estimate | None
    verdict: FaithVerdict


def read_tokens(base: FrozenModel, vectors: Vectors, count: int = 3) -> Reading | None:
    """Return the `count` tokens nearest to each vector by cosine; None for `kv`, whose rows lie in no token's space.

    A prompt's rows are compared with input embeddings, a hidden-state prefix's layer 0 with what tokens are when they
    enter layer 0 at the vector's position (scale, positions and normalisation of the family included).
    """
    if isinstance(vectors, SoftKV):
        return None
    count = min(count, base.spec.vocab_size)
    rows, groups = _rows_by_position(base, vectors)
    best: dict[int, tuple[list[float], list[int]]] = {}
    for position, members in groups.items():
        table = embedding_parts(base) if isinstance(vectors, SoftPrompt) else _input_parts(base, position)
        values, ids = _nearest(rows[members].to(base.device), table, count)
        best |= {m: (values[place].tolist(), ids[place].tolist()) for place, m in enumerate(members)}
    near = tuple(
        tuple(
            NearToken(token_id=token, text=_text(base.tokenizer, token), cosine=cosine)
            for cosine, token in zip(*best[index], strict=True)
        )
        for index in range(len(rows))
    )
    spread = torch.linspace(0, base.spec.vocab_size - 1, min(NEIGHBOUR_SAMPLE, base.spec.vocab_size)).long()
    neighbours, _ = _nearest(base.embed(spread.to(base.device)).detach(), embedding_parts(base), 2)
    return Reading(near=near, neighbour_cosine=float(neighbours[:, -1].median()))


def _rows_by_position(base: FrozenModel, vectors: SoftPrompt | SoftPrefix) -> tuple[Tensor, dict[int, list[int]]]:
    """Return the rows to be read, and which of them are compared with tokens as they are at which position."""
    if isinstance(vectors, SoftPrompt):
        rows = vectors.vectors if vectors.after is None else torch.cat([vectors.vectors, vectors.after])
        return rows, {0: list(range(len(rows)))}
    positions = block_of(vectors).soft_positions()
    differs = not torch.equal(_first_inputs(base, [0], 0), _first_inputs(base, [0], 1))  # learned positions
    if differs:
        return vectors.vectors[0], {position: [index] for index, position in enumerate(positions)}
    return vectors.vectors[0], {positions[0]: list(range(len(positions)))}


def measure_faithfulness(
    base: FrozenModel,
    vectors: SoftPrompt | SoftPrefix,
    reading: Reading,
    examples: Sequence[Example],
    sums: Mapping[str, np.ndarray],
    draws: Resamples,
) -> Faithfulness:
    """Return the loss with the nearest tokens in the vectors' place, beside random tokens; `sums` are `row_losses`'.

    A prefix's tokens stand as tokens too: in the input, so that all layers follow from them.
    """
    discrete = _token_losses(base, vectors, [tokens[0].token_id for tokens in reading.near], examples)
    num = len(reading.near)
    random = np.stack(
        [
            _token_losses(base, vectors, torch.randint(base.spec.vocab_size, (num,), generator=g).tolist(), examples)
            for g in (torch.Generator().manual_seed(seed) for seed in range(NUM_CONTROLS))
        ]
    ).mean(0)

    def kept(without: Array, tokens: Array, trained: Array) -> Array:
        return (without - tokens) / (without - trained)

    gain = draws.difference(sums["without"], sums["trained"])
    score = random_score = None
    verdict: FaithVerdict = "too few rows" if gain.low is None else "nothing to explain"
    if gain.is_above_zero:
        score = draws.estimate(kept, sums["without"], discrete, sums["trained"])
        random_score = draws.estimate(kept, sums["without"], random, sums["trained"])
        better = draws.difference(random, discrete).is_above_zero
        holds = score.low is not None and score.low >= FAITHFUL and better
        verdict = "faithful" if holds else "not faithful"
    return Faithfulness(
        discrete=draws.mean(discrete),
        random=draws.mean(random),
        score=score,
        random_score=random_score,
        verdict=verdict,
    )


def _token_losses(
    base: FrozenModel, vectors: SoftPrompt | SoftPrefix, ids: Sequence[int], examples: Sequence[Example]
) -> np.ndarray:
    with torch.no_grad():
        rows = base.embed(torch.tensor(ids, device=base.device)).cpu()
    block = block_of(vectors)
    behind = isinstance(vectors, SoftPrompt) and vectors.after is not None
    prompt = SoftPrompt(rows[: block.num_soft], block, rows[block.num_soft :] if behind else None)
    return answer_losses(base, form_without(base, prompt), examples).numpy()


def _nearest(rows: Tensor, parts: Iterable[tuple[int, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Return the best cosines [n, count] and ids [n, count] of `rows` over the vocabulary's parts."""
    unit = nn.functional.normalize(rows.detach().float(), dim=-1)
    values, ids = torch.zeros(len(rows), 0, device=rows.device), torch.zeros(len(rows), 0, device=rows.device).long()
    with torch.no_grad():
        for start, table in parts:
            cosines = unit @ nn.functional.normalize(table.float(), dim=-1).T
            top = cosines.topk(min(count, cosines.shape[1]), dim=-1)
            values, ids = torch.cat([values, top.values], 1), torch.cat([ids, top.indices + start], 1)
            best = values.topk(min(count, values.shape[1]), dim=-1)
            values, ids = best.values, ids.gather(1, best.indices)
    return values.cpu(), ids.cpu()


class _ReachedLayerError(Exception):
    """Raised by a hook to stop a forward at layer 0."""


def _input_parts(base: FrozenModel, position: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, base.spec.vocab_size, VOCABULARY_PART):
        yield start, _first_inputs(base, range(start, min(start + VOCABULARY_PART, base.spec.vocab_size)), position)


def _first_inputs(base: FrozenModel, ids: Sequence[int], position: int) -> Tensor:
    """Return what single tokens at `position` are at the entrance of layer 0 [n, D]."""
    from transformers import DynamicCache

    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[:, 0])
        raise _ReachedLayerError

    handle = base.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            tokens = torch.tensor(list(ids), device=base.device)[:, None]
            where = torch.full_like(tokens, position)
            embeds = base.embed(tokens)
            base.run_decoder(embeds, positions=where, cache=DynamicCache(), mask=torch.ones_like(tokens))
    except _ReachedLayerError:
        pass
    finally:
        handle.remove()
    return seen[0]


def _text(tokenizer: Any, token: int) -> str | None:
    if tokenizer is None:
        return None
    return str(tokenizer.decode([token])) if token < len(tokenizer) else None
