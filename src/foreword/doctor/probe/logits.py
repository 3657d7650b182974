"""Logits of an implementation for rows of text, single and padded, and how far two sets of them lie apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from foreword.core.model import FrozenModel
from foreword.doctor.subjects import Forward
from foreword.errors import ForewordError

Side = Literal["left", "right"]
LENGTHS = (11, 7, 4)
"""Text tokens of the probe rows; different, so that a batch of them is padded."""


NEW_TOKENS = 4
"""Tokens of a probe generation: the prefill's, and several decoded behind it."""


class ProbeFailed(ForewordError):
    """A measurement could not be made on what is examined."""


def text_rows(base: FrozenModel, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Return rows of token ids drawn from the vocabulary, without special tokens."""
    config = base.config
    special = set(base.stop_ids) | {getattr(config, name, None) for name in ("pad_token_id", "bos_token_id")}
    if base.tokenizer is not None:
        special |= set(base.tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    pool = [token for token in range(min(base.spec.vocab_size, 5000)) if token not in special]
    return [[pool[i] for i in torch.randint(len(pool), (n,), generator=generator).tolist()] for n in lengths]


def padded(base: FrozenModel, rows: Sequence[Sequence[int]], side: Side) -> tuple[Tensor, Tensor]:
    """Return ids and mask [B, T] of rows padded at one side with the base's padding token (0 where it has none)."""
    fill = getattr(base.config, "pad_token_id", None) or 0
    longest = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        pad, ones = [fill] * (longest - len(row)), [1] * len(row)
        ids.append([*pad, *row] if side == "left" else [*row, *pad])
        mask.append([*([0] * len(pad)), *ones] if side == "left" else [*ones, *([0] * len(pad))])
    return torch.tensor(ids, device=base.device), torch.tensor(mask, device=base.device)


def run_rows(
    forward: Forward, base: FrozenModel, rows: Sequence[Sequence[int]], side: Side = "left"
) -> tuple[list[Tensor], int]:
    """Run rows as one batch; return the logits [T, V] behind each row's own tokens, float32, and W, the logits' width.

    Logits wider than the ids are read from their end, where the text stands. Raises ProbeFailed where the forward
    raises, or returns no logits.
    """
    ids, mask = padded(base, rows, side)
    try:
        logits = forward(ids, mask)
    except Exception as error:  # somebody else's code
        shown = f"{len(rows)} rows padded at the {side}" if len(rows) > 1 else f"one row of {ids.shape[1]} tokens"
        raise ProbeFailed(f"forward raised {type(error).__name__} on {shown}: {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] < ids.shape[1]:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ProbeFailed(f"forward returned {found} for ids of {list(ids.shape)}, not logits [B, T, V]")
    text = logits.detach()[:, logits.shape[1] - ids.shape[1] :].float()
    return [part[keep.bool()] for part, keep in zip(text, mask.to(text.device), strict=True)], int(logits.shape[1])


def generate_rows(
    generate: Callable[[Tensor, Tensor, int], Tensor] | None,
    base: FrozenModel,
    rows: Sequence[Sequence[int]],
    side: Side = "left",
) -> list[list[int]]:
    """Return the new tokens of each row, generated as one batch. Raises ProbeFailed where that raises."""
    if generate is None:
        raise ProbeFailed("generation needs `generate`")
    ids, mask = padded(base, rows, side)
    try:
        with torch.no_grad():
            found = generate(ids, mask, NEW_TOKENS)
    except Exception as error:  # somebody else's code
        raise ProbeFailed(f"generate raised {type(error).__name__} on {len(rows)} rows: {error}") from error
    if tuple(found.shape) != (len(rows), NEW_TOKENS):
        raise ProbeFailed(f"generate returned {list(found.shape)} for {len(rows)} rows of {NEW_TOKENS} new tokens")
    tokens: list[list[int]] = found.tolist()
    return tokens


def divergences(expected: Tensor, found: Tensor) -> Tensor:
    """Return KL(expected || found) [T] in nats from logits [T, V]; infinity where `found` is not finite."""
    size = min(expected.shape[-1], found.shape[-1])  # some bases pad their vocabulary
    p = torch.log_softmax(expected[:, :size].double(), dim=-1)
    q = torch.log_softmax(found[:, :size].to(expected.device).double(), dim=-1)
    kl = (p.exp() * (p - q).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)).sum(-1).clamp_min(0.0)
    return torch.where(found.isfinite().all(-1).to(kl.device), kl, torch.inf)
