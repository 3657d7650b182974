"""Checks of an implementation's effect: is what comes out what the vectors should make of the text?"""

from __future__ import annotations

import torch

from foreword.core.conformance import check_probe, judge, replay
from foreword.doctor.checks.implementation_form import skipped
from foreword.doctor.finding import Finding
from foreword.doctor.probe import reference
from foreword.doctor.probe.logits import LENGTHS, divergences
from foreword.doctor.probe.measurements import Measurements
from foreword.doctor.probe.seen import relative_error

MILD = 0.1
"""Share of the vectors' own effect up to which a deviation is one of numerics, where no layer's values are foreign. A
bfloat16 round trip of keys and values stays below 0.01, 8-bit weights below 0.05 (tests/doctor/test_implementation.py);
one vector lost of five is above 0.1."""
MIN_REACH = 32
"""Text tokens that a prompt must reach at least: a short question with its first words of answer."""
MASK = "Extend the attention mask by P ones in front of the text's mask."


def check_effect(m: Measurements) -> Finding:
    """Vectors without any effect: let the attention mask cover them, P ones in front of the text's mask.

    Three faults look alike from outside. Where the rows are in the sequence and no query may see them, it is the mask;
    where they are not in the sequence at all, they were never loaded or are dropped on the way.
    """
    m.need_finite()
    measured_effect = float(m.effect.max())
    tolerance, want = m.tolerance.max_kl, m.expected_effect
    numbers = {"max_kl": measured_effect, "mean_kl": float(m.effect.mean())}
    guess = m.hypothesis
    none = measured_effect <= tolerance or (guess is not None and guess.fault == "mask-blind")
    blind = _blind_layers(m)
    if blind and not none:
        shown = ", ".join(f"{m.seen[layer].visible} of {m.num_positions} in layer {layer}" for layer in blind)
        measured = f"the text sees {shown} of the keys that stand in front of it; {_masses(m)}"
        return _no_effect("mask-blind", measured, f"{m.num_positions} in every layer", MASK, numbers)
    hidden = max((seen.blind_tokens for seen in m.seen), default=0)
    if hidden and not none:
        measured = f"the last {hidden} text tokens are masked, from themselves too: the mask is short by as many places"
        return _no_effect("mask-blind", measured, "every token sees itself", MASK, numbers)
    if want is not None and float(want.max()) <= tolerance:
        said = f"these vectors change the base by KL {float(want.max()):.2g} at most, which rounding hides"
        return skipped("effect", f"vectors with an effect; {said}")
    said = f"KL with and without the vectors is {measured_effect:.2g} at most"
    expected = f"more than {tolerance:.2g}" if want is None else f"about {float(want.max()):.2g}, as the vectors have"
    if not none:
        mass = f"; {_masses(m)}" if any(seen.extra for seen in m.seen) else ""
        return Finding(check="effect", ok=True, measured=said + mass, expected=expected, numbers=numbers)
    if not m.seen:
        measured = f"{said}; what attention sees could not be watched"
        return _no_effect("mask-blind", measured, expected, MASK, numbers)
    present = min(seen.extra for seen in m.seen)
    if any(seen.extra for seen in m.seen):
        measured = f"{said}; {present} keys stand in front of the text, {_masses(m)}"
        return _no_effect("mask-blind", measured, expected, MASK, numbers)
    fix = "Find where the vectors are lost: nothing is in front of the text in any layer. Were they loaded at all?"
    measured = f"{said}; no layer has any key beside the text's own"
    return _no_effect("layers-dropped", measured, expected, fix, numbers)


def _blind_layers(m: Measurements) -> list[int]:
    """Return the full-attention layers in which the text sees fewer keys in front of it than stand there."""
    if not any(seen.extra for seen in m.seen):
        return []
    return [
        layer
        for layer, (seen, spec) in enumerate(zip(m.seen, m.base.spec.layers, strict=True))
        if spec.window is None and seen.visible < min(seen.extra, m.num_positions)
    ]


def _no_effect(fault: str, measured: str, expected: str, fix: str, numbers: dict[str, float]) -> Finding:
    return Finding(
        check="effect", ok=False, fault=fault, measured=measured, expected=expected, fix=fix, numbers=numbers
    )


