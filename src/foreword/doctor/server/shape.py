"""The shape of a difference: which sampling setting turns one list of log-probabilities into another? No torch."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from foreword.doctor.server.visit import Logprobs

SAME_SHIFT = 0.6
"""Share of the tokens that a rule must explain to be the rule."""
LEAST_SHIFTS = {"float32": 0.02}
HALF_SHIFT = 0.2
"""A penalty or bias, in nats, below which it is rounding, by dtype; of half precision."""
LEAST_SLOPE = 0.05
LEAST_SHARED = 5
STILL = 1 / 4
"""Of that, what the other tokens may move by."""


def setting_between(stored: Logprobs, found: Logprobs, seen: Collection[int], dtype: str) -> str:
    """Return the setting that turns the stored into the found log-probabilities, or "" where none does.

    A bias moves a few tokens and shifts all others alike; a penalty moves tokens that were `seen`; a temperature
    stretches all. Another computation does none of these.
    """
    least = LEAST_SHIFTS.get(dtype, HALF_SHIFT)
    shared = sorted(stored.keys() & found.keys())
    if len(shared) < LEAST_SHARED:
        return ""
    moved, still = _moved(stored, found, least)
    if moved and len(still) >= SAME_SHIFT * len(shared) and max(still) < STILL * least:
        return "a penalty on tokens that were there before" if moved <= set(seen) else "a bias on some tokens"
    return _temperature(stored, found, shared, least)


def has_shift(stored: Logprobs, found: Logprobs, dtype: str) -> bool:
    """Return whether some token moved by more than rounding, among those that both name or out of one of them."""
    return bool(_moved(stored, found, LEAST_SHIFTS.get(dtype, HALF_SHIFT))[0])


def _moved(stored: Logprobs, found: Logprobs, least: float) -> tuple[set[int], list[float]]:
    """Return the tokens that moved against the others, and how far each of the others did."""
    shifts = {token: found[token] - stored[token] for token in stored.keys() & found.keys()}
    middle = statistics.median(shifts.values()) if shifts else 0.0
    moved = {token for token, shift in shifts.items() if abs(shift - middle) > least}
    still = [abs(shift - middle) for token, shift in shifts.items() if token not in moved]
    last_stored, last_found = min(stored.values()), min(found.values())
    moved |= {t for t, value in stored.items() if t not in found and value + middle > last_found + least}
    moved |= {t for t, value in found.items() if t not in stored and value - middle > last_stored + least}
    return moved, still


def _temperature(stored: Logprobs, found: Logprobs, tokens: Sequence[int], least: float) -> str:
    slope, offset = statistics.linear_regression([stored[t] for t in tokens], [found[t] for t in tokens])
    rest = max(abs(found[t] - slope * stored[t] - offset) for t in tokens)
    if abs(slope - 1) > LEAST_SLOPE and rest < STILL * least:
        return f"temperature {1 / slope:.2g}" if slope > 0 else ""
    return ""
