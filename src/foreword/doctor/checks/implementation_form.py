"""Checks of an implementation's form: shapes, lengths, and where vectors really enter."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from foreword.core.block import Block
from foreword.core.init import random_kv, states_of
from foreword.core.prompt import KVPrefix, SoftKV, SoftPrefix, SoftPrompt
from foreword.doctor.finding import Finding
from foreword.doctor.probe.logits import LENGTHS, ProbeFailed, divergences
from foreword.doctor.probe.measurements import Measurements

HUGE = 300.0
"""A vector this many times longer than the rows it stands among. The longest start in use, PEFT's standard normal rows
on embeddings of std 0.02, is 50 times longer."""


SAME = 1 - 1e-4
"""Cosine above which two layers' vectors are the same; independent ones of 320 numbers stay below 0.3."""


def skipped(check: str, needs: str) -> Finding:
    """Return the finding that a check was not made, and what it would have needed."""
    return Finding(check=check, ok=True, skipped=True, measured=f"not made: it needs {needs}")


def check_shapes(m: Measurements) -> Finding:
    """Shapes come from the base's own keys: read Hkv and Dh from its configuration or cache, never from D and H.

    Under grouped-query attention a layer has fewer key/value heads than query heads, and Dh need not be D/H. A tensor
    of the wrong shape with the right number of elements is reshaped without a word, and means nothing then.
    """
    spec, given = m.base.spec, m.subject.vectors
    heads = sorted({(layer.num_kv_heads, layer.head_dim) for layer in spec.layers})
    shown = ", ".join(f"{h} heads of {d}" for h, d in heads)
    fix = f"Shape keys and values [Hkv, P, Dh] by the base: {shown}; hidden rows have {spec.hidden_size} numbers."
    if given is None:
        return skipped("shapes", "`vectors`")
    tensors = dict(given) if isinstance(given, Mapping) else given.tensors()
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    numbers = {"shapes": shapes}
    if m.vectors is None:
        return _mapping_shapes(m, shapes, fix)
    if not isinstance(m.compiled, KVPrefix):
        said = m.compiled.message if m.compiled is not None else "no shape"
        holds = "sliding window" in said or "positions" in said
        fault = "window-eviction" if "sliding window" in said else "context-overflow" if holds else "wrong-shape"
        cure = m.compiled.hint if holds and m.compiled is not None else fix
        return Finding(
            check="shapes", ok=False, fault=fault, measured=said, expected="vectors that the base can hold", fix=cure,
            numbers=numbers,
        )  # fmt: skip
    if m.vectors.num_vectors != m.subject.num_vectors:
        measured = f"{m.vectors.num_vectors} vectors where {m.subject.num_vectors} are declared"
        return Finding(check="shapes", ok=False, fault="wrong-shape", measured=measured, fix=fix, numbers=numbers)
    if rearranged := _rearranged(m):
        shown = ", ".join(map(str, rearranged))
        measured = f"layers {shown} hold the stored numbers in another arrangement, as a reshape leaves them"
        return Finding(
            check="shapes", ok=False, fault="wrong-shape", measured=measured, fix=fix, numbers=numbers,
            expected="each number at its own head, position and dimension",
        )  # fmt: skip
    count = sum(tensor.numel() for tensor in tensors.values())
    return Finding(check="shapes", ok=True, measured=f"{count} numbers in {len(shapes)} tensors", numbers=numbers)


def _rearranged(m: Measurements) -> list[int]:
    try:
        return m.rearranged
    except ProbeFailed:  # the forward does not run; check_forward says so
        return []