def _masses(m: Measurements) -> str:
    return f"prefix mass by layer {', '.join(f'{seen.mass:.2g}' for seen in m.seen)}"


def check_window(m: Measurements) -> Finding:
    """Vectors that leave a sliding window: report the reach, and prefer a base with full-attention layers.

    A text starts well and drifts once the vectors are out of sight. In a stack of windows only, a block of N positions
    reaches text up to token L·(W-1) - N; keys and values in a cache that keeps W tokens leave it after W.
    """
    fix = "Keep the prefix's positions in every layer's cache, or tell users the reach and keep texts below it."
    if m.reach is not None and m.reach < MIN_REACH:
        return Finding(
            check="window", ok=False, fault="window-eviction", fix=fix,
            measured=f"all layers have windows: the vectors reach the first {max(0, m.reach)} text tokens",
            expected=f"{MIN_REACH} text tokens at least", numbers={"reach": m.reach},
        )  # fmt: skip
    if m.prefix is None:
        return skipped("window", "`vectors`, to know what the effect should be far from them")
    row = m.long_row
    want = reference.reference_logits(m.base, [row], m.prefix)[0]
    bare = reference.reference_logits(m.base, [row], None)[0]
    found = m.run([row])[0]
    wrong = divergences(want, found) > m.tolerance.max_kl
    first = int(wrong.nonzero()[0]) if bool(wrong.any()) else None
    reach = "" if m.reach is None else f"; through the base's windows the vectors reach text token {m.reach}"
    if first is None:
        measured = f"as expected up to text token {len(row)}{reach}"
        return Finding(check="window", ok=True, measured=measured, numbers={"reach": m.reach})
    effect, due = divergences(found, bare)[first:], divergences(want, bare)[first:]
    numbers = {"first_wrong_token": first, "tokens": len(row), "effect_left": float(effect.mean() / due.mean())}
    if first == 0 or float(wrong[first:].float().mean()) < 0.5:
        said = "deviates from the first text token on, so it is not distance"
        return Finding(check="window", ok=True, measured=said, numbers=numbers)
    return Finding(
        check="window", ok=False, fault="window-eviction", fix=fix, numbers=numbers,
        expected="the same at any distance",
        measured=f"text tokens 0 to {first - 1} are as the vectors make them, from {first} on they are not{reach}",
    )  # fmt: skip


def check_positions(m: Measurements) -> Finding:
    """The text starts at position P (behind literal tokens of the block too): shift its position ids by the prefix.

    Counted from 0 the text stands among the vectors instead of behind them. Rotary attention knows only differences,
    but exactly these are then wrong, by P.
    """
    num, guess, start = m.num_positions, m.hypothesis, m.text_start
    fix = f"Let the text's position ids run from {num}: `torch.arange({num}, {num} + T)`."
    named = guess is not None and guess.fault == "positions-unshifted"
    numbers = {"start": None if start is None else start[0], "errors": None if start is None else start[1]}
    in_place = bool(m.key_errors) and all(error is not None and error <= m.match for error in m.key_errors)
    shifted = start is not None and start[0] != num and (in_place or m.conforms is not True)
    if start is None and not named and m.expected is None:
        return skipped("positions", "`vectors`, or attention that runs through torch's functions")
    parts = []
    if start is not None:
        wanted = "" if start[0] == num else f", and {start[1][num]:.2g} from those at position {num}"
        parts.append(
            f"the first layer's text keys are those of a text at position {start[0]} "
            f"(relative error {start[1][start[0]]:.2g}{wanted})"
        )
    if named and guess is not None:
        parts.append(f"the output is that of {guess.what}")
    bad = shifted or named
    return Finding(
        check="positions", ok=not bad, fault="positions-unshifted" if bad else "", fix=fix if bad else "",
        measured="; ".join(parts) or "the output is not that of any other position", numbers=numbers,
        expected=f"a text that starts at position {num}",
    )  # fmt: skip


