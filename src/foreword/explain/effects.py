"""What vectors do to loss and to the next token: with them and without, one by one, against random ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foreword.core.conformance import TOLERANCES
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrompt, Vectors
from foreword.explain.ablate import answer_losses, block_of, count_vectors, form_without
from foreword.explain.estimate import Estimate, Resamples
from foreword.explain.examples import Example

State = Literal["alive", "acting", "idle", "harmful", "dead"]
NUM_CONTROLS = 3
"""Random vectors drawn; their losses are averaged."""
DEAD_KL = 1e-3
"""Nats. Below it vectors change no answer: by Pinsker's inequality no event's probability moves by more than 2.3 %."""
MAX_OUTPUTS = 32
"""Output positions reported one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Mean loss per answer token in nats."""

    trained: Estimate
    without: Estimate
    """All vectors taken out, literal tokens of the block kept."""
    control: Estimate
    """Random vectors, each of the norm of the one that it stands for."""
    gain: Estimate
    """without - trained."""
    gain_over_control: Estimate
    """control - trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorEffect:
    """One vector taken out."""

    index: int
    position: int | None
    """Its place in the block; None for a vector behind the text."""
    loss_change: Estimate
    """Loss without it less loss with all, nats per answer token: above zero it helps."""
    verdict: Literal["helps", "harms", "unclear"]
    """By 5 % over all vectors together (Bonferroni)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OneByOne:
    """Leave-one-vector-out, and all that harm left out at once."""

    effects: tuple[VectorEffect, ...]
    pruned: tuple[int, ...]
    """Those that harm by themselves."""
    pruned_loss_change: Estimate | None
    """With all of these out; on the rows that chose them, so it flatters. None where none harms."""

    def count(self, verdict: str) -> int:
        """Return how many vectors have this verdict."""
        return sum(effect.verdict == verdict for effect in self.effects)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputEffect:
    """KL(with || without) of the next token, in nats, where answers stand."""

    mean: Estimate
    by_position: tuple[tuple[Estimate, int], ...]
    """The first output token, the second, ...; and rows that are that long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the vectors do anything, and whether it is of use."""

    state: State
    sentence: str


def row_losses(base: FrozenModel, vectors: Vectors, examples: Sequence[Example]) -> Mapping[str, np.ndarray]:
    """Return each row's summed loss with the vectors, without them, and behind random ones: [rows] each."""
    everything = range(count_vectors(vectors))
    controls = [answer_losses(base, form_without(base, random_like(vectors, s)), examples) for s in range(NUM_CONTROLS)]
    return {
        "trained": answer_losses(base, form_without(base, vectors), examples).numpy(),
        "without": answer_losses(base, form_without(base, vectors, everything), examples).numpy(),
        "control": torch.stack(controls).mean(0).numpy(),
    }


def summarise_losses(sums: Mapping[str, np.ndarray], draws: Resamples) -> Losses:
    """Return the means of `row_losses` and their differences."""
    return Losses(
        trained=draws.mean(sums["trained"]),
        without=draws.mean(sums["without"]),
        control=draws.mean(sums["control"]),
        gain=draws.difference(sums["without"], sums["trained"]),
        gain_over_control=draws.difference(sums["control"], sums["trained"]),
    )


def random_like(vectors: Vectors, seed: int) -> Vectors:
    """Return Gaussian vectors of the same shape, each row scaled to the norm of the row in whose place it stands."""
    generator = torch.Generator().manual_seed(seed)

    def like(rows: Tensor) -> Tensor:
        rows = rows.detach().float().cpu()
        noise = torch.randn(rows.shape, generator=generator)
        scaled: Tensor = F.normalize(noise, dim=-1) * torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return scaled

    if isinstance(vectors, SoftKV):
        return SoftKV(tuple(map(like, vectors.keys)), tuple(map(like, vectors.values)), vectors.block)
    if isinstance(vectors, SoftPrompt):
        after = None if vectors.after is None else like(vectors.after)
        return SoftPrompt(like(vectors.vectors), vectors.block, after)
    return dataclasses.replace(vectors, vectors=like(vectors.vectors))