def _mapping_shapes(m: Measurements, shapes: Mapping[str, list[int]], fix: str) -> Finding:
    """Judge tensors of unknown names by what their sizes can mean."""
    spec, num = m.base.spec, m.subject.num_vectors
    kv = sum(layer.num_kv_heads * (layer.head_dim + layer.value_dim) for layer in spec.layers) * num
    count = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
    expected = {
        "prompt": num * spec.embed_size,
        "prefix": spec.num_layers * num * spec.hidden_size,
        "kv": kv,
    }
    want = expected[m.subject.declared]
    measured = f"{count} numbers in {len(shapes)} tensors"
    numbers = {"shapes": dict(shapes), "count": count, "expected": want}
    if m.subject.declared in ("prefix", "kv") and count == expected["prompt"] and spec.num_layers > 1:
        return Finding(check="shapes", ok=True, measured=f"{measured}, as many as a prompt has", numbers=numbers)
    if count != want:
        said = f"{want} numbers, as {m.subject.declared} with {num} vectors has on this base"
        return Finding(
            check="shapes", ok=False, fault="wrong-shape", measured=measured, expected=said, fix=fix, numbers=numbers
        )
    return Finding(check="shapes", ok=True, measured=measured, numbers=numbers)


def check_forward(m: Measurements) -> Finding:
    """The forward must take ids and mask of a row and return logits.

    Nothing else can be measured where it raises; run it on one short row to see the whole traceback.
    """
    try:
        width = m.width
    except Exception as error:  # whatever somebody else's code raises
        fix = "Run it on one short row by hand; the traceback says where it stops."
        return Finding(check="forward", ok=False, measured=str(error), expected="logits [B, T, V]", fix=fix)
    return Finding(check="forward", ok=True, measured=f"{width} rows of logits for {LENGTHS[0]} tokens")


def check_finite(m: Measurements) -> Finding:
    """NaN, infinity or enormous norms: train again in bfloat16 or float32 instead of float16, and clip gradients.

    One NaN makes all that attends to it NaN; a vector of enormous norm draws all attention to itself.
    """
    fix = "Go back to the last finite checkpoint; train vectors in float32, the base in bfloat16, and clip gradients."
    given = m.subject.vectors
    tensors: dict[str, Tensor] = {}
    if given is not None:
        tensors = dict(given) if isinstance(given, Mapping) else given.tensors()
    for name, tensor in tensors.items():
        if bad := int((~tensor.detach().float().isfinite()).sum()):
            measured = f"{bad} of {tensor.numel()} numbers of {name!r} are NaN or infinite"
            return _not_finite(measured, fix, {"tensor": name, "count": bad})
    ratio, name = _largest_ratio(m, tensors)
    if ratio is not None and ratio > HUGE:
        measured = f"the longest row of {name!r} is {ratio:.3g} times as long as the rows it stands among"
        return _not_finite(measured, fix, {"tensor": name, "ratio": ratio})
    bad = sum(int((~logits.isfinite()).any(-1).sum()) for logits in m.single)
    if bad:
        return _not_finite(f"logits of {bad} of {sum(LENGTHS)} tokens are NaN or infinite", fix, {"rows": bad})
    said = "" if ratio is None else f", the longest row {ratio:.3g} times as long as its neighbours"
    return Finding(check="finite", ok=True, measured=f"all finite{said}", numbers={"ratio": ratio})


def _not_finite(measured: str, fix: str, numbers: Mapping[str, object]) -> Finding:
    expected = f"finite numbers, no row above {HUGE:g} times the usual length"
    return Finding(
        check="finite", ok=False, fault="not-finite", measured=measured, expected=expected, fix=fix, numbers=numbers
    )