def check_rotation(m: Measurements) -> Finding:
    """Stored keys are rotated exactly once, for the positions where they stand: record both in the file.

    A key of position 0 is not turned at all, the norm of no key changes, and values know no rotation: keys that differ
    while all these hold were rotated twice, or not at all.
    """
    fix = "Store keys as they lie in the cache (after rotary embedding, positions 0..P-1) and add them unchanged."
    guess = m.hypothesis
    named = guess is not None and guess.fault == "keys-misrotated"
    if not m.key_errors and not named:
        if m.expected is None or m.conforms is not True:
            return skipped("rotation", "`vectors`, and attention that runs through torch's functions")
        return Finding(check="rotation", ok=True, measured="the output is as with keys rotated once")
    turned = _turned_layers(m)
    behind = m.text_start is not None and m.text_start[0] == m.num_positions
    bad = named or (bool(turned) and (behind or m.conforms is not True))
    seen = [error for error in m.key_errors if error is not None]
    parts = []
    if turned:
        parts.append(f"in layers {', '.join(map(str, turned))} values and key norms are right and the keys are turned")
    if named and guess is not None:
        parts.append(f"the output is that of {guess.what}")
    largest = f"relative error of keys at most {max(seen):.2g}" if seen else "keys could not be seen"
    return Finding(
        check="rotation", ok=not bad, fault="keys-misrotated" if bad else "", fix=fix if bad else "",
        measured="; ".join([*parts, largest]), expected=f"an error of at most {m.match:g}",
        numbers={"layers": turned, "errors": list(m.key_errors)},
    )  # fmt: skip


def _turned_layers(m: Measurements) -> list[int]:
    """Return the layers whose keys in front have the right norms and directions that are not theirs."""
    turned: list[int] = []
    if m.prefix is None:
        return turned
    for layer, (key_error, value_error) in enumerate(zip(m.key_errors, m.value_errors, strict=True)):
        found = m.rows_in_front("keys", layer)
        if found is None or key_error is None or value_error is None:
            continue
        norms = relative_error(found.float().norm(dim=-1), m.prefix.keys[layer].float().norm(dim=-1))
        if key_error > m.match and value_error <= m.match and norms <= m.match:
            turned.append(layer)
    return turned


def check_conformance(m: Measurements) -> Finding:
    """The same vectors on the same base give the same distribution, up to the rounding of the base's dtype.

    A small deviation everywhere is one of numerics: another dtype, a quantised base, a cache of 8 bits. Validate the
    task again under these numerics, or train under them. A large one has a cause that no check before has named.
    """
    if m.difference is None:
        return skipped("conformance", "`vectors` as SoftPrompt, SoftPrefix or SoftKV")
    m.need_finite()
    worst, mean = float(m.difference.max()), float(m.difference.mean())
    due = 0.0 if m.expected_effect is None else float(m.expected_effect.mean())
    share = mean / due if due else 0.0
    held = set() if m.subject.model is None else {p.dtype for p in m.subject.model.parameters()}
    found = sorted(str(dtype).removeprefix("torch.") for dtype in held)
    errors = [error for error in (*m.value_errors, *m.key_errors) if error is not None]
    if m.text_start is not None:
        errors.append(min(m.text_start[1]))
    measured = f"KL to what the vectors should give: {worst:.2g} at most, {mean:.2g} in the mean"
    numbers = {"max_kl": worst, "mean_kl": mean, "share_of_effect": share, "dtypes": found, "errors": errors}
    expected = f"at most {m.tolerance.max_kl:.2g} ({m.base.dtype}, six times this base's rounding noise)"
    coarse = bool(found) and m.base.dtype not in held
    weights = m.weights
    rounded = weights is not None and weights.num_different > 0 and weights.is_rounded
    if weights is not None and weights.num_missing and not weights.num_different and share <= MILD:
        rounded = True  # what can be compared is equal, the rest is held in another form: packed weights
    if m.conforms and not coarse:
        return Finding(check="conformance", ok=True, measured=measured, expected=expected, numbers=numbers)
    explained = m.hypothesis is not None or (bool(errors) and max(errors) > 2 * MILD)
    if m.text_start is not None and m.text_start[0] != m.num_positions:
        explained = True
    mild = coarse or rounded or (share <= MILD and not explained and _from_the_start(m))
    measured += f", {100 * share:.3g} % of their effect"
    if errors:
        measured += f"; keys and values deviate by {max(errors):.2g} at most"
    if coarse:
        measured += f"; the model holds {', '.join(found)}, the base {m.base.dtype}"
    fix = "Compare with the reference step by step: `foreword.core.compile.uncompiled_logits` is the plain form."
    if mild:
        fix = "Run in the numerics of training, or validate the task again under these and keep probes made there."
    return Finding(
        check="conformance", ok=False, fault="numerics" if mild else "", measured=measured, expected=expected, fix=fix,
        numbers=numbers,
    )  # fmt: skip


