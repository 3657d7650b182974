"""All checks of a running server, from cheap to dear; and of a pair, in the order of a rollout. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from foreword.core.artefact import ArtefactHeader
from foreword.doctor.diagnose import Diagnosis, Step, bisect
from foreword.doctor.finding import Finding
from foreword.doctor.pair import against
from foreword.doctor.server.client import NoLogprobs, ServerUnderTest
from foreword.doctor.server.conformance import check_conformance
from foreword.doctor.server.identity import check_served_version, check_unknown_name, check_usage
from foreword.doctor.server.latency import check_latency
from foreword.doctor.server.limits import check_context, check_decoding
from foreword.doctor.server.rendering import check_rendering
from foreword.doctor.server.sharing import check_batch, check_isolation, check_repeats, check_turns
from foreword.doctor.server.visit import Expected, Logprobs, Visit
from foreword.errors import ForewordError, NotFound, RegistryError
from foreword.registry.records import Version
from foreword.registry.store import Registry

Check = Callable[[Visit], Finding]

CHECKS: tuple[Check, ...] = (
    check_served_version,
    check_repeats,
    check_conformance,
    check_isolation,
    check_turns,
    check_batch,
    check_decoding,
    check_rendering,
    check_context,
    check_usage,
    check_latency,
)
"""Of one name, from cheap to dear; a cause stands before what follows from it."""
ROLLOUT: tuple[tuple[str, tuple[Check, ...]], ...] = (
    ("artefact digest on every replica", (check_served_version,)),
    ("base, tokenizer, template", (check_rendering,)),
    ("conformance", (check_repeats, check_conformance)),
    ("decode parameters", (check_decoding,)),
    ("cache isolation", (check_isolation,)),
    ("replay of batches, turns and limits", (check_batch, check_turns, check_context)),
    ("time", (check_latency,)),
)
"""After a rollout: what is most often wrong and cheapest to ask comes first."""
MAX_SIBLINGS = 5
"""Other versions of a task that are compared, newest first."""
NEED_CALM: tuple[Check, ...] = (check_conformance, check_isolation, check_turns, check_batch)
"""Checks that compare answers, and say nothing where one request has several."""


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What doctor knows besides the server and the registry."""

    dtype: str = "auto"
    """The dtype that the server's base runs in; auto is that of training."""
    tokenizer: Any = None
    """The base's tokenizer as it was in training."""
    base_logprobs: Callable[[Sequence[int]], Logprobs] | None = None
    """The plain base's next-token log-probabilities, from somewhere that is trusted."""
    with_latency: bool = True
    headers: dict[str, ArtefactHeader] = field(default_factory=dict)
    """Read already, by sha256."""


def examine_servers(
    servers: Sequence[ServerUnderTest],
    registry: Registry,
    names: Sequence[str] = (),
    circumstances: Circumstances | None = None,
) -> list[Finding]:
    """Examine servers, each a replica of its own, by the versions that the registry has.

    `names` are those to ask for; none asks for all that a server lists. Nothing there is changed: only requests of a
    client are sent, about a hundred for each version.
    """
    known = circumstances or Circumstances()
    found = []
    for server in servers:
        findings = _examine(server, registry, names, known)
        label = f"{server.url}: " if len(servers) > 1 else ""
        found += [replace(finding, check=label + finding.check) for finding in findings]
    return found


def rollout_steps(
    new: ServerUnderTest,
    good: ServerUnderTest | None,
    registry: Registry,
    names: Sequence[str] = (),
    circumstances: Circumstances | None = None,
) -> list[Step]:
    """Return the steps of a bisection of `new`; `good` is a server that still answers as it should.

    What fails at `good` too is told, but is not the difference. The plain base of `good` is the one that is trusted.
    """
    known = circumstances or Circumstances()
    if good is not None and known.base_logprobs is None and (base := _base_name(good.models())) is not None:
        known = replace(known, base_logprobs=lambda ids: good.next_logprobs(base, ids)[0])
    pairs: list[tuple[Visit, Visit | None]] = []

    def visits() -> list[tuple[Visit, Visit | None]]:
        if not pairs:
            here = _distinct(list(_visits(new, registry, names, known)))
            there = {} if good is None else {v.model: v for v in _visits(good, registry, names, known)}
            pairs.extend((visit, there.get(visit.model)) for visit in here)
        return pairs

    def step(checks: Sequence[Check]) -> Callable[[], Sequence[Finding]]:
        return lambda: [_against(check, visit, other) for visit, other in visits() for check in checks]

    return [Step(name=name, run=step(checks)) for name, checks in ROLLOUT]


def bisect_servers(
    new: ServerUnderTest,
    good: ServerUnderTest | None,
    registry: Registry,
    names: Sequence[str] = (),
    circumstances: Circumstances | None = None,
) -> Diagnosis:
    """Walk the rollout order at `new` and stop at the first step that differs from `good`."""
    subject = f"{new.url}" + (f" against {good.url}" if good is not None else "")
    return bisect(rollout_steps(new, good, registry, names, circumstances), subject)


def _examine(
    server: ServerUnderTest, registry: Registry, names: Sequence[str], known: Circumstances
) -> Iterator[Finding]:
    cards = server.models()
    visits = list(_visits(server, registry, names, known, cards))
    listed = ", ".join(visit.model for visit in visits) or "none"
    yield Finding(check="server", ok=True, measured=f"{server.url}: {len(cards)} models; names to check: {listed}")
    yield from _replicas(server)
    distinct = _distinct(visits)
    for visit in visits:
        if visit not in distinct:
            yield _made(check_served_version, visit)
    for visit in distinct:
        yield from _all_checks(visit, known)
    yield check_unknown_name(server, distinct[0].model if distinct else "the base")


