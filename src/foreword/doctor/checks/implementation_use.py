"""Checks of an implementation in use: repeats, batches, generation, turns, training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from foreword.doctor.checks.implementation_form import skipped
from foreword.doctor.finding import Finding
from foreword.doctor.probe import reference, use
from foreword.doctor.probe.logits import LENGTHS, NEW_TOKENS, ProbeFailed, divergences, generate_rows
from foreword.doctor.probe.measurements import Measurements


def check_repeats(m: Measurements) -> Finding:
    """The same request gives the same logits: evaluation mode, no dropout, nothing drawn at random.

    In training mode dropout strikes out other numbers each time. Runs that agree under one random seed and differ
    between two are random; runs whose attention sees ever more keys, or that differ from the first alone, carry a
    state, which is another fault.
    """
    m.need_finite()
    runs = use.repeated(m, (0, 1, 0))
    (first, seen), (other, _), (again, seen_again) = runs
    between, same_seed = (float(divergences(first, run).max()) for run in (other, again))
    allowed = m.tolerance.max_kl
    dropout = use.active_dropout(m.subject.model)
    carried = seen != seen_again or float(divergences(other, again).max()) <= allowed < same_seed
    bad = not carried and max(between, same_seed) > (0.0 if dropout else allowed)
    measured = f"KL between runs: {between:.2g} under two random seeds, {same_seed:.2g} under one"
    if dropout:
        measured += f"; {len(dropout)} dropout modules are in training mode, the first is {dropout[0]}"
    return Finding(
        check="repeats", ok=not bad, fault="nondeterminism" if bad else "", measured=measured,
        expected=f"at most {allowed:.2g}, with dropout 0", fix="Serve in evaluation mode: model.eval()." if bad else "",
        numbers={"between_seeds": between, "same_seed": same_seed, "dropout_modules": len(dropout)},
    )  # fmt: skip


def check_padding(m: Measurements) -> Finding:
    """Padding stays outside: `[pad ... vectors text]`, positions counted from the mask, each row placed by itself.

    Where padding stands between vectors and text, or positions count it, a row gives another answer in a batch than
    alone, and the more so the shorter it is.
    """
    m.need_finite()
    fix = "Count positions from the mask (cumsum - 1), and put each row's padding before its vectors."
    found: dict[str, list[float]] = {"left": use.batched(m, "left"), "right": use.batched(m, "right")}
    worst = {side: max(values) for side, values in found.items()}
    allowed = m.tolerance.max_kl
    bad = [side for side, value in worst.items() if value > allowed]
    shown = " and ".join(f"{worst[side]:.2g} padded at the {side}" for side in ("left", "right"))
    return Finding(
        check="padding", ok=not bad, fault="padding-between" if bad else "", fix=fix if bad else "",
        measured=f"KL of a row alone to itself in a batch of {len(LENGTHS)} lengths: {shown}",
        expected=f"at most {allowed:.2g}", numbers=found,
    )  # fmt: skip


def check_requests(m: Measurements) -> Finding:
    """A request leaves nothing behind: build the prefix's cache anew for each, or copy it.

    A transformers cache grows in place. One that is made once and handed to every call holds all former texts.
    """
    m.need_finite()
    alone = m.single[0]
    m.run([m.rows[1]])
    again = m.run([m.rows[0]])[0]
    worst = float(divergences(alone, again).max())
    ok = worst <= m.tolerance.max_kl
    return Finding(
        check="requests", ok=ok, fault="" if ok else "injected-again",
        measured=f"KL of a request's logits to the same after another request: {worst:.2g}",
        expected=f"at most {m.tolerance.max_kl:.2g}", numbers={"max_kl": worst},
        fix="" if ok else "Copy the prefix's cache for every request; a cache grows in place.",
    )  # fmt: skip


def check_generation_padding(m: Measurements) -> Finding:
    """Generation needs its rows to end where the text ends: pad at the left, or batch by length.

    Padded at the right, a short row's next token is read behind its padding.
    """
    if m.subject.generate is None:
        return skipped("generation-padding", "`generate`")
    numbers: dict[str, list[float]] = {}
    for side in ("left", "right"):
        together = generate_rows(m.subject.generate, m.base, m.rows, "left" if side == "left" else "right")
        numbers[side] = [
            _first_gap(m, row, found, own) for row, found, own in zip(m.rows, together, m.generated, strict=True)
        ]
    bad = [side for side, gaps in numbers.items() if max(gaps) > m.tolerance.tie]
    fault = "right-padded-generation"
    if "left" in bad and max(use.batched(m, "left")) > m.tolerance.max_kl:
        fault = "padding-between"  # the forward itself does not bear padding
    shown = " and ".join(f"{max(gaps):.2g} padded at the {side}" for side, gaps in numbers.items())
    fix = "Pad prompts at the left for generation, or read each row's next token at its own last place."
    return Finding(
        check="generation-padding", ok=not bad, fault=fault if bad else "", fix=fix if bad else "", numbers=numbers,
        measured=f"a batch's tokens lie below those of each row alone by {shown}, in nats", expected="the same tokens",
    )  # fmt: skip


def _first_gap(m: Measurements, row: Sequence[int], tokens: Sequence[int], own: Sequence[int]) -> float:
    """Return how far the first token that is not the row's own lies below it by the forward; 0 where all are."""
    place = next((i for i, (token, mine) in enumerate(zip(tokens, own, strict=True)) if token != mine), None)
    if place is None:
        return 0.0
    return use.judged(m, row, tokens[: place + 1]).gaps[place]


