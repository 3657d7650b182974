"""Loss and gradients of one step: every run's block once, all rows in shared forwards, logits at targets only.

The block's keys and values are cut from the graph, gathered gradients from all micro-batches that attend to them, and
carried back through the block once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foreword.core.compile import compute_blocks
from foreword.core.forward import forward_rows
from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix, SoftPrompt
from foreword.train.data import Example, SoftTargets
from foreword.train.tuners import Tuner

TINY = 1e-6
"""The least probability of the bucket of other tokens: about what float32 leaves of 1 - p."""
MICRO_TOKENS = 4096
"""Padded tokens of one forward at most; longer steps are cut into micro-batches with the same gradients."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One run's rows in one step."""

    tuner: Tuner
    rows: Sequence[Example]

    @property
    def num_targets(self) -> int:
        """Learned tokens, over which the run's loss is the mean."""
        return sum(len(row.learned) for row in self.rows)


def step_gradients(base: FrozenModel, batches: Sequence[Batch], micro_tokens: int = MICRO_TOKENS) -> list[float]:
    """Add each run's gradient to its tuner's parameters; return each run's mean loss over its target tokens in nats.

    A row's loss depends on its own run's vectors only, so runs share forwards without sharing gradients.
    """
    vectors = [batch.tuner.vectors() for batch in batches]
    blocks = compute_blocks(base, [(v, b.tuner.block) for v, b in zip(vectors, batches, strict=True)])
    outputs, leaves, prefixes = [], [], []
    for made, layers in zip(vectors, blocks, strict=True):
        after = made.after if isinstance(made, SoftPrompt) else None
        tensors = [tensor[0] for pair in layers for tensor in pair] + ([] if after is None else [after])
        cut = [tensor.detach().requires_grad_() for tensor in tensors]
        outputs += tensors
        leaves += cut
        pairs = cut[: 2 * len(layers)]
        prefixes.append(KVPrefix(tuple(pairs[0::2]), tuple(pairs[1::2]), "", after=None if after is None else cut[-1]))
    losses = torch.zeros(len(batches), dtype=torch.float64)
    weights = [1.0 / batch.num_targets for batch in batches]
    rows = [(index, row) for index, batch in enumerate(batches) for row in batch.rows]
    for part in micro_batches(rows, micro_tokens):
        runs, losses_per_token = target_losses(base, part, prefixes)
        scale = torch.tensor([weights[run] for run in runs], device=losses_per_token.device)
        weighted = losses_per_token * scale
        torch.autograd.backward(weighted.sum())
        losses.index_add_(0, torch.tensor(runs), weighted.detach().cpu().double())
    known = [(output, leaf.grad) for output, leaf in zip(outputs, leaves, strict=True) if leaf.grad is not None]
    torch.autograd.backward([output for output, _ in known], [gradient for _, gradient in known])
    return losses.tolist()


def mean_losses(base: FrozenModel, items: Sequence[tuple[KVPrefix | None, Sequence[Example]]]) -> list[float]:
    """Return each prefix's mean loss over its rows' target tokens in nats, without gradients.

    None is no prefix: rows that are whole by themselves.
    """
    totals = torch.zeros(len(items), dtype=torch.float64)
    rows = [(index, row) for index, (_, examples) in enumerate(items) for row in examples]
    prefixes = [prefix for prefix, _ in items]
    with torch.no_grad():
        for part in micro_batches(rows, MICRO_TOKENS):
            runs, losses = target_losses(base, part, prefixes)
            totals.index_add_(0, torch.tensor(runs), losses.cpu().double())
    counts = [sum(len(row.learned) for row in examples) for _, examples in items]
    return [total / count for total, count in zip(totals.tolist(), counts, strict=True)]


def micro_batches(rows: Sequence[tuple[int, Example]], tokens: int) -> Iterator[list[tuple[int, Example]]]:
    """Cut (run, row) pairs into parts of similar length and at most `tokens` padded tokens, one row at least."""
    part: list[tuple[int, Example]] = []
    for item in sorted(rows, key=lambda item: len(item[1].ids)):
        length = len(item[1].ids)
        ragged = part and length > 2 * len(part[0][1].ids) and length * len(part) > tokens // 4
        if part and (length * (len(part) + 1) > tokens or ragged):
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def target_losses(
    base: FrozenModel, part: Sequence[tuple[int, Example]], prefixes: Sequence[KVPrefix | None]
) -> tuple[list[int], Tensor]:
    """Return, for every learned token of the part, its run and its loss in nats [N]."""
    longest = max(len(row.ids) for _, row in part)
    places: list[int] = []
    runs: list[int] = []
    splices: list[tuple[int, int, Tensor]] = []
    for place, (run, row) in enumerate(part):
        places += [place * longest + target - 1 for target in row.learned]
        runs += [run] * len(row.learned)
        prefix = prefixes[run]
        after = None if prefix is None else prefix.after
        if after is not None:
            splices += [(place, offset, after[start : start + count]) for offset, start, count in row.slots]
    logits = forward_rows(
        base,
        [row.ids for _, row in part],
        [prefixes[run] for run, _ in part],
        select=torch.tensor(places, device=base.device),
        splices=splices,
    )
    return runs, losses_at_targets(logits.float(), [row for _, row in part])


def losses_at_targets(logits: Tensor, rows: Sequence[Example]) -> Tensor:
    """Return the loss in nats [N] of `logits` [N, V] at the rows' learned places, row after row.

    Cross-entropy with the token that stands there; for a row with a teacher, the divergence KL(teacher || student)
    over its likeliest tokens and one bucket for all others. Without the bucket the student would be drawn to the
    teacher's likeliest tokens renormalised, which is a sharper distribution than the teacher's.
    """
    if not any(row.teacher is not None for row in rows):
        targets = [row.ids[place] for row in rows for place in row.learned]
        return F.cross_entropy(logits, torch.tensor(targets, device=logits.device), reduction="none")
    parts = []
    for row, own in zip(rows, torch.split(logits, [len(row.learned) for row in rows]), strict=True):
        if row.teacher is None:
            parts.append(losses_at_targets(own, [row]))
        else:
            parts.append(divergence(own, row.teacher))
    return torch.cat(parts)


def divergence(logits: Tensor, teacher: SoftTargets) -> Tensor:
    """Return KL(teacher || softmax(logits)) in nats [N], all tokens that the teacher does not name being one bucket."""
    log_q = logits.log_softmax(-1).gather(1, teacher.ids.to(logits.device))
    log_p = teacher.log_probs.to(logits.device)
    p = log_p.exp()
    rest_p, rest_q = (1 - p.sum(-1)).clamp_min(TINY), (1 - log_q.exp().sum(-1)).clamp_min(TINY)
    return (p * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