def _largest_ratio(m: Measurements, tensors: Mapping[str, Tensor]) -> tuple[float | None, str]:
    """Return the longest vector's length over the median length of what the base has in its place."""
    ratios: list[tuple[float, str]] = []
    if m.vectors is None or not tensors:
        return None, ""
    if isinstance(m.vectors, SoftPrompt):
        usual = m.base.embedding.weight.detach()[:5000].float().norm(dim=-1).median()
        ratios.append((float(m.vectors.vectors.detach().float().norm(dim=-1).max() / usual), "prompt"))
    else:
        rows = m.base.embed(torch.tensor(m.rows[0], device=m.base.device)).detach().float().cpu()
        if isinstance(m.vectors, SoftPrefix):
            usual = states_of(m.base, rows, Block((len(rows),))).norm(dim=-1).median(dim=1).values
            found = m.vectors.vectors.detach().float().cpu().norm(dim=-1).amax(dim=1)
            if found.shape == usual.shape:
                ratios.append((float((found / usual).max()), "prefix"))
        else:
            sample = random_kv(m.base, Block((8,)), 0)
            for layer, (key, want) in enumerate(zip(m.vectors.keys, sample.keys, strict=False)):
                longest = key.detach().float().norm(dim=-1).max()
                ratios.append((float(longest / want.norm(dim=-1).median()), f"key.{layer}"))
    return max(ratios) if ratios else (None, "")


def check_base(m: Measurements) -> Finding:
    """A forward must not move the base: freeze it, and keep every in-place change out of its tensors.

    Whatever shares the base changes with it. Parameters that ask for gradients are told here; whether anything trains
    them is a question to the trainer (`requires_grad_(False)` on the base answers it for good).
    """
    model = m.subject.model if m.subject.model is not None else m.base.model
    ids = {id(p) for p in m.base.model.parameters()}
    asking = sum(p.requires_grad for p in model.parameters() if m.subject.model is None or id(p) in ids)
    total = sum(1 for _ in m.base.model.parameters())
    _ = m.single
    same = m.sha256_now() == m.sha256_before
    note = f"; {asking} of its {total} parameters ask for gradients" if asking else ""
    measured = f"tensors {'unchanged' if same else 'CHANGED'} by a forward{note}"
    fix = "Freeze the base with requires_grad_(False) and never write into its tensors."
    return Finding(
        check="base", ok=same, fault="" if same else "base-trainable", measured=measured, fix="" if same else fix,
        expected="every bit as before", numbers={"same": same, "requires_grad": asking},
    )  # fmt: skip


def check_sequence_lengths(m: Measurements) -> Finding:
    """Of a prefix layer's output only the text's rows go on: `hidden[:, -T:]` after every layer.

    Where the P prefix rows are kept as well, the next layer puts its own in front of them: every layer's sequence grows
    by P, time and memory rise with depth, and the text attends to rows that no training put there.
    """
    if not m.seen:
        return skipped("sequence-lengths", "attention that runs through torch's functions, or `model`")
    text = LENGTHS[0]
    by_layer = [max(seen.num_queries, text + seen.visible) for seen in m.seen]
    growth = [after - before for before, after in pairwise(by_layer)]
    steady = len(growth) > 0 and sum(step > 0 for step in growth) * 2 > len(growth) and min(growth) >= 0
    kept = steady and m.subject.declared != "prompt"
    shown = ", ".join(map(str, by_layer))
    want = f"{text + m.num_positions} in every layer"
    fix = "Return only the last T rows of each layer's output: `hidden = hidden[:, -T:]` before the next layer."
    return Finding(
        check="sequence-lengths", ok=not kept, fault="outputs-kept" if kept else "", fix=fix if kept else "",
        measured=f"layers work on {shown} positions for a text of {text}", expected=want,
        numbers={"lengths": by_layer, "text_tokens": text},
    )  # fmt: skip


def check_logit_rows(m: Measurements) -> Finding:
    """One row of logits per text token: cut the P rows of the vectors off before anything reads them.

    Uncut, row t speaks of token t - P, and a loss or an accuracy over them is wrong without an error.
    """
    text, extra = LENGTHS[0], m.width - LENGTHS[0]
    ok = extra == 0
    num = m.num_positions
    if ok and m.conforms is False and m.expected is not None and num < text:
        shifted = divergences(m.expected[0][: text - num], m.single[0][num:])
        if float(shifted.max()) <= m.tolerance.max_kl:
            return Finding(
                check="logit-rows", ok=False, fault="logits-uncut", numbers={"extra": extra, "shift": num},
                measured=f"row {num} of the logits is that of text token 0: the last {num} were cut off, not the first",
                expected="row t speaks of text token t", fix=f"Return `logits[:, {num}:]`.",
            )  # fmt: skip
    return Finding(
        check="logit-rows", ok=ok, fault="" if ok else "logits-uncut",
        measured=f"{m.width} rows of logits for a text of {text} tokens ({extra} more)", expected=f"{text} rows",
        fix="" if ok else f"Return `logits[:, {extra}:]`.", numbers={"extra": extra},
    )  # fmt: skip


