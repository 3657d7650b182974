"""Who answers: names, versions, replicas; and whether what must not be answered is refused. No torch."""

from __future__ import annotations

import re
import time

from foreword.doctor.checks.artefact import BASE_FIELDS
from foreword.doctor.finding import Finding
from foreword.doctor.server.client import Answer, Refused, ServerUnderTest
from foreword.doctor.server.visit import Expected, Visit
from foreword.errors import BackendFailed

SETTLE_S = 1.2
"""A promotion is in force at every gateway within a second."""
NEVER_PUBLISHED = "doctor-asks-for-a-name-that-nobody-has"


def check_unknown_name(server: ServerUnderTest, model: str) -> Finding:
    """A name that nobody published must be refused: a server that answers it with the plain base hides every loss.

    Asks for a made-up name beside `model`; 404 is right, any answer is wrong.
    """
    name = "unknown name"
    expected = "an error, 404 as OpenAI's, and no text"
    try:
        answer = server.complete(NEVER_PUBLISHED, [1], logprobs=None, return_tokens_as_token_ids=None)
    except Refused as refusal:
        ok = 400 <= refusal.answered < 500
        fix = "Answer 404 for a name that is not there: a server error is tried again by clients."
        measured = f"{NEVER_PUBLISHED!r} is refused with {refusal.answered}"
        return Finding(check=name, ok=ok, measured=measured, expected=expected, fix=fix)
    except BackendFailed as error:
        return Finding(check=name, ok=True, skipped=True, measured=f"needs an answer or an error: {error.message}")
    measured = f"{NEVER_PUBLISHED!r} is answered like {model}: {answer.text!r:.60}"
    fix = "Fail closed: a task that cannot be loaded or found must never be answered by the plain base."
    return Finding(check=name, ok=False, measured=measured, expected=expected, fix=fix)


def check_served_version(visit: Visit) -> Finding:
    """Compare the digest in the answer's header with the registry's: a promotion reaches every replica within a second.

    Proves a stale replica or cache where the digest is that of another version. Ask each replica by its own URL.
    """
    name, version = f"{visit.model} version", visit.version
    if version is None:
        return _needs(name, "a registry that knows this name (--home)")
    try:
        answer = visit.server.complete(visit.model, visit.fresh_ids(2))
        if answer.digest and not _is_right(answer, version, visit):
            time.sleep(SETTLE_S)
            version = visit.resolve() or version
            answer = visit.server.complete(visit.model, visit.fresh_ids(2))
    except Refused as refusal:
        return _refused(visit, name, refusal)
    if not answer.digest:
        return _needs(
            name, "the header x-foreword-digest, which foreword's gateway sends: nobody says which file this is"
        )
    if _is_right(answer, version, visit):
        visit.version = version
        said = f"{version.sha256[:12]}, {version.reference}"
        return Finding(check=name, ok=True, measured=said + (" (by its canary)" if answer.route == "canary" else ""))
    other = next((known for known in visit.siblings() if known.sha256 == answer.digest), None)
    who = f"{other.reference}, {answer.digest[:12]}" if other else f"{answer.digest[:12]}, which this registry has not"
    fix = "Restart or drain this replica; put the artefact's digest into every cache key, so that no old one is found."
    if other is None:
        fix = "Give server and doctor the same registry (--home), or find who answers in its place."
    return Finding(
        check=name,
        ok=False,
        measured=f"{visit.server.url} answers {visit.model} with {who}; expected {version.sha256[:12]}",
        expected=f"{version.reference}, {version.sha256[:12]}, as the registry says",
        fix=fix,
        fault="stale-version",
        numbers={"served": answer.digest, "expected": version.sha256},
    )


def check_usage(visit: Visit) -> Finding:
    """Compare the tokens that are charged with those that were sent: the vectors' positions are nobody's prompt."""
    name, count = f"{visit.model} usage", 5
    answer = visit.server.complete(visit.model, visit.fresh_ids(count), max_tokens=2)
    said = answer.usage.get("prompt_tokens"), answer.usage.get("completion_tokens")
    if said == (None, None):
        return _needs(name, "the field `usage` in answers")
    return Finding(
        check=name,
        ok=said == (count, 2),
        measured=f"{said[0]} prompt and {said[1]} completion tokens for {count} sent and 2 asked for",
        expected=f"{count} and 2",
        fix="Subtract the block's positions from the engine's count: clients did not send them.",
        numbers={"prompt_tokens": said[0], "completion_tokens": said[1]},
    )


def fault_of_refusal(refusal: Refused) -> str:
    """Return the fault that a refusal names: the field of the base's fingerprint that differs; "" for others."""
    found = re.search(r"\b(" + "|".join(BASE_FIELDS) + r")\b", refusal.message)
    return BASE_FIELDS[found.group()] if found else ""


def _is_right(answer: Answer, version: Expected, visit: Visit) -> bool:
    if answer.digest == version.sha256:
        return True
    return answer.route == "canary" and any(known.sha256 == answer.digest for known in visit.siblings())


def _refused(visit: Visit, name: str, refusal: Refused) -> Finding:
    fault = fault_of_refusal(refusal)
    fix = "Serve the version on the base it was trained for, or train again for this one."
    if not fault:
        fix = "Check the name, the registry that the server reads, and its log."
    return Finding(
        check=name,
        ok=False,
        measured=f"{visit.model} is refused: {refusal.message}",
        expected="an answer",
        fix=fix,
        fault=fault,
        numbers={"status": refusal.answered},
    )


def _needs(name: str, what: str) -> Finding:
    return Finding(check=name, ok=True, skipped=True, measured=f"needs {what}")