def leave_one_out(
    base: FrozenModel, vectors: Vectors, examples: Sequence[Example], trained: np.ndarray, draws: Resamples
) -> OneByOne:
    """Return what taking out each vector does to the loss; `trained` [rows] is `row_losses`' of the same examples."""
    total, positions = count_vectors(vectors), block_of(vectors).soft_positions()
    needed = NormalDist().inv_cdf(1 - 0.05 / (2 * total))
    effects = []
    for index in range(total):
        sums = answer_losses(base, form_without(base, vectors, {index}), examples).numpy()
        errors = draws.num_errors(sums, trained)
        verdict: Literal["helps", "harms", "unclear"] = "unclear"
        if errors is not None and abs(errors) > needed:
            verdict = "helps" if errors > 0 else "harms"
        effects.append(
            VectorEffect(
                index=index,
                position=positions[index] if index < len(positions) else None,
                loss_change=draws.difference(sums, trained),
                verdict=verdict,
            )
        )
    harmful = tuple(effect.index for effect in effects if effect.verdict == "harms")
    change = None
    if harmful:
        change = draws.difference(answer_losses(base, form_without(base, vectors, harmful), examples).numpy(), trained)
    return OneByOne(effects=tuple(effects), pruned=harmful, pruned_loss_change=change)


def effect_on_outputs(kl: Sequence[Tensor], examples: Sequence[Example], seed: int = 0) -> OutputEffect:
    """Return the mean divergence where answers stand, from those of whole rows (`divergences`)."""
    rows = [
        row[len(example.ids) - example.num_answer - 1 : len(example.ids) - 1].double().numpy()
        for row, example in zip(kl, examples, strict=True)
    ]
    by_position = []
    for place in range(min(MAX_OUTPUTS, max(len(row) for row in rows))):
        found = [row[place] for row in rows if len(row) > place]
        by_position.append((Resamples([1] * len(found), seed).mean(found), len(found)))
    mean = Resamples([len(row) for row in rows], seed).mean([row.sum() for row in rows])
    return OutputEffect(mean=mean, by_position=tuple(by_position))


def judge(dtype: str, outputs: OutputEffect, losses: Losses | None) -> Verdict:
    """Return the verdict; `losses` are None where rows have no targets."""
    kl = f"KL {outputs.mean} nats per output token"
    least = max(DEAD_KL, TOLERANCES[dtype].mean_kl)
    if outputs.mean.value < least:
        extra = "" if losses is None else f"; loss without them less loss with them {losses.gain}"
        why = "no answer changes by that little" if least == DEAD_KL else f"which rounding to {dtype} may give"
        return Verdict(state="dead", sentence=f"dead: the vectors do nothing ({kl}, below {least:g}, {why}{extra})")
    if losses is None:
        sentence = f"acting: the vectors change the answers ({kl}); whether for the better, only targets can tell"
        return Verdict(state="acting", sentence=sentence)
    if losses.gain.low is None:
        sentence = f"acting: the vectors change the answers ({kl}); whether for the better, so few rows cannot tell"
        return Verdict(state="acting", sentence=sentence)
    change = f"loss {losses.without.value:.3g} without them, {losses.trained.value:.3g} with them"
    found = f"{kl}, {change}, difference {losses.gain} nats per answer token"
    if losses.gain.is_below_zero:
        return Verdict(state="harmful", sentence=f"harmful: answers are worse with the vectors than without ({found})")
    if not losses.gain.is_above_zero:
        return Verdict(state="idle", sentence=f"idle: the vectors change the answers but do not help ({found})")
    if not losses.gain_over_control.is_above_zero:
        sentence = f"idle: random vectors of the same norms do as well ({found}, over them {losses.gain_over_control})"
        return Verdict(state="idle", sentence=sentence)
    return Verdict(state="alive", sentence=f"alive: the vectors make the answers likelier ({found})")
