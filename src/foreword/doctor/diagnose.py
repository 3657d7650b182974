"""Diagnosis: all checks of a subject, in an order in which the first finding is the cause.

A check that cannot be made says what it would have needed, and the others go on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from foreword.doctor.faults import FAULTS
from foreword.doctor.finding import Finding
from foreword.errors import ForewordError
from foreword.report import Bullets, Report, Section, Table, Text

ROOMS = {
    "Implementation": "foreword.doctor.checks.implementation",
    "TrainingRun": "foreword.doctor.checks.training",
    "Evaluation": "foreword.doctor.checks.evaluation",
}
"""By a subject's type, the module whose `CHECKS` examine it; its `examined(subject)`, where it has one, is a context
that yields what the checks take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings of one examination, the cause first."""

    findings: tuple[Finding, ...]
    subject: str = ""
    """What was examined, in a few words."""

    @property
    def first(self) -> Finding | None:
        """The first finding that is not as it should be: the cause of those behind it, as far as known."""
        return next((finding for finding in self.findings if not finding.ok), None)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return self.first is None

    @property
    def faults(self) -> tuple[str, ...]:
        """The names of the faults found, without repetition, the cause first."""
        return tuple(dict.fromkeys(finding.fault for finding in self.findings if not finding.ok and finding.fault))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        first = self.first
        return {
            "subject": self.subject,
            "ok": self.ok,
            "first": None if first is None else first.to_json(),
            "faults": list(self.faults),
            "findings": [finding.to_json() for finding in self.findings],
        }

    def report(self) -> Report:
        """Return the report: the cause with its proof and cure, then every check."""
        title = f"Diagnosis of {self.subject}" if self.subject else "Diagnosis"
        rows = tuple((finding.check, _state(finding), finding.measured) for finding in self.findings)
        table = Table(("check", "state", "measured"), rows)
        return Report(title, (_verdict(self), Section("Every check", (table,))), data=self.to_json())


def _state(finding: Finding) -> str:
    if finding.skipped:
        return "not made"
    return "ok" if finding.ok else finding.fault or "differs"


def _verdict(diagnosis: Diagnosis) -> Section:
    first = diagnosis.first
    made = sum(not finding.skipped for finding in diagnosis.findings)
    if first is None:
        skipped = len(diagnosis.findings) - made
        left = f" {skipped} could not be made; the table says what they would have needed." if skipped else ""
        return Section("Nothing was found", (Text(f"{made} checks were made, and all hold.{left}"),))
    name = f"**{first.fault}**: {FAULTS.get(first.fault, '')}." if first.fault else f"`{first.check}` does not hold."
    blocks: list[Text | Bullets] = [Text(name), Text(f"Measured: {first.measured}")]
    if first.expected:
        blocks.append(Text(f"Expected: {first.expected}"))
    if first.fix:
        blocks.append(Text(f"Cure: {first.fix}"))
    others = [f for f in diagnosis.findings if not f.ok and f is not first]
    if others:
        blocks.append(Text("Found besides. Cure the first, then run again: some of these may follow from it."))
        blocks.append(Bullets(tuple(f"{f.fault or f.check}: {f.measured}" for f in others)))
    return Section("The first thing that is wrong", tuple(blocks))


def diagnose(subject: object) -> Diagnosis:
    """Examine an `Implementation`, a `TrainingRun` or an `Evaluation` (foreword.doctor.subjects).

    Nothing of the subject is changed. The checks run from cheap to dear, and a cause stands before what follows from
    it. Raises TypeError for another kind of subject.
    """
    name = type(subject).__name__
    if name not in ROOMS:
        raise TypeError(f"doctor examines {', '.join(ROOMS)}, not {name}")
    room = importlib.import_module(ROOMS[name])
    if not hasattr(room, "examined"):
        return Diagnosis(findings=tuple(run_checks(room.CHECKS, subject)), subject=name)
    with room.examined(subject) as examination:
        return Diagnosis(findings=tuple(run_checks(room.CHECKS, examination)), subject=str(examination))


def run_checks(checks: Iterable[Callable[[Any], Finding]], subject: Any) -> Iterator[Finding]:
    """Make checks one after the other; one that raises becomes a finding that says so, and the others go on."""
    for check in checks:
        name = check.__name__.removeprefix("check_").replace("_", "-")
        try:
            yield check(subject)
        except Exception as error:  # other people's code runs inside a check, and may raise anything
            said = error.message if isinstance(error, ForewordError) else f"{type(error).__name__}: {error}"
            yield Finding(check=name, ok=True, skipped=True, measured=f"not made: its probe failed with {said:.300}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a bisection: a group of faults that its checks find or clear."""

    name: str
    run: Callable[[], Sequence[Finding]]


def bisect(steps: Sequence[Step], subject: str = "") -> Diagnosis:
    """Walk the steps from cheap to dear and stop at the first one that differs.

    A step whose findings all hold is said to be cleared, in one finding; of the one that differs all findings are kept,
    those that do not hold first. What cannot be made is told as such and the walk goes on. The steps behind the
    stop were not run, and are not in the result.
    """
    findings: list[Finding] = []
    for step in steps:
        try:
            found = list(step.run())
        except Exception as error:  # a step talks to servers and other people's code
            said = error.message if isinstance(error, ForewordError) else f"{type(error).__name__}: {error}"
            findings.append(
                Finding(check=step.name, ok=True, skipped=True, measured=f"not made: the step failed with {said:.300}")
            )
            continue
        wrong = [finding for finding in found if not finding.ok]
        if wrong:
            findings.extend(wrong)
            findings.extend(finding for finding in found if finding.ok)
            break
        made = [finding for finding in found if not finding.skipped]
        if not made:
            needs = "; ".join(finding.measured for finding in found) or "it has no checks"
            findings.append(Finding(check=step.name, ok=True, skipped=True, measured=f"not made: {needs}"))
            continue
        said = "; ".join(f"{finding.check}: {finding.measured}" for finding in made)
        findings.append(Finding(check=step.name, ok=True, measured=f"cleared: {said}"))
    return Diagnosis(findings=tuple(findings), subject=subject)
