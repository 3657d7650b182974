"""Is it the computation that the vectors were trained in? And if not, which other one is it? No torch.

A replay alone says yes or no. Each cause is proved by a comparison of its own: with the plain base's answers, another
version's probes, another task's answers, the shape of the difference, and the plain base against one that is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foreword.core.conformance import TOLERANCES, Conformance, check_probe, divergence, judge
from foreword.doctor.finding import Finding
from foreword.doctor.server.shape import has_shift, setting_between
from foreword.doctor.server.visit import Expected, Replay, Visit, distance
from foreword.errors import ForewordError

FEW = 4
"""Probes asked to tell causes apart."""
SAME_SETTING = 0.6
"""Share of the probes that differ which must show one setting."""


@dataclass(frozen=True, slots=True)
class Cause:
    """What else the server computes."""

    fault: str
    proof: str
    fix: str


def check_conformance(visit: Visit) -> Finding:
    """Replay the probes that the version carries: the best 20 log-probabilities must be those seen in training.

    Where they are not, other comparisons say what is computed in their place.
    """
    name = f"{visit.model} conformance"
    if visit.version is None:
        return _not_made(name, "a registry that knows this name (--home), and a version with probes")
    if not visit.probes:
        return _not_made(name, "conformance probes in the artefact, which foreword train and publish write")
    replay = visit.replay
    whole, straight = replay.judged(visit.dtype), replay.judged(visit.dtype, "straight")
    numbers = {"max_kl": whole.max_kl, "mean_kl": whole.mean_kl, "agree": whole.num_agree, "of": whole.num_probes}
    cause = _shifted(visit, replay)
    if cause is None and (whole.ok or straight.ok):
        return Finding(check=name, ok=True, measured=(whole if whole.ok else straight).message, numbers=numbers)
    cause = cause or find_cause(visit, replay)
    return Finding(
        check=name,
        ok=False,
        measured=f"{whole.message}; {cause.proof}",
        expected=f"max KL up to {whole.tolerance.max_kl:g}, mean KL up to {whole.mean_kl_allowed:.2g}",
        fix=cause.fix,
        fault=cause.fault,
        numbers=numbers,
    )


def find_cause(visit: Visit, replay: Replay) -> Cause:
    """Return the first cause that a comparison proves, from the plainest to the least."""
    for look in (_another_version, _plain_base, _another_task):
        if (cause := look(visit, replay)) is not None:
            return cause
    return _base_or_numbers(visit, replay)


def _another_version(visit: Visit, replay: Replay) -> Cause | None:
    """Probes of the task's other versions hold here: the digest in the header is right, the vectors are not."""
    for other in visit.siblings():
        judged = _judge_other(visit, other)
        if judged is not None and judged.ok and (visit.version is None or not visit.version.has_vectors_of(other)):
            proof = f"but the probes of {other.reference} hold: {judged.message}"
            fix = "Empty the caches of this replica or restart it: a key somewhere lacks the artefact's digest."
            return Cause("stale-version", proof, fix)
    return None


def _judge_other(visit: Visit, other: Expected) -> Conformance | None:
    probes = other.header.conformance[:FEW]
    if not probes:
        return None
    rows = [check_probe(probe, other.header.spec.vocab_size) for probe in probes]
    return judge(probes, [visit.server.next_logprobs(visit.model, ids)[0] for ids in rows], visit.dtype)


def _plain_base(visit: Visit, replay: Replay) -> Cause | None:
    """The plain base answers the same: the vectors do not reach the model (probe U2: their effect is zero)."""
    if visit.base_name is None or visit.version is None:
        return None
    literal = visit.version.header.block.literal_ids()
    soft = set(visit.version.header.block.soft_positions())
    hard = [token for place, token in enumerate(literal) if place not in soft]
    for lead, what in (([], "text alone"), (hard, "hard text and text")):
        if what != "text alone" and not hard:
            continue
        answers = [visit.server.next_logprobs(visit.base_name, [*lead, *p["ids"]])[0] for p in replay.probes[:FEW]]
        effect = [distance(a, b) for a, b in zip(answers, replay.found, strict=False)]
        own = [divergence(_stored(probe), a) for probe, a in zip(replay.probes, answers, strict=False)]
        if visit.within(effect).ok and not visit.within(own).ok:
            proof = (
                f"the plain base {visit.base_name} answers the same ({what}): effect of the vectors "
                f"{max(effect):.2g} nats here, {max(own):.2g} in training"
            )
            fix = "Have the engine load the vectors; let its mask and its cache begin with their positions."
            return Cause("mask-blind", proof, fix)
    return None


