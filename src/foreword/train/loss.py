"""Loss and gradients of one step: every run's block once, all rows in shared forwards, logits at targets only.

The block's keys and values are cut from the graph, gathered gradients from all micro-batches that attend to them, and
carried back through the block once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foreword.core.compile import compute_blocks
from foreword.core.forward import forward_rows
from foreword.core.model import FrozenModel
from foreword.core.packed import Front, InSequence, forward_packed
from foreword.core.prompt import KVPrefix, SoftPrompt, Vectors, vectors_from_tensors
from foreword.train.data import Example, SoftTargets
from foreword.train.distributed import world
from foreword.train.strategy import Strategy
from foreword.train.tuners import Tuner

TINY = 1e-6
"""The least probability of the bucket of other tokens: about what float32 leaves of 1 - p."""
MICRO_TOKENS = 4096
"""Padded tokens of one forward at most; longer steps are cut into micro-batches with the same gradients."""

PLAIN = Strategy()
"""Padded rows, nothing compiled."""
Forward = Callable[..., Tensor]
"""`forward_padded` or `forward_packed`: (base, rows, fronts, select, splices) -> logits."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One run's rows in one step."""

    tuner: Tuner
    rows: Sequence[Example]

    @property
    def num_targets(self) -> int:
        """Learned tokens, over which the run's loss is the mean."""
        return sum(len(row.learned) for row in self.rows)


def step_gradients(
    base: FrozenModel,
    batches: Sequence[Batch],
    micro_tokens: int = MICRO_TOKENS,
    strategy: Strategy = PLAIN,
) -> list[float]:
    """Add each run's gradient to its tuner's parameters; return each run's mean loss over its target tokens in nats.

    A row's loss depends on its own run's vectors only, so runs share forwards without sharing gradients. Of several
    processes (train/distributed.py) each takes a part of the rows; all get the same gradients and losses.
    """
    vectors = [batch.tuner.vectors() for batch in batches]
    weights = [1.0 / batch.num_targets for batch in batches]
    rows = [(index, row) for index, batch in enumerate(batches) for row in batch.rows]
    together = world()
    fronts, cut = _cut_vectors(vectors, batches) if strategy.packed else _cut_blocks(base, vectors, batches)
    losses = torch.zeros(len(batches), dtype=torch.float64)
    with strategy.active(base):
        for part in micro_batches(rows, micro_tokens * together.size):
            losses += _backward(base, part, fronts, weights, forward_packed if strategy.packed else forward_padded)
    known = [(made, leaf.grad) for made, leaf in cut if leaf.grad is not None and made.requires_grad]
    torch.autograd.backward([made for made, _ in known], [gradient for _, gradient in known])
    if together.size > 1:
        for parameter in (p for batch in batches for p in batch.tuner.parameters()):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            together.sum([parameter.grad])
        losses = _summed(losses, base.device)
    return losses.tolist()


def _backward(
    base: FrozenModel,
    part: Sequence[tuple[int, Example]],
    fronts: Sequence[Front],
    weights: Sequence[float],
    forward: Forward,
) -> Tensor:
    """Run one forward and backward pass over this process's rows of the part; return each run's weighted loss.

    Where the part has fewer rows than there are processes, the others run a row that does not count.
    """
    mine, counts = world().part(part), 1.0
    if not mine:
        mine, counts = list(part[:1]), 0.0
    runs, losses_per_token = target_losses(base, mine, fronts, forward)
    scale = torch.tensor([counts * weights[run] for run in runs], device=losses_per_token.device)
    weighted = losses_per_token * scale
    torch.autograd.backward(weighted.sum())
    losses = torch.zeros(len(fronts), dtype=torch.float64)
    return losses.index_add_(0, torch.tensor(runs), weighted.detach().cpu().double())


def _summed(numbers: Tensor, device: torch.device) -> Tensor:
    """Return float64 numbers added up over all processes."""
    there = numbers.to(device)
    world().sum([there])
    return there.cpu()


Cut = list[tuple[Tensor, Tensor]]
"""Pairs of a tensor in the graph and the leaf that stands for it while rows are run."""


