"""Does a prefix cost time in every request? It should be computed once and then only attended to. No torch."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foreword.doctor.finding import Finding
from foreword.doctor.server.visit import SHORT_TOKENS, Visit

NUM_ROUNDS = 15
NUM_RESAMPLES = 400
LEAST_SHARE = 0.2
"""Of the base's own time that P more positions must take, or nothing can be said about them."""
PAID_AGAIN = 0.7
"""A task that takes longer than the base by this part of P more positions computes its prefix again."""
GROWS = 2.0
"""A task that takes longer by more than this many times P positions carries them through its layers."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 98 % interval from resampling."""

    value: float
    low: float
    high: float


def check_latency(visit: Visit) -> Finding:
    """Compare first-token times: the task, the plain base, and the base with as many more prompt tokens as P.

    A warm prefix costs attention only. A task that is slower than the base by the time of computing P positions
    computes them in every request; slower by several times that, it carries them through every layer. Requests
    alternate, medians are compared by their intervals, and nothing is said where noise hides the figure.
    """
    name = f"{visit.model} latency"
    if visit.version is None or visit.base_name is None:
        return _needs(name, "a registry that tells P, and the plain base's name")
    count, block = SHORT_TOKENS, visit.version.num_positions
    arms = {
        "base": (visit.base_name, count),
        "task": (visit.model, count),
        "longer": (visit.base_name, count + block),
    }
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for place in range(NUM_ROUNDS + 1):
        for arm, (asked, length) in arms.items():
            seconds = visit.server.first_token_s(asked, visit.fresh_ids(length))
            if place:  # the first loads what is cold
                times[arm].append(seconds)
    return judge_times(name, times["base"], times["task"], times["longer"], block)


def judge_times(
    name: str, base: Sequence[float], task: Sequence[float], longer: Sequence[float], num_positions: int
) -> Finding:
    """Return the finding for first-token times in seconds: of the base, of the task, and of the base with P more."""
    excess = _interval((task, base), _difference)
    unit = _interval((longer, base), _difference)
    own = statistics.median(base)
    numbers = {"base_s": own, "excess_s": excess.value, "positions_s": unit.value, "positions": num_positions}
    shown = (
        f"base {1e3 * own:.1f} ms, task {1e3 * excess.value:+.1f} ms ({1e3 * excess.low:+.1f} to "
        f"{1e3 * excess.high:+.1f}), {num_positions} more prompt positions {1e3 * unit.value:+.1f} ms"
    )
    if unit.low < LEAST_SHARE * own:
        what = f"needs a longer prefix or a quieter machine: {shown}, too little to tell"
        return Finding(check=name, ok=True, skipped=True, measured=what, numbers=numbers)
    ratio = _interval((task, base, longer), lambda t, b, m: _difference(t, b) / max(1e-9, _difference(m, b)))
    ok = ratio.low <= PAID_AGAIN
    grows = ratio.low > GROWS
    fix = "Compute the prefix once and keep its keys and values; requests then begin behind it."
    if grows:
        fix = "Keep only the text's rows of every layer's output: prefix rows that go on make each layer longer."
    return Finding(
        check=name,
        ok=ok,
        measured=f"{shown}: {ratio.value:.2f} times their cost ({ratio.low:.2f} to {ratio.high:.2f})",
        expected=f"less than {PAID_AGAIN} times the cost of computing {num_positions} positions",
        fix=fix,
        fault="outputs-kept" if grows else "",
        numbers={**numbers, "ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high},
    )


def _difference(one: Sequence[float], two: Sequence[float]) -> float:
    return statistics.median(one) - statistics.median(two)


def _interval(arms: Sequence[Sequence[float]], figure: Callable[..., float]) -> Interval:
    """Return a figure of several samples with the interval that resampling each of them gives."""
    draw = random.Random(0)
    found = sorted(figure(*(draw.choices(arm, k=len(arm)) for arm in arms)) for _ in range(NUM_RESAMPLES))
    edge = NUM_RESAMPLES // 100
    return Interval(figure(*arms), found[edge], found[-1 - edge])


def _needs(name: str, what: str) -> Finding:
    return Finding(check=name, ok=True, skipped=True, measured=f"needs {what}")