def _another_task(visit: Visit, replay: Replay) -> Cause | None:
    """Another name answers the same: whoever asked first filled a cache that both read."""
    if visit.neighbour is None or visit.neighbour[1] is None:
        return None
    name = visit.neighbour[0]
    rows = [probe["ids"] for probe in replay.probes[:FEW]]
    answers = [visit.server.next_logprobs(name, ids)[0] for ids in rows]
    distances = [distance(a, b) for a, b in zip(answers, replay.found, strict=False)]
    if not visit.within(distances).ok:
        return None
    proof = f"the answers are those of {name}: {max(distances):.2g} nats apart"
    return Cause("cache-shared", proof, "Put the artefact's digest into the key (salt) of the prefix cache.")


def _shifted(visit: Visit, replay: Replay) -> Cause | None:
    """The difference has the shape of a sampling setting: a bias on few tokens, a penalty, a temperature."""
    wrong = [
        (probe, found)
        for probe, found in zip(replay.probes, replay.found, strict=True)
        if not judge([probe], [found], visit.dtype).ok or has_shift(_stored(probe), found, visit.dtype)
    ]
    settings = [setting_between(_stored(probe), found, set(probe["ids"]), visit.dtype) for probe, found in wrong]
    kind = max(settings, key=settings.count, default="")
    least = 1 if visit.dtype == "float32" else 2
    if not kind or settings.count(kind) < max(least, SAME_SETTING * len(settings)):
        return None
    shown = f"{settings.count(kind)} of {len(settings)} probes that differ"
    proof = f"the log-probabilities differ from the stored ones as under {kind}, in {shown}"
    fix = "Send sampling parameters with each request, or take the server's own defaults out (generation_config)."
    return Cause("decoding-drift", proof, fix)


def _base_or_numbers(visit: Visit, replay: Replay) -> Cause:
    """Tell another base from other numerics: by the plain base where one is trusted, by size where none is."""
    bfloat16 = TOLERANCES["bfloat16"]
    kls = [divergence(_stored(p), found) for p, found in zip(replay.probes, replay.found, strict=True)]
    if visit.base_logprobs is not None and visit.base_name is not None:
        rows = [check_probe(p, 2**31) for p in replay.probes[:FEW]]
        here = [visit.server.next_logprobs(visit.base_name, ids)[0] for ids in rows]
        distances = [divergence(visit.base_logprobs(ids), found) for ids, found in zip(rows, here, strict=True)]
        if visit.within(distances).ok:
            proof = f"the plain base answers as it should (KL {max(distances):.2g}): it is the vectors"
            return Cause(
                "", proof, "Compile the version again; check the artefact: `foreword doctor FILE --base BASE`."
            )
        kls = [*kls, *distances]
        said = f"the plain base itself differs by up to KL {max(distances):.2g}"
    elif (other := _another_holds(visit)) is not None:
        proof = f"the base is right, for {other} holds here"
        return Cause("", proof, "Compile the version again; check the artefact: `foreword doctor FILE --base BASE`.")
    else:
        said = "no version holds here; --base would say whether it is the base or the vectors"
    factor = 1 if visit.dtype != "bfloat16" else 3
    if max(kls) <= factor * bfloat16.max_kl and sum(kls) / len(kls) <= factor * bfloat16.mean_kl * (1 + 4 / len(kls)):
        proof = f"the differences are as small as rounding to bfloat16 makes them, but not {visit.dtype}'s; {said}"
        fix = (
            "Serve with the dtype, quantisation and cache dtype of training, or validate the version again under these."
        )
        return Cause("numerics", proof, fix)
    proof = f"the differences are far above rounding; {said}"
    fix = "Serve the revision that it was trained on (compare config.json and weights), or train again for this one."
    return Cause("other-base", proof, fix)


def _another_holds(visit: Visit) -> str | None:
    for name, other in visit.neighbours:
        probes = other.header.conformance[:FEW] if other is not None else ()
        if other is None or not probes:
            continue
        try:
            found = [visit.server.next_logprobs(name, probe["ids"])[0] for probe in probes]
        except ForewordError:
            continue
        if judge(probes, found, visit.dtype).ok:
            return name
    return None


def _stored(probe: Mapping[str, Any]) -> dict[int, float]:
    return dict(zip(probe["top"], probe["logprobs"], strict=True))


def _not_made(name: str, what: str) -> Finding:
    return Finding(check=name, ok=True, skipped=True, measured=f"needs {what}")