def check_generation(m: Measurements) -> Finding:
    """Vectors enter once, in front of the first token; decode steps go on with the cache.

    Injected again at each step they pile up between the tokens; lost at the second, the answer starts well and goes on
    as the base's.
    """
    if m.subject.generate is None:
        return skipped("generation", "`generate`")
    fix = "Put the vectors in at the prefill only and hand the cache on; count the keys that a decode step sees."
    extra = use.extra_keys(m)
    if extra and len(set(extra)) > 1:
        shown = ", ".join(map(str, extra))
        rolling = m.num_positions > 1 and {a - b for a, b in pairwise(extra)} <= {
            0,
            1,
        }  # one goes for each new
        if rolling:
            fix = "Keep the prefix's positions in the cache for good; a rolling cache drops the oldest first."
        return Finding(
            check="generation", ok=False, fix=fix,
            fault="window-eviction" if rolling else "injected-again", numbers={"extra_keys": extra},
            measured=f"keys that a step sees beside those of the text so far, step by step: {shown}",
            expected="the same number at each step",
        )  # fmt: skip
    runs = [use.judged(m, row, tokens) for row, tokens in zip(m.rows, m.generated, strict=True)]
    gaps = [max(step) for step in zip(*(run.gaps for run in runs), strict=True)]
    wrong = [step for step, gap in enumerate(gaps) if gap > m.tolerance.tie]
    shown = ", ".join(f"{gap:.2g}" for gap in gaps)
    measured = f"generated tokens lie below the forward's best by {shown} nats, step by step"
    if wrong:
        where = "already the first" if wrong[0] == 0 else f"from step {wrong[0] + 1} on"
        measured += f": {where} of {NEW_TOKENS} tokens is not the one that a forward over the whole text gives"
    return Finding(
        check="generation", ok=not wrong, fault="injected-again" if wrong else "", fix=fix if wrong else "",
        measured=measured, expected="each token the best by a forward over the whole text", numbers={"gaps": gaps},
    )  # fmt: skip


