"""PEFT's own models around the tiny bases, handed over as their users run them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from foreword.core.block import Block
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrompt, Vectors
from foreword.doctor.subjects import Implementation
from tests.doctor.lab.materials import P, private, vectors_for
from tests.tiny import tiny


def wrapped(name: str, kind: str, num: int = P, dtype: str = "float32") -> tuple[Any, FrozenModel, Vectors]:
    """Return (PEFT model, base, the vectors that were put into it)."""
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    base = tiny(name, dtype)
    config = {"prompt": PromptTuningConfig, "kv": PrefixTuningConfig}[kind]
    model = get_peft_model(private(base), config(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num))
    vectors = vectors_for(name, kind, num, dtype=dtype)
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.copy_(flat(vectors))
    return model.eval(), base, vectors


def flat(vectors: Vectors) -> Tensor:
    """Return vectors in PEFT's layout: [P, D], or [P, L·2·Hkv·Dh]."""
    if isinstance(vectors, SoftPrompt):
        return vectors.vectors
    assert isinstance(vectors, SoftKV)
    parts = [part for pair in zip(vectors.keys, vectors.values, strict=True) for part in pair]
    return torch.cat([part.transpose(0, 1).reshape(part.shape[1], -1) for part in parts], dim=1)


@cache
def peft_prompt(name: str, cut: bool = True) -> Implementation:
    """Return PEFT's prompt tuning, rows padded as they come: wrong with pads at the left (notes on PEFT's defects)."""
    model, base, vectors = wrapped(name, "prompt")

    @torch.no_grad()
    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits[:, P:] if cut else logits

    return Implementation(
        declared="prompt", num_vectors=P, base=base, forward=forward, model=model, vectors=with_block(vectors)
    )


def peft_by_row(name: str, kind: str, dtype: str = "float32") -> Implementation:
    """Return PEFT's prompt or prefix tuning, one row after the other and without padding: right."""
    model, base, vectors = wrapped(name, kind, dtype=dtype)

    @torch.no_grad()
    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor | None = None
        for place, (row, real) in enumerate(zip(ids, mask, strict=True)):
            single = row[real.bool()][None]
            logits = model(input_ids=single, attention_mask=torch.ones_like(single)).logits
            if found is None:
                found = logits.new_zeros(*ids.shape, logits.shape[-1])
            found[place][real.bool()] = logits[0, -single.shape[1] :]
        assert found is not None
        return found

    @torch.no_grad()
    def generate(ids: Tensor, mask: Tensor, num_new: int) -> Tensor:
        rows = []
        for row, real in zip(ids, mask, strict=True):
            single = row[real.bool()][None]
            whole = model.generate(
                input_ids=single,
                attention_mask=torch.ones_like(single),
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            rows.append(whole[0, -num_new:])
        return torch.stack(rows)

    return Implementation(
        declared="prompt" if kind == "prompt" else "kv",
        num_vectors=P,
        base=base,
        forward=forward,
        model=model,
        vectors=with_block(vectors),
        generate=generate,
    )


def with_block(vectors: Vectors) -> Vectors:
    """Return vectors as an import from PEFT gives them."""
    if isinstance(vectors, SoftPrompt):
        return SoftPrompt(vectors.vectors, Block((vectors.num_vectors,)))
    return vectors
