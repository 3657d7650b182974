"""Conformance probes: does this target say what the vectors said where they were made?

A probe is a few token ids behind the prefix and the top next-token log-probabilities seen there. Probes travel in the
artefact's header and are replayed on every new target: another dtype, device, engine or version of a library. Only
making and replaying them runs a model; judging imports no torch, so that log-probabilities from a server can be judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreword.errors import ArtefactCorrupt

if TYPE_CHECKING:
    from torch import Tensor

    from foreword.core.model import FrozenModel
    from foreword.core.prompt import KVPrefix

TOP = 20
DIGITS = 5
"""Decimals kept of a log-probability: rounding moves a divergence by 1e-9."""
ROWS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What two targets of one dtype may differ by and still be the same model: rounding, kernels, batch shapes."""

    max_kl: float
    """Divergence of the worst probe, in nats."""
    mean_kl: float
    """Mean over many probes, in nats; it finds small faults that a worst case hides."""
    tie: float
    """A different best token is no disagreement where the two lay closer than this at first, in nats."""


TOLERANCES = {
    "float32": Tolerance(max_kl=1e-5, mean_kl=1e-6, tie=1e-3),
    "float16": Tolerance(max_kl=2e-3, mean_kl=2e-4, tie=0.05),
    "bfloat16": Tolerance(max_kl=5e-2, mean_kl=5e-3, tie=0.5),
}
"""By the coarser dtype of a pair. Measured 2026-11-20, torch 2.13 on CPU, transformers 5.23: base-3m (24 probes behind
16 perturbed vectors of each method), base-30m and 21 random tiny models; SDPA against eager attention, single rows
against a batch, each dtype against each. Largest seen (max, mean, tie): float32 9e-9, 1e-9, 0; float16 2e-4, 3e-5,
0.008; bfloat16 1.7e-2, 2.5e-3, 0.2. Faults on base-3m, mean: no prefix 0.4 to 1.3, one of 16 vectors lost 0.012 to
0.08, the last layer's values lost 0.012 to 0.09, another prompt 0.19 to 0.8: all above bfloat16's mean. Noise of 5 % on
keys and values, 0.003 to 0.04, may hide in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformance:
    """The outcome of a replay; divergences in nats, from the stored to the found distribution."""

    num_probes: int
    max_kl: float
    mean_kl: float
    num_agree: int
    """Probes with the stored best token, or one that was as good as tied with it."""
    dtypes: tuple[str, str]
    """Where the probes were made, and here."""
    tolerance: Tolerance

    @property
    def mean_kl_allowed(self) -> float:
        """The tolerance of the mean, wider for few probes: 1.2 times at 20 of them, twice at 4."""
        return self.tolerance.mean_kl * (1 + 4 / max(1, self.num_probes))

    @property
    def ok(self) -> bool:
        """Whether all three figures lie within the tolerance; without probes there is nothing to object to."""
        within = self.max_kl <= self.tolerance.max_kl and self.mean_kl <= self.mean_kl_allowed
        return within and self.num_agree == self.num_probes

    @property
    def message(self) -> str:
        """One line with each figure beside its tolerance."""
        if not self.num_probes:
            return "no conformance probes: nothing was compared"
        made, here = self.dtypes
        return (
            f"conformance {'holds' if self.ok else 'FAILS'} over {self.num_probes} probes ({made} there, {here} here): "
            f"max KL {self.max_kl:.2g} (allowed {self.tolerance.max_kl:g}), mean KL {self.mean_kl:.2g} "
            f"(allowed {self.mean_kl_allowed:.2g}), best token agrees in {self.num_agree} of {self.num_probes}"
        )


def make_probes(
    base: FrozenModel, prefix: KVPrefix, rows: Sequence[Sequence[int]], top: int = TOP
) -> tuple[dict[str, Any], ...]:
    """Return one probe per row of token ids that follow the prefix's block; 8 to 24 short rows are enough.

    A probe is JSON-ready: `ids`, `top` (the ids of the `top` best next tokens, best first), `logprobs` of these, in
    nats to 5 decimals, and the base's `dtype`. Soft slots behind the text are not part of it. Raises ValueError on an
    empty row.
    """
    import torch

    dtype = str(base.dtype).removeprefix("torch.")
    probes = []
    for row, logprobs in zip(rows, _next_logprobs(base, prefix, rows), strict=True):
        best = torch.topk(logprobs, min(top, int(logprobs.isfinite().sum())))
        values = [round(value, DIGITS) for value in best.values.tolist()]
        probes.append({"ids": list(row), "top": best.indices.tolist(), "logprobs": values, "dtype": dtype})
    return tuple(probes)


def replay(base: FrozenModel, prefix: KVPrefix, probes: Sequence[Mapping[str, Any]]) -> Conformance:
    """Run the probes behind `prefix` on `base` and compare with what is stored in them.

    Raises ArtefactCorrupt where a probe is malformed or names a token that the base has not.
    """
    rows = [check_probe(probe, base.spec.vocab_size) for probe in probes]
    found = []
    for probe, logprobs in zip(probes, _next_logprobs(base, prefix, rows), strict=True):
        ids = [*probe["top"], int(logprobs.argmax())]
        found.append(dict(zip(ids, logprobs[ids].tolist(), strict=True)))
    return judge(probes, found, str(base.dtype).removeprefix("torch."))


def judge(probes: Sequence[Mapping[str, Any]], found: Sequence[Mapping[int, float]], dtype: str) -> Conformance:
    """Compare stored probes with the log-probabilities `found` by token id on a target of `dtype`.

    Each of `found` holds the target's best token and as many of the stored ones as are known; tokens known on one side
    only count in the tail bucket of both. The tolerance is that of the coarser dtype; unknown dtypes count as bfloat16.
    """
    made = sorted({str(probe["dtype"]) for probe in probes}) or [dtype]
    tolerance = max((_tolerance(name) for name in (*made, dtype)), key=lambda tolerance: tolerance.max_kl)
    divergences, num_agree = [], 0
    for probe, now in zip(probes, found, strict=True):
        stored = dict(zip(probe["top"], probe["logprobs"], strict=True))
        divergences.append(divergence(stored, now))
        best_now = max(now, key=lambda token: now[token])
        best_then = max(stored, key=lambda token: stored[token])
        gap = stored[best_then] - stored.get(best_now, min(stored.values()))
        num_agree += best_now == best_then or gap <= tolerance.tie
    return Conformance(
        num_probes=len(divergences),
        max_kl=max(divergences, default=0.0),
        mean_kl=sum(divergences) / max(1, len(divergences)),
        num_agree=num_agree,
        dtypes=("/".join(made), dtype),
        tolerance=tolerance,
    )


def divergence(stored: Mapping[int, float], found: Mapping[int, float]) -> float:
    """Return KL(stored || found) in nats over the tokens known to both, and one bucket for all others.

    Never negative; NaN or infinity in `found` gives infinity.
    """
    total, rest_stored, rest_found = 0.0, 1.0, 1.0
    for token in stored.keys() & found.keys():
        if not math.isfinite(found[token]):
            return math.inf
        probability = math.exp(stored[token])
        total += probability * (stored[token] - found[token])
        rest_stored, rest_found = rest_stored - probability, rest_found - math.exp(found[token])
    smallest = 10.0**-DIGITS  # of a tail below the rounding of its parts nothing is known
    if rest_stored > smallest or rest_found > smallest:
        rest_stored, rest_found = max(rest_stored, smallest), max(rest_found, smallest)
        total += rest_stored * math.log(rest_stored / rest_found)
    return max(0.0, total)


def check_probe(probe: Mapping[str, Any], vocab_size: int) -> list[int]:
    """Return a probe's token ids. Raises ArtefactCorrupt where it is malformed or an id is not in the vocabulary."""
    try:
        ids, top, logprobs = list(probe["ids"]), list(probe["top"]), list(probe["logprobs"])
        whole = all(type(token) is int and 0 <= token < vocab_size for token in (*ids, *top))
        whole = whole and all(math.isfinite(value) and value <= 0.0 for value in logprobs)
        if not (whole and ids and len(set(top)) == len(logprobs) == len(top) > 0 and isinstance(probe["dtype"], str)):
            raise ValueError("ids, logprobs or their number are out of range")
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactCorrupt(f"a conformance probe is malformed: {error}", hint="Make the probes again.") from error
    return ids


def _tolerance(dtype: str) -> Tolerance:
    return TOLERANCES.get(dtype, TOLERANCES["bfloat16"])


def _next_logprobs(base: FrozenModel, prefix: KVPrefix, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the next token's log-probabilities [V] behind each row, float32 on the CPU."""
    import torch

    from foreword.core.forward import forward_rows

    if not all(len(row) for row in rows):
        raise ValueError("a probe needs at least one token behind the prefix")
    found: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            longest = max(len(row) for row in part)
            last = [index * longest + len(row) - 1 for index, row in enumerate(part)]
            logits = forward_rows(base, part, [prefix] * len(part), select=torch.tensor(last, device=base.device))
            found.extend(torch.log_softmax(logits.float(), dim=-1).cpu())
    return found
