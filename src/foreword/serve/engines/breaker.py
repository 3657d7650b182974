"""Leaving alone what fails again and again. Imports no torch."""

from __future__ import annotations

import random
from typing import Literal

BreakerState = Literal["closed", "open", "half-open"]

BREAK_AFTER = 3
"""Failures in a row after which a replica is left alone."""
REST_S, MAX_REST_S = 1.0, 30.0
"""How long at first, and at most: doubled with each failed try, each time by chance half to one and a half of it."""


class Breaker:
    """closed ─ BREAK_AFTER failures ─► open ─ a while ─► half-open: one request is let through, and decides."""

    def __init__(self) -> None:
        self._failures = 0
        self._rests = 0
        self.rest_until = 0.0
        self._is_trying = False

    def state(self, now: float) -> BreakerState:
        """Return the state at `now`, by `time.monotonic()`."""
        if not self._rests:
            return "closed"
        return "open" if now < self.rest_until else "half-open"

    def allows(self, now: float) -> bool:
        """Return whether a request may go through now."""
        state = self.state(now)
        return state == "closed" or (state == "half-open" and not self._is_trying)

    def begin(self, now: float) -> bool:
        """Note that a request goes through; return whether it is the one that decides."""
        is_trial = self.state(now) == "half-open"
        self._is_trying |= is_trial
        return is_trial

    def end_trial(self) -> None:
        """Note that the deciding request ended without a decision, or with one."""
        self._is_trying = False

    def succeed(self) -> None:
        """Close."""
        self._failures = self._rests = 0

    def fail(self, now: float) -> None:
        """Count a failure, and open where it is one too many; open already, those that began before say nothing new."""
        if self.state(now) == "open":
            return
        self._failures += 1
        if self._failures >= BREAK_AFTER or self._rests:
            rest = min(REST_S * 2**self._rests, MAX_REST_S)
            self.rest_until = now + rest * random.uniform(0.5, 1.5)
            self._rests += 1

    def let_try(self, now: float) -> None:
        """Become half-open now, where it is open."""
        self.rest_until = min(self.rest_until, now)