def check_sites(m: Measurements) -> Finding:
    """A prefix enters at every layer; vectors that enter once, at the embeddings, are a prompt, whatever the name.

    Prompt tuning is no defect: it stores P·D numbers instead of L·P·D and acts through the first layer alone. Either
    call it so and judge it so, or put vectors of their own into every layer.
    """
    declared, spec = m.subject.declared, m.base.spec
    fix = "Call it prompt tuning (method = prompt), or inject each layer's own vectors: L·P·D numbers, L sites."
    if declared == "prompt":
        return Finding(check="sites", ok=True, measured=f"declared as a prompt{_entering(m)}")
    expected = f"{declared}: vectors enter at each of {spec.num_layers} layers"
    stored = None
    if isinstance(m.vectors, SoftPrompt):
        stored = m.vectors.vectors.numel()
    elif m.vectors is None and isinstance(m.subject.vectors, Mapping):
        count = sum(tensor.numel() for tensor in m.subject.vectors.values())
        stored = count if count == m.subject.num_vectors * spec.embed_size and spec.num_layers > 1 else None
    once = enters_once(m)
    guess = m.hypothesis
    named = guess is not None and guess.fault == "embeddings-only"
    wrong = stored is not None or ((once or named) and m.conforms is not True)
    if not m.entering and not wrong and m.prefix is None:
        return skipped("sites", "`model` with its layers in a ModuleList, or `vectors`")
    parts = [f"rows entering by layer: {', '.join(map(str, m.entering))}"] if m.entering else []
    if stored is not None:
        parts.append(f"{stored} numbers stored, P·D, not L·P·D")
    if named and guess is not None:
        parts.append(f"the output is that of {guess.what}")
    return Finding(
        check="sites", ok=not wrong, fault="embeddings-only" if wrong else "", fix=fix if wrong else "",
        measured="; ".join(parts) or "the output is not that of a prompt", expected=expected,
        numbers={"entering": m.entering, "stored": stored},
    )  # fmt: skip


def enters_once(m: Measurements) -> bool:
    """Return whether hidden rows enter at the first of several layers and nothing enters above it."""
    return len(m.entering) > 1 and m.entering[0] > 0 and not any(m.entering[1:]) and m.seen[0].outside == 0


def _entering(m: Measurements) -> str:
    return f"; rows entering by layer: {', '.join(map(str, m.entering))}" if m.entering else ""


def check_layers_distinct(m: Measurements) -> Finding:
    """Every layer has vectors of its own: a parameter [L, P, D], not one [P, D] used L times.

    Each layer works in a space of its own; what steers the first means nothing to the tenth.
    """
    if m.subject.declared == "prompt":
        return Finding(check="layers-distinct", ok=True, measured="declared as a prompt: one layer has vectors")
    if m.base.spec.num_layers == 1:
        return Finding(check="layers-distinct", ok=True, measured="the base has one layer")
    fix = "Give each layer parameters of its own, [L, P, D], and check that no two share their storage."
    expected = "vectors that differ between layers"
    cosine, source = _layer_cosine(m)
    guess = m.hypothesis
    if guess is not None and guess.fault == "layers-tied":
        return Finding(
            check="layers-distinct", ok=False, fault="layers-tied", expected=expected, fix=fix,
            measured=f"the output is that of {guess.what}", numbers={"cosine": cosine},
        )  # fmt: skip
    if cosine is None:
        return skipped("layers-distinct", "`vectors`, or `model` with hidden rows that enter at its layers")
    same = cosine > SAME
    return Finding(
        check="layers-distinct", ok=not same, fault="layers-tied" if same else "", fix=fix if same else "",
        measured=f"least cosine between a layer's vectors and the first layer's is {cosine:.4f} ({source})",
        expected=expected, numbers={"cosine": cosine},
    )  # fmt: skip


