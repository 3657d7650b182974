"""What the laboratory's shelves hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from foreword.doctor.diagnose import diagnose
from foreword.doctor.finding import Finding


def examine(subject: Any) -> Sequence[Finding]:
    """Return doctor's findings on a subject, in its order."""
    return diagnose(subject).findings


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """A system with one fault, handed over as its owner would."""

    fault: str
    """The name of `foreword.doctor.faults.FAULTS` that doctor has to name first."""
    architecture: str
    make: Callable[[], Any]
    """Builds the subject; the same one at every call."""
    variant: str
    """How the fault was made, in a few words; unique together with fault and architecture."""
    proof: Callable[[Any], tuple[float, float]]
    """Of a subject, without doctor: (measured, bound). The fault is real where measured > bound."""
    also: frozenset[str] = frozenset()
    """Names that are as right as `fault`, where the catalogue gives the same system two names."""
    cheap: bool = False
    """Part of the cross-section that every run of the tests takes."""
    examine: Callable[[Any], Sequence[Finding]] = examine
    """Subject -> doctor's findings, in its order."""

    def diagnose(self) -> Sequence[Finding]:
        """Build the subject and return doctor's findings; the first that is not ok should name the fault."""
        return self.examine(self.make())

    @property
    def name(self) -> str:
        """Its name among all plants."""
        return f"{self.fault}-{self.architecture}-{self.variant}".replace(" ", "_")

    def named_by(self, fault: str) -> bool:
        """Whether `fault` is a right name of it."""
        return fault == self.fault or fault in self.also


@dataclass(frozen=True, slots=True, kw_only=True)
class Healthy:
    """A system without a fault: doctor must find nothing."""

    name: str
    make: Callable[[], Any]
    proof: Callable[[Any], tuple[float, float]] | None = None
    """Of a subject, without doctor: (measured, bound). It is healthy where measured <= bound."""
    cheap: bool = False
    examine: Callable[[Any], Sequence[Finding]] = examine
    """Subject -> doctor's findings, in its order."""

    def diagnose(self) -> Sequence[Finding]:
        """Build the subject and return doctor's findings, of which none should be amiss."""
        return self.examine(self.make())
