"""An implementation in use: batches, the same again, generation, turns, and as it runs while training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreword.doctor.probe.attention import AttentionWatch
from foreword.doctor.probe.logits import NEW_TOKENS, ProbeFailed, Side, divergences, generate_rows, run_rows
from foreword.doctor.probe.measurements import Measurements


def repeated(m: Measurements, seeds: Sequence[int]) -> list[tuple[Tensor, list[int]]]:
    """Return the first row's logits [T, V] and the keys that each attention saw, once for each random seed."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        with torch.no_grad(), AttentionWatch() as watch:
            logits = run_rows(m.subject.forward, m.base, m.rows[:1])[0][0]
        found.append((logits, [call.num_keys for call in watch.calls]))
    return found


def active_dropout(model: nn.Module | None) -> list[str]:
    """Return the names of dropout modules that are in training mode with a rate above 0."""
    return [
        name
        for name, module in ([] if model is None else model.named_modules())
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
    ]


def batched(m: Measurements, side: Side) -> list[float]:
    """Return, per probe row, the largest KL of its padded batch against itself alone, in nats."""
    rows = m.run(m.rows, side)
    return [float(divergences(alone, found).max()) for alone, found in zip(m.single, rows, strict=True)]


@dataclass(frozen=True, slots=True)
class Generated:
    """Greedy tokens of one row, and how each lies below the best by the forward, in nats (0 where it is the best)."""

    tokens: list[int]
    gaps: list[float]


def extra_keys(m: Measurements) -> list[int]:
    """Return how many keys each step of a generation sees beside those of the text so far, in a layer that sees all.

    [] where there is no such layer, or the steps cannot be told apart: unless there is one forward per new token.
    """
    width = m.num_positions + len(m.rows[0]) + NEW_TOKENS
    full = [place for place, layer in enumerate(m.base.spec.layers) if layer.window is None or layer.window >= width]
    with AttentionWatch() as watch:
        generate_rows(m.subject.generate, m.base, m.rows[:1])
    count = m.base.spec.num_layers
    if not full or len(watch.calls) != count * NEW_TOKENS:
        return []
    calls = watch.calls[full[0] :: count]
    return [int(call.visible[0, -1].sum()) - len(m.rows[0]) - step for step, call in enumerate(calls)]


def judged(m: Measurements, row: Sequence[int], tokens: Sequence[int]) -> Generated:
    """Return generated tokens with their gaps, by one forward over the row and them."""
    logits = m.run([[*row, *tokens[:-1]]])[0][len(row) - 1 :]
    logprobs = torch.log_softmax(logits, dim=-1)
    best = logprobs.max(-1).values
    gaps = best - logprobs[torch.arange(len(tokens)), torch.tensor(list(tokens), device=logprobs.device)]
    return Generated(list(tokens), gaps.tolist())


def after_turns(m: Measurements, turns: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits [V] behind the last token of the last turn. Raises ProbeFailed where that raises."""
    if m.subject.turns is None:
        raise ProbeFailed("turns need `turns`")
    try:
        with torch.no_grad():
            found = m.subject.turns(turns)
    except Exception as error:  # somebody else's code
        raise ProbeFailed(f"turns raised {type(error).__name__} at {len(turns)} turns: {error}") from error
    return found.detach().float().reshape(-1)


def while_training(m: Measurements) -> list[Tensor]:
    """Return the probe rows' logits [T, V] by the training forward, dropout left out, gradients recorded."""
    if m.subject.training_forward is None:
        raise ProbeFailed("training needs `training_forward`")
    with torch.enable_grad(), AttentionWatch(dropout=False, keep=False):
        return [run_rows(m.subject.training_forward, m.base, [row])[0][0].detach() for row in m.rows]