def _from_the_start(m: Measurements) -> bool:
    """Return whether the rows' first tokens deviate as well, as numerics make them, and distance does not."""
    if m.difference is None:
        return False
    starts = [sum(LENGTHS[:row]) for row in range(len(LENGTHS))]
    return float(m.difference[starts].max()) > 0.01 * float(m.difference.max())


def check_weights(m: Measurements) -> Finding:
    """Vectors belong to one base, bit for bit of its training: refuse another revision, or one with an adapter merged.

    Weights that are roundings of the base's (8 bits, bfloat16) change it little, and are a question of numerics. Others
    are another base, however alike the names.
    """
    found = m.weights
    if found is None:
        return skipped("weights", "`model` with parameters named as the base's")
    measured = f"{found.num_different} of {found.num_compared} tensors differ from the base's"
    if found.num_missing:
        measured += f"; {found.num_missing} are held in another form and cannot be compared"
    numbers = {"different": found.num_different, "missing": found.num_missing, "error": found.error}
    if found.num_different:
        measured += f", {found.name} most, by {found.error:.2g} of its norm"
        measured += ", as a rounding of it" if found.is_rounded else ""
    other = found.num_different > 0 and not found.is_rounded
    fix = (
        "Run the revision that the vectors were trained for (its fingerprint is in the artefact), or train them again."
    )
    return Finding(
        check="weights", ok=not other, fault="other-base" if other else "", measured=measured, numbers=numbers,
        expected="the base's weights", fix=fix if other else "",
    )  # fmt: skip


def check_probes(m: Measurements) -> Finding:
    """Probes stored where the vectors were trained must come out the same here.

    Where the vectors act as their file says and the probes still differ, the file or the base is not what was trained:
    keys stored in another rotation, another revision of the base, other numerics.
    """
    probes = m.subject.probes
    if not probes:
        return skipped("probes", "`probes`, conformance probes made where the vectors were trained")
    found = []
    for probe in probes:
        row = check_probe(probe, m.base.spec.vocab_size)
        logprobs = torch.log_softmax(m.run([row])[0][-1], dim=-1)
        ids = [*probe["top"], int(logprobs.argmax())]
        found.append(dict(zip(ids, logprobs[ids].tolist(), strict=True)))
    result = judge(probes, found, str(m.base.dtype).removeprefix("torch."))
    numbers = {"max_kl": result.max_kl, "mean_kl": result.mean_kl}
    if result.ok:
        return Finding(check="probes", ok=True, measured=result.message, numbers=numbers)
    expected = "the distributions stored with the vectors"
    if m.conforms and m.prefix is not None:
        for sign, what in ((1, "once more"), (-1, "back")):
            turned = reference.rotated(m.base, m.prefix, sign)
            if turned is not None and replay(m.base, turned, probes).ok:
                measured = f"{result.message}; with the stored keys rotated {what} it holds"
                fix = "Store keys rotated once, for positions 0..P-1, and say so in the file."
                return Finding(
                    check="probes", ok=False, fault="keys-misrotated", measured=measured, expected=expected, fix=fix,
                    numbers=numbers,
                )  # fmt: skip
    fault = ""
    if m.conforms is not False:
        fault = "numerics" if result.max_kl <= m.coarse_noise else "other-base"
    fix = "Compare base revision, dtype and versions with those of training; the artefact's fingerprint names them."
    return Finding(
        check="probes", ok=False, fault=fault, measured=result.message, expected=expected, fix=fix, numbers=numbers
    )
