"""Good then, bad now: what differs between two examinations of the same kind, and the first of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from foreword.doctor.diagnose import Diagnosis, Step, bisect
from foreword.doctor.finding import Finding

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel


def against(finding: Finding, good: Finding | None) -> Finding:
    """Return a finding as it counts beside the good one's: what both show is not what changed."""
    if finding.ok or good is None or good.ok or good.fault != finding.fault:
        return finding
    said = f"the good one shows it too, so it is not what changed: {finding.measured}"
    return replace(finding, ok=True, measured=said)


def bisect_artefacts(new: Path, good: Path | None, base: FrozenModel | None, subject: str = "") -> Diagnosis:
    """Walk the order of a rollout for what a file says, and stop at the first step that `good` does not show too.

    Both are artefacts or PEFT directories; of the latter, the checks of a directory are the steps. Without `good` it is
    the first that does not hold.
    """
    here, there = _steps(new, base), [] if good is None else _steps(good, base)
    known = {step.name: step for step in there}
    return bisect([Step(name=step.name, run=_beside(step, known.get(step.name))) for step in here], subject)


def _beside(step: Step, good: Step | None) -> Callable[[], Sequence[Finding]]:
    """Return a step's run with the good one's findings beside it; those are looked for only where something differs."""

    def run() -> Sequence[Finding]:
        found = list(step.run())
        if good is None or all(finding.ok for finding in found):
            return found
        known = {finding.check: finding for finding in good.run()}
        return [against(finding, known.get(finding.check)) for finding in found]

    return run


def _steps(path: Path, base: FrozenModel | None) -> list[Step]:
    from foreword.doctor.checks.artefact import check_artefact
    from foreword.doctor.checks.rollout import Rollout, rollout_steps

    if not path.is_dir():
        return rollout_steps(Rollout(artefact=path, base_now=base))
    return [
        Step(name=finding.check, run=lambda found=finding: [found])  # type: ignore[misc]
        for finding in check_artefact(path, base)
    ]