def _cut_vectors(vectors: Sequence[Vectors], batches: Sequence[Batch]) -> tuple[list[Front], Cut]:
    """Return blocks to be computed with the rows, their vectors cut from the graph."""
    fronts: list[Front] = []
    cut: Cut = []
    for made, batch in zip(vectors, batches, strict=True):
        tensors = made.tensors()
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        cut += [(tensor, leaves[name]) for name, tensor in tensors.items()]
        fronts.append(InSequence(vectors_from_tensors(leaves, batch.tuner.block), batch.tuner.block))
    return fronts, cut


def _cut_blocks(base: FrozenModel, vectors: Sequence[Vectors], batches: Sequence[Batch]) -> tuple[list[Front], Cut]:
    """Compute every block; return its keys and values, cut from the graph."""
    blocks = compute_blocks(base, [(v, b.tuner.block) for v, b in zip(vectors, batches, strict=True)], lean=True)
    prefixes: list[Front] = []
    cut: Cut = []
    for made, layers in zip(vectors, blocks, strict=True):
        after = made.after if isinstance(made, SoftPrompt) else None
        tensors = [tensor[0] for pair in layers for tensor in pair] + ([] if after is None else [after])
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        cut += list(zip(tensors, leaves, strict=True))
        pairs = leaves[: 2 * len(layers)]
        last = None if after is None else leaves[-1]
        prefixes.append(KVPrefix(tuple(pairs[0::2]), tuple(pairs[1::2]), "", after=last))
    return prefixes, cut


def mean_losses(base: FrozenModel, items: Sequence[tuple[KVPrefix | None, Sequence[Example]]]) -> list[float]:
    """Return each prefix's mean loss over its rows' target tokens in nats, without gradients.

    None is no prefix: rows that are whole by themselves.
    """
    totals = torch.zeros(len(items), dtype=torch.float64)
    rows = [(index, row) for index, (_, examples) in enumerate(items) for row in examples]
    prefixes = [prefix for prefix, _ in items]
    with torch.no_grad():
        for part in micro_batches(rows, MICRO_TOKENS * world().size):
            mine = world().part(part)
            runs, losses = target_losses(base, mine or part[:1], prefixes)
            if mine:
                totals.index_add_(0, torch.tensor(runs), losses.cpu().double())
    totals = _summed(totals, base.device)
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
    base: FrozenModel,
    part: Sequence[tuple[int, Example]],
    fronts: Sequence[Front],
    forward: Forward | None = None,
) -> tuple[list[int], Tensor]:
    """Return, for every learned token of the part, its run and its loss in nats [N].

    Tokens from the last learned one on predict nothing that is learned: they are left out.
    """
    ends = [row.learned[-1] for _, row in part]
    places: list[tuple[int, int]] = []
    runs: list[int] = []
    splices: list[tuple[int, int, Tensor]] = []
    for number, (run, row) in enumerate(part):
        places += [(number, target - 1) for target in row.learned]
        runs += [run] * len(row.learned)
        front = fronts[run]
        if (after := getattr(front.vectors if isinstance(front, InSequence) else front, "after", None)) is not None:
            splices += [
                (number, offset, after[start : start + min(count, ends[number] - offset)])
                for offset, start, count in row.slots
                if offset < ends[number]
            ]
    rows = [(run, row.ids[:end]) for end, (run, row) in zip(ends, part, strict=True)]
    logits = (forward or forward_padded)(base, rows, fronts, places, splices)
    return runs, losses_at_targets(logits.float(), [row for _, row in part])


def forward_padded(
    base: FrozenModel,
    rows: Sequence[tuple[int, Sequence[int]]],
    fronts: Sequence[Front],
    select: Sequence[tuple[int, int]],
    splices: Sequence[tuple[int, int, Tensor]] = (),
) -> Tensor:
    """Do what `forward_packed` does with padded rows, for blocks that are computed before."""
    longest = max(len(ids) for _, ids in rows)
    prefixes = [front for run, _ in rows if not isinstance(front := fronts[run], InSequence)]
    wanted = torch.tensor([row * longest + offset for row, offset in select], device=base.device)
    return forward_rows(base, [ids for _, ids in rows], prefixes, select=wanted, splices=splices, lean=True)


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
