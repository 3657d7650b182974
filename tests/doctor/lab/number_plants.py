"""Faults of the numbers: another base's weights, coarser ones, and such as are not finite."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt, Vectors
from foreword.doctor.subjects import Implementation
from tests.doctor.lab.handmade import HandKV
from tests.doctor.lab.layer_plants import kv_of
from tests.doctor.lab.materials import differs, hand, private, probes_for, subject, vectors_for
from tests.doctor.lab.plant import Plant
from tests.tiny import tiny

ADAPTED = ("q_proj.w", "v_proj.w", "c_attn.w", "query_key")
"""Parts of the names of matrices that a LoRA is merged into."""


def revised(base: FrozenModel, how: str) -> Any:
    """Return another revision of the base's model: weights of the same shapes moved."""
    model = private(base)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            if how == "revision":
                weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * 0.1)
            elif any(part in name for part in ADAPTED):
                left = torch.randn(weight.shape[0], 4, generator=generator)
                right = torch.randn(4, weight.shape[1], generator=generator)
                weight.add_(left @ right * weight.std() * 0.3)
    return model


def served(name: str, method: str, how: str) -> Implementation:
    """A right implementation whose model is another than the base it is compared with."""
    base, trained = tiny(name), vectors_for(name, method)
    return subject(base, trained, hand(revised(base, how), trained, layout="rows"))


def probed(name: str, method: str, how: str) -> Implementation:
    """A right implementation on a base that only the probes of training tell from the first."""
    first, trained = tiny(name), vectors_for(name, method)
    now = FrozenModel(revised(first, how))
    made = hand(copy.deepcopy(now.model), trained, layout="rows")
    return subject(now, trained, made, probes=probes_for(first, trained))


def other_base() -> Iterator[Plant]:
    """Vectors on a base that they were not trained for."""
    for name in ("llama", "gpt2", "qwen3", "bloom"):
        for method in ("prompt", "kv"):
            for how in ("revision", "merged LoRA"):
                for build, told in ((served, ""), (probed, ", told by probes")):
                    yield Plant(
                        fault="other-base",
                        architecture=name,
                        make=partial(build, name, method, how),
                        variant=f"{method} on a {how}{told}",
                        proof=differs(name, method),
                        cheap=name == "gpt2" and method == "kv" and how == "revision",
                    )


class CoarseLinear(nn.Module):
    """A linear layer with weights in whole numbers of `bits` bits, one scale a row."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        top = 2 ** (bits - 1) - 1
        scale = linear.weight.abs().amax(1, keepdim=True) / top
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        """Return rows times the weights, taken back to floating point."""
        weight = self.weight.to(rows.dtype) * self.scale.to(rows.dtype)  # type: ignore[operator]
        return F.linear(rows, weight, self.bias)


def quantised(name: str, bits: int) -> Implementation:
    """The base's model with all linear layers but the head coarse."""
    model, rows = private(tiny(name)), vectors_for(name, "prompt")
    for parent in list(model.modules()):
        for part, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and part not in ("lm_head", "embed_out"):
                setattr(parent, part, CoarseLinear(child, bits))
    return subject(tiny(name), rows, hand(model, rows, layout="rows"))


def lowered(name: str, method: str) -> Implementation:
    """The model in bfloat16, where base and vectors are float32."""
    trained = vectors_for(name, method)
    return subject(tiny(name), trained, hand(private(tiny(name)).to(torch.bfloat16), trained, layout="rows"))


def narrowed(name: str, coarse: torch.dtype) -> Implementation:
    """Keys and values kept in a coarser type than they were trained in."""
    free = kv_of(name)
    keys, values = ([part.to(coarse).float() for part in kind] for kind in (free.keys, free.values))
    return subject(tiny(name), free, HandKV(private(tiny(name)), keys, values, layout="rows"))


def numerics() -> Iterator[Plant]:
    """The same vectors and base, in a dtype or quantisation other than in training."""
    for name in ("llama", "gpt2", "qwen3", "opt"):
        for method in ("prompt", "kv"):
            yield Plant(
                fault="numerics",
                architecture=name,
                make=partial(lowered, name, method),
                variant=f"{method} on a bfloat16 copy",
                proof=differs(name, method, bound=1e-3),
                cheap=name == "llama" and method == "kv",
            )
        for coarse, bound in ((torch.float8_e4m3fn, 1e-2), (torch.bfloat16, 1e-3)):
            short = str(coarse).removeprefix("torch.")
            yield Plant(
                fault="numerics",
                architecture=name,
                make=partial(narrowed, name, coarse),
                variant=f"kv stored as {short}",
                proof=differs(name, "kv", bound=bound),
                cheap=name == "gpt2" and coarse != torch.bfloat16,
            )
        for bits in (8, 4) if name != "gpt2" else ():  # GPT-2's layers are no nn.Linear
            yield Plant(
                fault="numerics",
                architecture=name,
                make=partial(quantised, name, bits),
                variant=f"prompt on {bits}-bit weights",
                proof=differs(name, "prompt", bound=1e-3),
            )


def spoilt(vectors: Vectors, how: str) -> Vectors:
    """Return vectors with one number that is not finite, or all of them 10,000 times as large."""

    def spoil(part: Tensor) -> Tensor:
        if how == "huge":
            return part * 1e4
        part = part.clone()
        part.view(-1)[7] = float(how)
        return part

    if isinstance(vectors, SoftKV):
        return SoftKV(tuple(map(spoil, vectors.keys)), tuple(map(spoil, vectors.values)), vectors.block)
    if isinstance(vectors, SoftPrefix):
        return SoftPrefix(spoil(vectors.vectors), vectors.block)
    return SoftPrompt(spoil(vectors.vectors), vectors.block)


def ill(name: str, method: str, how: str, **handed: Any) -> Implementation:
    """A right implementation of vectors that are broken."""
    broken = spoilt(vectors_for(name, method), how)
    return subject(tiny(name), broken, hand(private(tiny(name)), broken, layout="rows"), **handed)


def not_finite() -> Iterator[Plant]:
    """NaN or infinity in the vectors, or norms that leave the text no attention."""
    for name in ("llama", "gpt2", "qwen3", "bloom"):
        for method in ("prompt", "kv"):
            for how in ("nan", "inf", "huge"):
                if (name, method, how) == ("bloom", "prompt", "huge"):
                    continue  # BLOOM normalises its embeddings: the size of a row means nothing
                yield Plant(
                    fault="not-finite",
                    architecture=name,
                    make=partial(ill, name, method, how),
                    variant=f"{method} {how}",
                    proof=differs(name, method),
                    cheap=name == "llama" and how == "nan",
                )
        yield Plant(
            fault="not-finite",
            architecture=name,
            make=partial(ill, name, "kv", "nan", bare=True, black_box=True),
            variant="kv nan, black box and bare",
            proof=differs(name, "kv"),
        )


PLANTS = [*other_base(), *numerics(), *not_finite()]
