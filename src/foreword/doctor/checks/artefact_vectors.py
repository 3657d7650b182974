"""Checks of stored vectors as numbers: finite, of a fair size, not the same in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foreword.doctor.finding import Finding

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel

ENORMOUS = 100.0
"""Times the 99th percentile of real rows: the longest rows of trained vectors were seen at up to 10 times."""
FLOAT16_MAX = 65504.0
SAMPLE_TOKENS = 64
"""Tokens of the vocabulary that give real layer inputs, keys and values."""
SAME = 1e-4
"""Relative distance of two layers' vectors below which they are the same ones, stored twice."""

Parts = Mapping[str, Sequence[Tensor]]
"""By kind (prompt, prefix, keys, values), one tensor per layer with rows [N, width]."""


def parts_of(tensors: Mapping[str, Tensor]) -> Parts:
    """Return an artefact's tensors by kind and layer, heads side by side in a row."""
    if "prompt" in tensors:
        return {"prompt": [tensors["prompt"].float()]}
    if "prefix" in tensors:
        return {"prefix": list(tensors["prefix"].float().unbind())}
    layers = range(len(tensors) // 2)
    rows = {
        kind: [tensors[f"{kind}.{layer}"].float().transpose(0, 1).flatten(1) for layer in layers]
        for kind in ("key", "value")
    }
    return {"keys": rows["key"], "values": rows["value"]}


def check_sizes(parts: Parts, base: FrozenModel | None = None) -> Finding:
    """Go back to the last good vectors and clip the gradient: numbers that are not finite, enormous rows, or zeros.

    Row norms beside those of real rows of the base where it is given; without it, beside what float16 can hold.
    """
    bad = sum(int((~tensor.isfinite()).sum()) for layers in parts.values() for tensor in layers)
    rms = {
        f"{kind} of layer {layer}" if len(layers) > 1 else kind: float(tensor[tensor.isfinite()].square().mean().sqrt())
        for kind, layers in parts.items()
        for layer, tensor in enumerate(layers)
    }
    least, most = min(rms, key=lambda name: rms[name]), max(rms, key=lambda name: rms[name])
    measured = f"root mean square {rms[least]:.3g} (least, {least}) to {rms[most]:.3g} ({most})"
    numbers: dict[str, Any] = {"not_finite": bad, "least_rms": rms[least], "most_rms": rms[most]}
    expected = f"finite numbers within {FLOAT16_MAX:.0f}"
    largest = max(float(tensor.abs().max()) for layers in parts.values() for tensor in layers)
    huge = largest > FLOAT16_MAX
    if base is not None and not bad:
        ratio, where = _largest_ratio(parts, real_rows(base, parts))
        huge = huge or ratio > ENORMOUS
        measured += f"; the longest row ({where}) is {ratio:.3g} times the 99th percentile of real ones"
        expected = f"rows at most {ENORMOUS:.0f} times as long as real ones"
        numbers["largest_row"] = ratio
    if bad:
        measured = f"{bad} numbers are not finite; {measured}"
    dead = rms[least] <= float(torch.finfo(torch.float32).tiny)
    ok = not (bad or huge or dead)
    return Finding(
        check="vectors",
        ok=ok,
        measured=measured,
        expected=expected,
        fix="These vectors are zero: train them again." if dead else "Go back to the last good vectors, and clip.",
        fault="" if ok or (dead and not bad and not huge) else "not-finite",
        numbers=numbers,
    )


def check_layers_differ(parts: Parts) -> Finding:
    """Give each layer parameters of its own: one prefix tied over all layers reaches far less.

    The relative distance between the vectors of every two layers; layers that were trained apart are never the same.
    """
    distances: list[float] = []
    pairs = 0
    for layers in parts.values():
        for one in range(len(layers)):
            for other in range(one + 1, len(layers)):
                if layers[one].shape != layers[other].shape:
                    continue
                first, second = (layers[place].nan_to_num() for place in (one, other))
                size = max(float(first.norm()), float(second.norm()), 1e-30)
                distances.append(float((first / size - second / size).norm()))
                pairs += 1
    if not distances:
        return Finding(check="layers differ", ok=True, skipped=True, measured="the vectors belong to one place only")
    same = sum(distance < SAME for distance in distances)
    ok = same < pairs / 2
    return Finding(
        check="layers differ",
        ok=ok,
        measured=f"{same} of {pairs} pairs of layers hold the same vectors; the nearest two differ by "
        f"{min(distances):.2g} of their norm",
        expected="vectors of their own in every layer",
        fix="Train parameters per layer; look for one module, or an expand, used for all of them.",
        fault="" if ok else "layers-tied",
        numbers={"same": same, "pairs": pairs, "least_distance": min(distances)},
    )


def real_rows(base: FrozenModel, parts: Parts) -> Parts:
    """Return what the base itself has in the place of such vectors: embeddings, layer inputs, or keys and values."""
    from foreword.core.block import Block
    from foreword.core.init import from_vocabulary, kv_of, states_of

    if "prompt" in parts:
        return {"prompt": [base.embedding.weight.detach().float().cpu()]}
    windows = [layer.window for layer in base.spec.layers if layer.window is not None]
    limits = [limit for limit in (base.spec.max_positions, *windows) if limit is not None]
    count = min([SAMPLE_TOKENS, base.spec.vocab_size, *(limit - 1 for limit in limits)])
    rows = from_vocabulary(base, count, seed=0)
    if "prefix" in parts:
        return {"prefix": list(states_of(base, rows, Block((count,))).unbind())}
    kv = kv_of(base, rows, Block((count,)))
    return parts_of(kv.tensors())


def _largest_ratio(parts: Parts, real: Parts) -> tuple[float, str]:
    found = [(0.0, "")]
    for kind, layers in parts.items():
        for layer, (mine, other) in enumerate(zip(layers, real[kind], strict=False)):
            typical = float(torch.quantile(other.norm(dim=1), 0.99))
            ratio = float(mine.norm(dim=1).max()) / max(typical, 1e-12)
            found.append((ratio, f"{kind} of layer {layer}" if len(layers) > 1 else kind))
    return max(found)