def check_turns(m: Measurements) -> Finding:
    """In a conversation vectors enter at turn 0, once, and stay in the cache for all later turns.

    Injected again at each turn they stand between the turns; lost at the second, the answer drifts to the base's.
    """
    if m.subject.turns is None:
        return skipped("turns", "`turns`")
    fix = "Inject at turn 0 only, and keep the cache (or the whole text) for later turns."
    first, second = m.rows[0], m.rows[1]
    try:
        found = use.after_turns(m, [first, second])
    except ProbeFailed as error:
        if _one_turn_holds(m):
            said = f"one turn works, the second does not: {error.message}"
            return Finding(check="turns", ok=False, fault="injected-again", measured=said, fix=fix)
        raise
    whole = m.run([[*first, *second]])[0][-1]
    worst = float(divergences(whole[None], found[None]).max())
    ok = worst <= m.tolerance.max_kl
    measured = f"KL of two turns to the same text in one: {worst:.2g}"
    if not ok and _short_turns_hold(m):
        measured += f" ({len(first)} and {len(second)} tokens); two turns of 2 tokens agree"
        return Finding(
            check="turns", ok=False, fault="window-eviction", measured=measured, numbers={"max_kl": worst},
            expected="the same at any length",
            fix="Keep the prefix's positions in the cache for good; a rolling cache drops the oldest first.",
        )  # fmt: skip
    if not ok:
        measured += _what_turns_did(m, found)
    return Finding(
        check="turns", ok=ok, fault="" if ok else "injected-again", measured=measured, numbers={"max_kl": worst},
        expected=f"at most {m.tolerance.max_kl:.2g}", fix="" if ok else fix,
    )  # fmt: skip


def _one_turn_holds(m: Measurements) -> bool:
    found = use.after_turns(m, [m.rows[0]])
    return float(divergences(m.single[0][-1:], found[None]).max()) <= m.tolerance.max_kl


def _short_turns_hold(m: Measurements) -> bool:
    first, second = m.rows[0][:2], m.rows[1][:2]
    found = use.after_turns(m, [first, second])
    return float(divergences(m.run([[*first, *second]])[0][-1:], found[None]).max()) <= m.tolerance.max_kl


def _what_turns_did(m: Measurements, found: Tensor) -> str:
    """Say which known mistake gives the logits found behind the second turn."""
    first, second = m.rows[0], m.rows[1]
    lost = {
        "the second turn alone behind the vectors": (m.prefix, [second]),
        "the second turn alone without vectors": (None, [second]),
        "both turns without vectors": (None, [[*first, *second]]),
    }
    for what, (prefix, rows) in lost.items():
        if prefix is None and "behind" in what:
            continue
        logits = reference.reference_logits(m.base, rows, prefix)[0][-1:]
        if float(divergences(logits, found[None]).max()) <= m.tolerance.max_kl:
            return f"; it is that of {what}"
    return ""


def check_training(m: Measurements) -> Finding:
    """Gradient checkpointing must carry the prefix: switch it off, or use a form that keeps the vectors in its inputs.

    Checkpointed layers of transformers run without a cache. A prefix that came by the cache is dropped without a word,
    or sizes no longer match; training then goes on and the vectors learn nothing.
    """
    if m.subject.training_forward is None:
        return skipped("training-forward", "`training_forward`")
    m.need_finite()
    fix = "Switch gradient checkpointing off for prefixes that come by the cache, or compute them inside each layer."
    try:
        found = use.while_training(m)
    except ProbeFailed as error:
        measured = f"the forward as in training fails where the serving one works: {error.message}"
        return Finding(
            check="training-forward", ok=False, fault="checkpointing-drops-prefix", measured=measured, fix=fix,
            expected="the serving forward's logits",
        )  # fmt: skip
    pairs = list(zip(m.single, m.plain, found, strict=True))
    to_served = float(torch.cat([divergences(served, got) for served, _, got in pairs]).max())
    to_base = float(torch.cat([divergences(bare, got) for _, bare, got in pairs]).max())
    ok = to_served <= m.tolerance.max_kl or to_served < to_base
    dropped = to_base < to_served and to_served > m.tolerance.max_kl
    measured = f"KL of the training forward to the serving one {to_served:.2g}, to the base alone {to_base:.2g}"
    return Finding(
        check="training-forward", ok=ok, fault="checkpointing-drops-prefix" if dropped else "", measured=measured,
        expected=f"at most {m.tolerance.max_kl:.2g} to the serving one", fix="" if ok else fix,
        numbers={"to_served": to_served, "to_base": to_base},
    )  # fmt: skip
