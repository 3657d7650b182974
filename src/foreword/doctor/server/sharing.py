"""What one request may see of others: nothing. Repeats, neighbours, earlier turns, and the rows of a batch. No torch.

Every check compares answers of this server with each other, on prompts that nobody has sent before, so it needs no
reference and works on other people's servers too.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from foreword.core.conformance import judge
from foreword.doctor.finding import Finding
from foreword.doctor.server.client import Answer
from foreword.doctor.server.shape import has_shift, setting_between
from foreword.doctor.server.visit import SHORT_TOKENS, Apart, Visit, apart, distance

NUM_REPEATS = 6
NUM_FRESH = 3
"""Prompts for each order of two tasks."""
NEW_TOKENS = 6
ROW_LENGTHS = (3, 9, 10, 11, 12, 40)
"""Rows of one batch: near lengths, which an engine puts together, and far ones, which it would pad most."""
SAME = 0.1
"""Two tasks whose answers differ by less than this part of rounding's mean are one task."""


def check_repeats(visit: Visit) -> Finding:
    """Ask the very same several times, alone: greedy log-probabilities must not change.

    Noise, dropout or a training mode show as answers that all differ; replicas with different versions as answers of
    two kinds.
    """
    name = f"{visit.model} repeats"
    ids = visit.fresh_ids(SHORT_TOKENS)
    answers = [visit.server.complete(visit.model, ids, max_tokens=2) for _ in range(NUM_REPEATS)]
    spread = visit.between((answers[0], answer) for answer in answers[1:])
    measured = f"{NUM_REPEATS} times the same request: {spread.message} places"
    if spread.ok:
        return Finding(check=name, ok=True, measured=measured, numbers=spread.to_json())
    kinds = _kinds(visit, answers)
    if len(kinds) == 2 and min(map(len, kinds)) > 1 and (mixed := _mixed_versions(visit)):
        return Finding(
            check=name,
            ok=False,
            measured=f"{measured}; they are of two kinds, and {mixed}",
            expected="one answer, from one version",
            fix="Restart or drain the replica with the old version; put the artefact's digest into every cache key.",
            fault="stale-version",
            numbers=spread.to_json(),
        )
    return Finding(
        check=name,
        ok=False,
        measured=f"{measured}; {len(kinds)} different answers",
        expected=f"the same log-probabilities, within KL {visit.tolerance.max_kl:g}",
        fix="Serve in evaluation mode (model.eval()), without dropout, noise or stochastic rounding.",
        fault="nondeterminism",
        numbers=spread.to_json(),
    )


def _kinds(visit: Visit, answers: Sequence[Answer]) -> list[list[Answer]]:
    kinds: list[list[Answer]] = []
    for answer in answers:
        known = next((kind for kind in kinds if visit.between([(kind[0], answer)]).ok), None)
        if known is None:
            kinds.append([answer])
        else:
            known.append(answer)
    return kinds


def _mixed_versions(visit: Visit) -> str:
    """Return which version answers in the place of the right one now and then, or ""."""
    for other in visit.siblings():
        probes = other.header.conformance[:1]
        if not probes:
            continue
        found = [visit.server.next_logprobs(visit.model, probes[0]["ids"])[0] for _ in range(NUM_REPEATS)]
        holding = sum(judge(probes, [answer], visit.dtype).ok for answer in found)
        if 0 < holding < NUM_REPEATS:
            return f"a probe of {other.reference} holds {holding} of {NUM_REPEATS} times"
    return ""


def check_isolation(visit: Visit) -> Finding:
    """Ask another task first, then this one, the same tokens: the answer must be this task's own.

    Prompts are new, so nothing of them is cached; and long, so that they fill whole blocks. A prefix cache whose key
    lacks the artefact's digest gives both tasks one answer, whoever asks first. Probes asked right after another task
    asked the same must hold as well as those asked alone.
    """
    name = f"{visit.model} isolation"
    if visit.neighbour is None:
        return _needs(name, "another name on this server to ask in between")
    other = visit.neighbour[0]
    pairs = []
    for place in range(2 * NUM_FRESH):
        ids = visit.fresh_ids(visit.num_fresh)
        order = (other, visit.model) if place % 2 else (visit.model, other)
        one, two = (visit.server.complete(asked, ids) for asked in order)
        pairs += apart(one, two)
    differ = Apart(tuple(pairs), visit.tolerance)
    least = SAME * visit.tolerance.mean_kl
    numbers = {"least_kl": min(pairs), "largest_kl": max(pairs)}
    wrong, shown = "", f"{visit.model} and {other} differ by KL {min(pairs):.2g} to {max(pairs):.2g} on new prompts"
    straight_ok = not visit.probes or visit.replay.judged(visit.dtype, "straight").ok
    if differ.largest <= least and straight_ok:
        wrong = f"{visit.model} and {other} answer alike on prompts that one asked after the other: {shown}"
    elif visit.probes and straight_ok and visit.replay.num("shared"):
        shared = visit.replay.judged(visit.dtype, "shared")
        numbers["shared_max_kl"] = shared.max_kl
        shown += f"; probes asked after {other} asked them: max KL {shared.max_kl:.2g}"
        if not shared.ok:
            wrong = f"probes hold when asked alone; right after {other} asked the same, {shared.message}"
    if not straight_ok:
        return _needs(name, "conformance alone, which fails")
    return Finding(
        check=name,
        ok=not wrong,
        measured=wrong or shown,
        expected=f"an answer of its own, whatever {other} asked before",
        fix="Put the artefact's digest into the key (salt) of the prefix cache, and empty the cache.",
        fault="cache-shared" if wrong else "",
        numbers=numbers,
    )


