"""Good then, bad now: the steps of a bisection from cheap to dear, for what lies in files and reports.

`foreword.doctor.diagnose.bisect` walks them and stops at the first that differs. Running servers have steps of their
own (foreword.doctor.server).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.core.artefact import Artefact, file_sha256
from foreword.core.spec import Fingerprint
from foreword.doctor.checks import artefact as artefact_checks
from foreword.doctor.checks.artefact_file import open_artefact
from foreword.doctor.checks.evaluation_changes import check_change, check_decoding, check_traffic
from foreword.doctor.checks.evaluation_scores import check_claimed_score
from foreword.doctor.diagnose import Step
from foreword.doctor.finding import Finding
from foreword.doctor.probe_training import skipped
from foreword.doctor.subjects import Evaluation, Implementation

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What is known of a version when it was good, and of the same now; every part is optional."""

    artefact: Path | None = None
    """The file that was published."""
    served: Mapping[str, Path] = field(default_factory=dict)
    """By replica, the file that it serves from."""
    base_then: FrozenModel | None = None
    base_now: FrozenModel | None = None
    fingerprint_then: Fingerprint | None = None
    """In place of `base_then`; where both are missing, what the artefact's header keeps."""
    implementation: Implementation | None = None
    """What runs now, to be watched inside."""
    evaluation: Evaluation | None = None
    """Decoding parameters, reports and requests of then and now."""

    @cached_property
    def opened(self) -> tuple[Artefact | None, Finding]:
        """The artefact, and what is to be said of its file."""
        if self.artefact is None:
            return None, skipped("file", "the file that was published")
        return open_artefact(self.artefact)


def rollout_steps(rollout: Rollout) -> list[Step]:
    """Return the steps in the order of a rollout's bisection; each names a fault with its measurement, or clears it."""
    named: list[tuple[str, Callable[[Rollout], Sequence[Finding]]]] = [
        ("artefact digests", check_digests),
        ("base, tokenizer, template", check_identities),
        ("stored vectors", check_vectors),
        ("shape trace", check_inside),
        ("conformance", check_probes),
        ("decoding parameters", lambda known: _of_evaluation(known, check_decoding)),
        ("offline set", lambda known: _of_evaluation(known, check_claimed_score)),
        ("traffic and noise", lambda known: _of_evaluation(known, check_traffic, check_change)),
    ]
    return [Step(name=name, run=partial(check, rollout)) for name, check in named]


def check_digests(rollout: Rollout) -> Sequence[Finding]:
    """Put the digest into cache keys and response headers, and roll replicas that hold another file.

    The sha256 of the file on every replica beside that of the file that was published.
    """
    if rollout.artefact is None or not rollout.served:
        return [skipped("artefact digests", "the published file and those of the replicas")]
    wanted = file_sha256(rollout.artefact)
    found = {name: file_sha256(path) for name, path in rollout.served.items()}
    other = {name: digest for name, digest in found.items() if digest != wanted}
    said = ", ".join(f"{name} has {digest[:12]}" for name, digest in other.items())
    return [
        Finding(
            check="artefact digests",
            ok=not other,
            measured=f"{len(other)} of {len(found)} replicas hold another file than {wanted[:12]}"
            + (f": {said}" if said else ""),
            expected="the published file on every replica",
            fix="Roll these replicas again, and clear caches whose keys lack the digest.",
            fault="stale-version" if other else "",
            numbers={"published": wanted, "served": found},
        )
    ]


def check_identities(rollout: Rollout) -> Sequence[Finding]:
    """Serve on the base, tokenizer and template of then: hashes of both, and the rendered block."""
    now = rollout.base_now
    if now is None:
        return [skipped("base", "the base that serves now")]
    found: list[Finding] = []
    artefact, _ = rollout.opened
    then = rollout.fingerprint_then or (rollout.base_then.fingerprint if rollout.base_then is not None else None)
    if then is not None:
        difference = then.first_difference(now.fingerprint)
        field, before, after = difference or ("", "", "")
        told = f"{field} was {before[:16]}, is {after[:16]}" if difference else "base, tokenizer and template as then"
        found.append(
            Finding(
                check="base then and now",
                ok=difference is None,
                measured=told,
                expected="one fingerprint then and now",
                fix="Serve the base of then, or train again on this one.",
                fault=artefact_checks.BASE_FIELDS.get(field, ""),
                numbers={"field": field, "then": before, "now": after},
            )
        )
    if artefact is not None:
        found += [artefact_checks.check_base(artefact, now), artefact_checks.check_rendering(artefact, now)]
    return found or [skipped("base", "the artefact, or the base of then")]


def check_vectors(rollout: Rollout) -> Sequence[Finding]:
    """Examine the file itself: safe, whole, finite, of the base's shapes, not the same in every layer."""
    from foreword.doctor.checks.artefact_vectors import check_layers_differ, check_sizes, parts_of

    artefact, file = rollout.opened
    if artefact is None:
        return [file]
    parts = parts_of(artefact.tensors)
    shapes = [] if rollout.base_now is None else [artefact_checks.check_shapes(artefact, rollout.base_now)]
    return [file, *shapes, check_sizes(parts), check_layers_differ(parts)]


def check_inside(rollout: Rollout) -> Sequence[Finding]:
    """Watch the model that serves from inside: where vectors enter, how long each layer's sequence is."""
    if rollout.implementation is None:
        return [skipped("shape trace", "the implementation that serves, as a subject")]
    from foreword.doctor.diagnose import diagnose

    return diagnose(rollout.implementation).findings


def check_probes(rollout: Rollout) -> Sequence[Finding]:
    """Replay the conformance probes that were kept when training ended."""
    artefact, _ = rollout.opened
    if artefact is None or rollout.base_now is None:
        return [skipped("conformance", "the artefact, and the base that serves now")]
    return [artefact_checks.check_conformance(artefact, rollout.base_now)]


def _of_evaluation(rollout: Rollout, *checks: Callable[[Evaluation], Finding]) -> Sequence[Finding]:
    given: Any = rollout.evaluation or Evaluation()
    return [check(given) for check in checks]
