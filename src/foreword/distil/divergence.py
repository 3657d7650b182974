"""How far answers' distributions are from a teacher's: KL over the whole vocabulary, in nats per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix
from foreword.distil.teacher import batches, logits_at_learned
from foreword.train.data import Example


def mean_divergences(
    base: FrozenModel,
    rows: Sequence[Example],
    teachers: Sequence[KVPrefix],
    others: Mapping[str, Sequence[KVPrefix]],
) -> dict[str, float]:
    """Return for each of `others` the mean of KL(teacher || other) over the rows' learned tokens.

    A prefix stands for each row. 0 for the teacher itself, up to rounding. Not the training loss: no token is cut away.
    """
    totals = dict.fromkeys(others, 0.0)
    longest = max(prefix.num_positions for prefixes in (teachers, *others.values()) for prefix in prefixes)
    for part in batches(rows, longest):
        chosen = [rows[place] for place in part]
        log_p = logits_at_learned(base, chosen, [teachers[place] for place in part]).log_softmax(-1)
        p = log_p.exp()
        for name, prefixes in others.items():
            log_q = logits_at_learned(base, chosen, [prefixes[place] for place in part]).log_softmax(-1)
            totals[name] += float(torch.sum(p * (log_p - log_q), dtype=torch.float64))
    count = sum(len(row.learned) for row in rows)
    return {name: total / count for name, total in totals.items()}