def _layer_cosine(m: Measurements) -> tuple[float | None, str]:
    """Return the least cosine between any layer's vectors and those of another, as seen inside or as stored."""
    rows: list[Tensor] = []
    num = m.subject.num_vectors
    if len(m.injected) > 1 and all(len(found) == num for found in m.injected):
        rows, source = m.injected, "as they enter"
    elif m.seen and m.entering and m.passes and all(s.outside == num for s in m.seen):
        rows = [call.values[0, :, :num] for call in m.calls if call.values is not None]
        source = "values as they enter"
        if m.vectors is not None and not isinstance(m.vectors, SoftKV):
            rows = []  # the values of equal hidden rows differ from layer to layer
    if not rows and isinstance(m.vectors, SoftPrefix):
        rows, source = list(m.vectors.vectors), "as stored"
    elif not rows and isinstance(m.vectors, SoftKV):
        rows, source = list(m.vectors.values), "as stored"
    if len(rows) < 2 or any(row.shape != rows[0].shape for row in rows):
        return None, ""
    first = rows[0].detach().float().flatten()
    return min(float(F.cosine_similarity(first, row.detach().float().flatten(), dim=0)) for row in rows[1:]), source


def check_layers_reached(m: Measurements) -> Finding:
    """Every layer gets its part of the prefix; where one cannot hold it, refuse instead of going on without.

    Layers are lost where a cache is shorter than the stack, where shapes differ from layer to layer, or where layers
    share their keys and values with others.
    """
    declared, guess = m.subject.declared, m.hypothesis
    fix = "Compare the layers that get vectors with those declared, and fail where they differ; a warning is not read."
    lost: list[int] = []
    if declared != "prompt" and any(m.entering) and not enters_once(m):
        lost = [layer for layer, count in enumerate(m.entering) if count == 0 or m.seen[layer].is_blank]
    elif declared != "prompt" and not all(seen.is_blank for seen in m.seen):
        lost = [layer for layer, seen in enumerate(m.seen) if seen.is_blank]
    wrong = [layer for layer, error in enumerate(m.value_errors) if error is not None and error > m.match]
    part = declared != "prompt" and 0 < len(wrong) < m.base.spec.num_layers
    cosine, _ = _layer_cosine(m)
    other = guess is not None and guess.fault in ("embeddings-only", "layers-tied")
    other = other or (cosine is not None and cosine > SAME)
    named = guess is not None and guess.fault == "layers-dropped"
    if not m.entering and not m.value_errors and m.expected is None and not lost:
        return skipped("layers-reached", "`model` with its layers in a ModuleList, or `vectors`")
    numbers = {"lost": lost, "foreign": wrong, "entering": m.entering}
    found: list[str] = []
    if lost:
        found.append(f"nothing enters at layers {', '.join(map(str, lost))}")
    if part:
        found.append(f"layers {', '.join(map(str, wrong))} hold values that are not theirs")
    if named and guess is not None:
        found.append(f"the output is that of {guess.what}")
    bad = bool(found) and not other and (part or m.conforms is not True)
    measured = "; ".join(found) if bad else f"vectors in {m.base.spec.num_layers} of {m.base.spec.num_layers} layers"
    if not bad and declared == "prompt":
        measured = "declared as a prompt: its rows pass through every layer"
    return Finding(
        check="layers-reached", ok=not bad, fault="layers-dropped" if bad else "", measured=measured,
        expected="the declared vectors in every layer", fix=fix if bad else "", numbers=numbers,
    )  # fmt: skip
