"""Latency that grows with depth, and quality far below offline: two faults at once, cured one after the other."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import foreword.demo
from foreword.core.block import Block
from foreword.core.init import initial_vectors
from foreword.core.model import FrozenModel, load_base
from foreword.core.prompt import SoftPrefix
from foreword.doctor.diagnose import Diagnosis, diagnose
from foreword.doctor.subjects import Implementation
from foreword.report import render

BASE = Path(foreword.demo.__file__).parent / "base-3m"
NUM_VECTORS = 8
TEXT = "text:Say which department should answer this message, in one word."


class LayerByLayer(nn.Module):
    """A prefix put in front of every layer's input, the layers called one by one.

    `keeps_outputs` is the first fault of the rollout: the prefix rows of a layer's output stay, and the next layer puts
    its own in front of them.
    """

    def __init__(self, model: nn.Module, prefix: torch.Tensor, *, keeps_outputs: bool) -> None:
        super().__init__()
        self.model, self.prefix, self.keeps_outputs = model, prefix, keeps_outputs

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        decoder, text = self.model.model, ids.shape[1]
        hidden = decoder.embed_tokens(ids)
        for layer, vectors in zip(decoder.layers, self.prefix, strict=True):
            hidden = torch.cat([vectors.to(hidden.dtype).expand(len(ids), -1, -1), hidden], dim=1)
            seen, positions = visible(mask, hidden.shape[1])
            bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min).to(hidden.dtype)
            hidden = layer(
                hidden,
                attention_mask=bias,
                position_ids=positions,
                position_embeddings=decoder.rotary_emb(hidden, positions),
            )
            if not self.keeps_outputs:
                hidden = hidden[:, -text:]
        return self.model.lm_head(decoder.norm(hidden[:, -text:]))


def visible(mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return who sees whom [B, 1, S, S] and positions [B, S] for rows of prefix and text, padding between left out."""
    whole = torch.cat([torch.ones(len(mask), length - mask.shape[1], dtype=mask.dtype), mask], dim=1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = causal & whole.bool()[:, None, None, :]
    return seen | torch.eye(length, dtype=torch.bool), (whole.cumsum(1) - 1).clamp_min(0)


def trained(base: FrozenModel) -> SoftPrefix:
    """Vectors [L, P, D] as training leaves them: each layer's own, started from a text and moved by a tenth."""
    start = initial_vectors(base, "prefix", Block((NUM_VECTORS,)), TEXT).tensors()["prefix"]
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    return SoftPrefix(start + 0.1 * start.std(dim=-1, keepdim=True) * noise, Block((NUM_VECTORS,)))


def rollout(base: FrozenModel, *, keeps_outputs: bool, same_everywhere: bool) -> Implementation:
    """The rollout, with its two faults or without."""
    vectors = trained(base)
    if same_everywhere:  # one parameter [P, D], expanded over the layers
        vectors = SoftPrefix(vectors.vectors[:1].expand_as(vectors.vectors), vectors.block)
    module = LayerByLayer(base.model, vectors.vectors, keeps_outputs=keeps_outputs).eval()
    return Implementation(
        declared="prefix", num_vectors=NUM_VECTORS, base=base, model=module, forward=module, vectors=vectors
    )


def main() -> list[Diagnosis]:
    base = load_base(str(BASE), dtype="float32")
    stages = (
        ("As rolled out", rollout(base, keeps_outputs=True, same_everywhere=True)),
        ("First cure: only the text's rows go on", rollout(base, keeps_outputs=False, same_everywhere=True)),
        ("Second cure: vectors of its own for every layer", rollout(base, keeps_outputs=False, same_everywhere=False)),
    )
    found = []
    for title, implementation in stages:
        diagnosis = diagnose(implementation)
        print(f"## {title}\n\n{render(diagnosis.report(), 'text')}")
        found.append(diagnosis)
    return found


if __name__ == "__main__":
    main()