def _all_checks(visit: Visit, known: Circumstances) -> Iterator[Finding]:
    is_calm, answers = True, True
    for check in CHECKS:
        if check is check_latency and not known.with_latency:
            continue
        if not answers or (not is_calm and check in NEED_CALM):
            what = "one answer to one request" if answers else "a version that answers"
            yield Finding(check=_name(check, visit), ok=True, skipped=True, measured=f"needs {what}")
            continue
        finding = _made(check, visit)
        answers = answers and not (check is check_served_version and not finding.ok)
        is_calm = is_calm and not (check is check_repeats and not finding.ok)
        if finding.fault == "numerics":
            visit.dtype = "bfloat16"  # that is found; what differs by more is another fault
        yield finding


def _made(check: Check, visit: Visit) -> Finding:
    """Make a check; a server that fails in it is told as such, and the other checks go on."""
    try:
        return check(visit)
    except NoLogprobs as error:
        what = "log-probabilities by token id (`logprobs` with `return_tokens_as_token_ids`)"
        return Finding(check=_name(check, visit), ok=True, skipped=True, measured=f"needs {what}: {error.message}")
    except ForewordError as error:
        fix = error.hint or "Look into the server's log."
        return Finding(check=_name(check, visit), ok=False, measured=error.message, expected="an answer", fix=fix)


def _against(check: Check, visit: Visit, other: Visit | None) -> Finding:
    """Make a check here, and where it fails at the good server too."""
    finding = _made(check, visit)
    return finding if finding.ok or other is None else against(finding, _made(check, other))


def _name(check: Check, visit: Visit) -> str:
    return f"{visit.model} {check.__name__.removeprefix('check_').removeprefix('served_')}"


def _replicas(server: ServerUnderTest) -> Iterator[Finding]:
    """Name the replicas behind a gateway, where the key may ask: each can be examined by its own URL."""
    for state in server.replicas() or ():
        told = ", ".join(f"{name} {value}" for name, value in state.items() if name != "url")
        yield Finding(check="replica", ok=True, measured=f"{state.get('url')}: {told}")


def _visits(
    server: ServerUnderTest,
    registry: Registry,
    names: Sequence[str],
    known: Circumstances,
    cards: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[Visit]:
    """Return a visit for each name: as asked for, else as listed, else each task of the registry."""
    cards = server.models() if cards is None else cards
    base = _base_name(cards)
    chosen = list(names) or [card["id"] for card in cards if card.get("parent")]
    if not chosen:  # the server lists no version: those of another base are not listed
        chosen = [task.name for task in registry.tasks()] or [card["id"] for card in cards]
    everything = {name: _expected(registry, name, known) for name in _all_names(cards, chosen)}
    for name in chosen:
        version = everything[name]
        dtype = known.dtype
        if dtype == "auto":
            dtype = str(version.header.training.get("dtype", "bfloat16")) if version else "bfloat16"
        yield Visit(
            server=server,
            model=name,
            version=version,
            base_name=base,
            neighbours=[(other, its) for other, its in everything.items() if other not in (name, base)],
            siblings=_siblings(registry, version, known),
            resolve=_resolver(registry, name, known),
            dtype=dtype,
            tokenizer=known.tokenizer,
            base_logprobs=known.base_logprobs,
        )


def _all_names(cards: Sequence[Mapping[str, Any]], chosen: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*chosen, *(str(card["id"]) for card in cards if card.get("parent"))]))


def _base_name(cards: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the plain base's name: the parent of a version, else the first model without one."""
    parents = [str(card["parent"]) for card in cards if card.get("parent")]
    plain = [str(card["id"]) for card in cards if not card.get("parent")]
    return next(iter([*parents, *plain]), None)


def _distinct(visits: Sequence[Visit]) -> list[Visit]:
    """Return one visit for each version: its aliases answer alike."""
    found: dict[str, Visit] = {}
    for visit in visits:
        found.setdefault(visit.version.sha256 if visit.version else visit.model, visit)
    return list(found.values())


def _expected(registry: Registry, name: str, known: Circumstances) -> Expected | None:
    try:
        return _with_header(registry, registry.resolve(name), known)
    except NotFound:
        return None


def _with_header(registry: Registry, version: Version, known: Circumstances) -> Expected:
    if version.sha256 not in known.headers:
        known.headers[version.sha256] = registry.header(version)
    header = known.headers[version.sha256]
    return Expected(reference=version.reference, sha256=version.sha256, header=header, path=registry.path(version))


def _siblings(registry: Registry, version: Expected | None, known: Circumstances) -> Callable[[], Sequence[Expected]]:
    def read() -> Sequence[Expected]:
        if version is None:
            return ()
        task = version.reference.partition("@")[0]
        try:
            others = [other for other in registry.versions(task) if other.sha256 != version.sha256]
        except RegistryError:
            return ()
        newest = sorted(others, key=lambda other: -other.number)[:MAX_SIBLINGS]
        return [_with_header(registry, other, known) for other in newest]

    return read


def _resolver(registry: Registry, name: str, known: Circumstances) -> Callable[[], Expected | None]:
    return lambda: _expected(registry, name, known)