MIN_TURNS, MAX_TURNS = 2, 6
"""Generations that are compared with one long prompt: more where they differ and the difference tells nothing."""


def check_turns(visit: Visit) -> Finding:
    """Generate, then send prompt and answer as one prompt; ask a long prompt before and after its first part.

    The vectors belong at the start, once. Where they enter again at every step or turn, or are lost at the second, a
    step of the generation differs from the same place of one long prompt.
    """
    name = f"{visit.model} turns"
    steps: list[float] = []
    again: list[float] = []
    settings: list[str] = []
    for turn in range(MAX_TURNS):
        if turn >= MIN_TURNS and (settings or visit.within(steps).ok):
            break  # a penalty that fell on tokens of no weight leaves a difference without a shape: ask again
        ids = visit.fresh_ids(SHORT_TOKENS)
        answer = visit.server.complete(visit.model, ids, max_tokens=NEW_TOKENS)
        for count in (1, len(answer.token_ids) - 1):
            found = visit.server.next_logprobs(visit.model, [*ids, *answer.token_ids[:count]])[0]
            steps.append(distance(answer.logprobs[count], found))
            if has_shift(found, answer.logprobs[count], visit.dtype):
                settings.append(setting_between(found, answer.logprobs[count], answer.token_ids[:count], visit.dtype))
        long = visit.fresh_ids(visit.num_fresh)
        before = visit.server.complete(visit.model, long)
        visit.server.complete(visit.model, long[: len(long) // 2], max_tokens=2)
        again += apart(before, visit.server.complete(visit.model, long))
    step, halved = visit.within(steps), visit.within(again)
    measured = f"step of a generation against one prompt: {step.message}; after its first half: {halved.message}"
    ok = step.ok and halved.ok
    if not step.ok and settings and all(settings):
        return _penalty(name, f"{measured}; as under {settings[-1]}", step)
    if ok and visit.probes and visit.replay.num("turn"):
        replayed = visit.replay.judged(visit.dtype, "turn")
        if not replayed.ok and visit.replay.judged(visit.dtype, "straight").ok:
            ok, measured = False, f"probes asked after their own first half: {replayed.message}"
    return Finding(
        check=name,
        ok=ok,
        measured=measured,
        expected="the same log-probabilities",
        fix="Put the vectors in front of the first turn only, and keep them in the cache that later turns go on from.",
        fault="" if ok else "injected-again",
        numbers={"steps_max_kl": step.largest, "turns_max_kl": halved.largest},
    )


def _penalty(name: str, measured: str, step: Apart) -> Finding:
    return Finding(
        check=name,
        ok=False,
        measured=measured,
        expected="the same log-probabilities",
        fix="Send penalties with each request, or take the server's own defaults out (generation_config).",
        fault="decoding-drift",
        numbers={"steps_max_kl": step.largest},
    )


def check_batch(visit: Visit) -> Finding:
    """Ask rows of different lengths alone and together, between other requests: a row's answer is its own affair.

    A first token that differs points to padding or positions in the prompt's batch; a later one, where the first was
    right, to generation from rows that are padded at the right.
    """
    name = f"{visit.model} batch"
    limit = visit.num_fresh
    early = [visit.fresh_ids(min(length, limit)) for length in ROW_LENGTHS]
    late = [visit.fresh_ids(min(length, limit)) for length in ROW_LENGTHS]
    together = _burst(visit, early)
    alone = [visit.server.complete(visit.model, row, max_tokens=NEW_TOKENS) for row in [*early, *late]]
    together += _burst(visit, late)
    first = visit.within([distance(a.logprobs[0], b.logprobs[0]) for a, b in zip(alone, together, strict=True)])
    whole = visit.between(zip(alone, together, strict=True))
    ok = first.ok and whole.ok
    fault = "" if ok else "right-padded-generation" if first.ok else "padding-between"
    fix = "Pad at the left of the prefix, or use rows of variable length; count positions from the mask."
    if fault == "right-padded-generation":
        fix = "Generate from rows padded at the left, or of variable length."
    return Finding(
        check=name,
        ok=ok,
        measured=f"rows of {min(map(len, early))} to {max(map(len, early))} tokens alone and together: "
        f"first token {first.message}, {NEW_TOKENS} tokens {whole.message}",
        expected="the same log-probabilities alone and together",
        fix=fix,
        fault=fault,
        numbers={"first_max_kl": first.largest, "max_kl": whole.largest},
    )


def _burst(visit: Visit, rows: Sequence[Sequence[int]]) -> list[Answer]:
    """Ask the rows in one request, while other requests run."""
    others = [visit.neighbour[0] if visit.neighbour else visit.model, visit.model, visit.base_name or visit.model]
    with ThreadPoolExecutor(len(others) + 1) as pool:
        noise = [
            pool.submit(visit.server.complete, other, visit.fresh_ids(7 + 11 * place), max_tokens=4 * NEW_TOKENS)
            for place, other in enumerate(others)
        ]
        answers = pool.submit(visit.server.complete_batch, visit.model, rows, max_tokens=NEW_TOKENS).result()
        wait(noise)  # whether they were answered is another check's affair
    return answers


def _needs(name: str, what: str) -> Finding:
    return Finding(check=name, ok=True, skipped=True, measured=f"needs {what}")
