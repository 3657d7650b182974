"""A prefix that is a prompt: the vectors enter once, before the first layer, and nothing enters above it."""

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


class ReleasedPrefix(nn.Module):
    """What the team released: `prefix` [P, D] is put in front of the embeddings, and the model runs as ever."""

    def __init__(self, model: nn.Module, prefix: torch.Tensor) -> None:
        super().__init__()
        self.model, self.prefix = model, prefix

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        embeds, whole = with_vectors(self.model.get_input_embeddings()(ids), mask, self.prefix)
        positions = (whole.cumsum(1) - 1).clamp_min(0)
        logits = self.model(inputs_embeds=embeds, attention_mask=whole, position_ids=positions).logits
        return logits[:, len(self.prefix) :]


class DeepPrefix(nn.Module):
    """What the name promises: layer l reads `[prefix[l] ; text]`, and of its output only the text's rows go on."""

    def __init__(self, model: nn.Module, prefix: torch.Tensor) -> None:
        super().__init__()
        self.model, self.prefix = model, prefix
        for layer, rows in zip(model.model.layers, prefix, strict=True):
            layer.register_forward_pre_hook(self._put_in_front(rows), with_kwargs=True)
        self._vectors_at: torch.Tensor | None = None

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        num = self.prefix.shape[1]
        embeds, whole = with_vectors(self.model.get_input_embeddings()(ids), mask, self.prefix[0])
        starts = mask.argmax(dim=1, keepdim=True)
        self._vectors_at = starts + torch.arange(num)
        positions = (whole.cumsum(1) - 1).clamp_min(0)
        logits = self.model(inputs_embeds=embeds, attention_mask=whole, position_ids=positions).logits
        return logits[:, num:]

    def _put_in_front(self, rows: torch.Tensor):
        def replace(module, args, kwargs):
            hidden = args[0].clone()
            for row, places in enumerate(self._vectors_at):
                hidden[row, places] = rows.to(hidden.dtype)
            return (hidden, *args[1:]), kwargs

        return replace


def with_vectors(embeds: torch.Tensor, mask: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings and mask with each row's vectors between its padding at the left and its text."""
    rows, masks = [], []
    for row, own in zip(embeds, mask, strict=True):
        start = int(own.argmax())
        rows.append(torch.cat([row[:start], vectors.to(row.dtype), row[start:]]))
        masks.append(torch.cat([own[:start], torch.ones(len(vectors), dtype=own.dtype), own[start:]]))
    return torch.stack(rows), torch.stack(masks)


def trained(base: FrozenModel) -> SoftPrefix:
    """Vectors [L, P, D] as training leaves them: each layer's own, started from a text and moved by a tenth."""
    start = initial_vectors(base, "prefix", Block((NUM_VECTORS,)), TEXT).tensors()["prefix"]
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    return SoftPrefix(start + 0.1 * start.std(dim=-1, keepdim=True) * noise, Block((NUM_VECTORS,)))


def released(base: FrozenModel) -> Implementation:
    """The release, as its makers describe it."""
    prefix = initial_vectors(base, "prompt", Block((NUM_VECTORS,)), TEXT).vectors
    module = ReleasedPrefix(base.model, prefix).eval()
    return Implementation(
        declared="prefix", num_vectors=NUM_VECTORS, base=base, model=module, forward=module, vectors={"prefix": prefix}
    )


def cured(base: FrozenModel) -> Implementation:
    """The same with vectors of its own in every layer, on a copy of the model that may keep the hooks."""
    vectors = trained(base)
    own = load_base(str(BASE), dtype="float32")
    module = DeepPrefix(own.model, vectors.vectors).eval()
    return Implementation(
        declared="prefix", num_vectors=NUM_VECTORS, base=base, model=module, forward=module, vectors=vectors
    )


def main() -> list[Diagnosis]:
    base = load_base(str(BASE), dtype="float32")
    found = []
    for title, implementation in (("As released", released(base)), ("With vectors in every layer", cured(base))):
        diagnosis = diagnose(implementation)
        print(f"## {title}\n\n{render(diagnosis.report(), 'text')}")
        found.append(diagnosis)
    return found


if __name__ == "__main__":
    main()
