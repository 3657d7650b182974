"""Faults of the keys and values themselves: their shapes, their rotation, and windows that they leave."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrefix
from foreword.doctor.subjects import Implementation
from tests.doctor.lab.handmade import HandKV, HandPrefix
from tests.doctor.lab.layer_plants import kv_of
from tests.doctor.lab.materials import (
    CLEAR,
    P,
    differs,
    greedy_reference,
    private,
    probes_for,
    ragged,
    subject,
    vectors_for,
)
from tests.doctor.lab.plant import Plant
from tests.tiny import COMMON, tiny

LONG = 12
"""Vectors enough for a rotation to tell."""


class Moved(HandKV):
    """A flat file [P, L·2·Hkv·Dh] read in another order, or fitted to the heads by force."""

    def __init__(self, model: Any, vectors: SoftKV, how: str, **switches: Any) -> None:
        keys, values = ([force(part, how) for part in kind] for kind in (vectors.keys, vectors.values))
        super().__init__(model, keys, values, **switches)


def force(part: Tensor, how: str) -> Tensor:
    """Return keys or values [H, P, Dh] as a wrong reader sees them."""
    heads, num, size = part.shape
    if how == "viewed":  # [P, Hkv, Dh] in the file, read as [Hkv, P, Dh] without a permutation
        return part.transpose(0, 1).contiguous().view(heads, num, size)
    if how == "swapped":  # Hkv and Dh confused
        return part.transpose(0, 1).contiguous().view(num, size, heads).permute(2, 0, 1).contiguous()
    if how == "sliced":  # made for all query heads, the first Hkv kept
        return part[: heads // 2]
    if how == "narrowed":  # made with D/H where the base has its own head size; the rest filled with zeros
        return torch.nn.functional.pad(part, (0, part.shape[2]))
    return part


def reordered(name: str, how: str) -> Implementation:
    """The right numbers in the wrong order."""
    free = kv_of(name)
    return subject(tiny(name), free, Moved(private(tiny(name)), free, how, layout="rows"))


def all_heads(name: str, how: str) -> Implementation:
    """Vectors for H query heads on a base that has fewer key/value heads."""
    free = kv_of(name)
    wide = SoftKV(*(tuple(part.repeat_interleave(2, 0) + 0.1 for part in kind) for kind in (free.keys, free.values)))
    made = Moved(private(tiny(name)), wide, how, layout="rows")
    return subject(tiny(name), wide, made, vectors=dict(wide.tensors()))


def half_size(name: str, how: str) -> Implementation:
    """Vectors of half the head size, where D/H was taken for Dh."""
    free = kv_of(name)
    size = free.keys[0].shape[2] // 2
    narrow = SoftKV(*(tuple(part[:, :, :size].contiguous() for part in kind) for kind in (free.keys, free.values)))
    made = Moved(private(tiny(name)), narrow, how, layout="rows")
    return subject(tiny(name), narrow, made, vectors=dict(narrow.tensors()))


def wrong_shape() -> Iterator[Plant]:
    """Hkv, Dh or the order of the axes taken wrong; silently, or with a crash."""
    for name in ("llama", "qwen3", "gpt2", "mistral", "gemma3"):
        for how in ("viewed", "swapped"):
            yield Plant(
                fault="wrong-shape",
                architecture=name,
                make=partial(reordered, name, how),
                variant=f"kv {how}",
                proof=differs(name, "kv"),
                cheap=name == "llama" and how == "viewed",
            )
    made = [(all_heads, "kv for all query heads, ", ("llama", "qwen3"), ("sliced", "as-is"))]
    made += [(half_size, "kv with a head size of half, ", ("llama-head-dim", "qwen3"), ("narrowed", "as-is"))]
    for build, variant, names, ways in made:
        for name in names:
            for how in ways:
                yield Plant(
                    fault="wrong-shape",
                    architecture=name,
                    make=partial(build, name, how),
                    variant=variant + how,
                    proof=raises if how == "as-is" else differs(name, "kv"),
                )


def raises(made: Implementation) -> tuple[float, float]:
    """Proof of a fault that crashes: a forward raises."""
    ids, mask = ragged(made.base.spec.vocab_size)
    try:
        made.forward(ids, mask)
    except RuntimeError:
        return 1.0, 0.0
    return 0.0, 0.0


def turned(base: FrozenModel, key: Tensor, times: int) -> Tensor:
    """Return keys [Hkv, P, Dh] rotated `times` more for positions 0..P-1 (negative: turned back)."""
    rotary = base.model.base_model.rotary_emb
    cos, sin = rotary(key, torch.arange(key.shape[1])[None])
    width = cos.shape[-1]
    part, rest = key[..., :width], key[..., width:]
    for _ in range(abs(times)):
        half = width // 2
        other = torch.cat([-part[..., half:], part[..., :half]], dim=-1)
        part = part * cos + (other * sin if times > 0 else -other * sin)
    return torch.cat([part, rest], dim=-1)


def rotated(name: str, times: int) -> Implementation:
    """Stored keys turned once more, or turned back, when they are put into the cache."""
    base, free = tiny(name), kv_of(name, LONG)
    keys = [turned(base, key, times) for key in free.keys]
    return subject(base, free, HandKV(private(base), keys, free.values, layout="rows"))


def precomputed(name: str, times: int) -> Implementation:
    """Hidden-state vectors whose keys and values were computed beforehand, by somebody who forgot the rotation."""
    base, states = tiny(name), vectors_for(name, "prefix", LONG)
    compiled = compile(base, states)
    keys = [turned(base, key, times) for key in compiled.keys]
    made = HandKV(private(base), keys, compiled.values, layout="rows")
    return subject(base, states, made, probes=probes_for(base, states))


def misrotated() -> Iterator[Plant]:
    """Keys rotated once more when they are put into the cache, or put there as they were before rotation."""
    for variant, times in (("twice", 1), ("not at all", -1)):
        for name in ("llama", "qwen3", "mistral", "gpt-neox", "qwen2", "phi3"):
            yield Plant(
                fault="keys-misrotated",
                architecture=name,
                make=partial(rotated, name, times),
                variant=f"kv {variant}",
                proof=differs(name, "kv", num=LONG),
                cheap=name in ("llama", "qwen3"),
            )
        for name in ("llama", "qwen3"):
            yield Plant(
                fault="keys-misrotated",
                architecture=name,
                make=partial(precomputed, name, times),
                variant=f"prefix precomputed, {variant}",
                proof=differs(name, "prefix", num=LONG),
            )


@cache
def small_window(window: int, kind: str) -> FrozenModel:
    """Return a tiny base whose layers all attend to a short window."""
    torch.manual_seed(0)
    config: Any = {
        "mistral": lambda: tf.MistralConfig(**COMMON, sliding_window=window),
        "gemma2": lambda: tf.Gemma2Config(
            **COMMON, head_dim=16, sliding_window=window, layer_types=["sliding_attention"] * 3
        ),
    }[kind]()
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return FrozenModel(model)


def windowed(kind: str, window: int, num: int) -> Implementation:
    """A right implementation on a base whose windows the prefix leaves."""
    base = small_window(window, kind)
    states = torch.randn(3, num, 64, generator=torch.Generator().manual_seed(2))
    vectors = SoftPrefix(states, Block((num,)))
    return subject(base, vectors, HandPrefix(private(base), states, layout="rows"))


def reaches(made: Implementation, at: int) -> tuple[float, float]:
    """Proof: the vectors' effect at a text of `at` tokens is nothing, while it is plain at the first token."""
    ids = torch.randint(3, 97, (1, at), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        effect = (made.forward(ids, torch.ones_like(ids)) - made.base.model(input_ids=ids).logits)[0].abs().amax(-1)
    return float(effect[0]) if float(effect[-1]) < 1e-5 else 0.0, CLEAR


def rolling(name: str) -> Implementation:
    """A cache of 18 entries, of which the oldest go first: the prefix."""
    free = kv_of(name)
    return subject(tiny(name), free, HandKV(private(tiny(name)), free.keys, free.values, layout="rows", keep_last=18))


def drifts(name: str, made: Implementation) -> tuple[float, float]:
    """Proof: greedy tokens are not those that a forward over the whole row gives."""
    assert made.generate is not None
    ids = torch.arange(5, 16)[None]
    found = made.generate(ids, torch.ones_like(ids), 40)[0].tolist()
    return float(found != greedy_reference(tiny(name), kv_of(name), ids[0].tolist(), 40)), 0.5


def window_eviction() -> Iterator[Plant]:
    """The prefix leaves a window: the base's own, too short for it, or that of a rolling cache."""
    for kind in ("mistral", "gemma2"):
        for window, num in ((8, P), (24, 30)):
            yield Plant(
                fault="window-eviction",
                architecture=f"{kind}-window",
                make=partial(windowed, kind, window, num),
                variant=f"prefix of {num} in a window of {window}",
                proof=partial(reaches, at=3 * window),
                cheap=window == 24 and kind == "mistral",
            )
    for name in ("llama", "gpt2", "qwen3"):
        yield Plant(
            fault="window-eviction",
            architecture=name,
            make=partial(rolling, name),
            variant="a rolling cache of 18",
            proof=partial(drifts, name),
        )


PLANTS = [*wrong_shape(), *misrotated(), *window_eviction()]
