"""What a check found: the measurement, what was expected, and the cure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check measured."""

    check: str
    ok: bool
    measured: str
    """The measurement in words, with its numbers."""
    expected: str = ""
    """What a healthy system shows in its place."""
    fix: str = ""
    fault: str = ""
    """A name of `foreword.doctor.faults.FAULTS` where this finding proves one; "" otherwise."""
    skipped: bool = False
    """The check could not be made; `measured` says what it would have needed. `ok` is True then."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The measurement for programs, JSON-ready."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return dataclasses.asdict(self)
