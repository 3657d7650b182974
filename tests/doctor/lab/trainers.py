"""Training loops as people write them: a module around a frozen model, labels, AdamW, a few batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from foreword.core.model import FrozenModel
from foreword.doctor.subjects import TrainingRun
from tests.doctor.lab.handmade import call
from tests.doctor.lab.materials import private
from tests.tiny import tiny

P = 8
LENGTH = 10
ANSWERS = (11, 12, 13)
PAIRS = [("llama", "prompt"), ("gpt2", "prompt"), ("qwen3", "kv"), ("gpt2", "kv")]
"""Architectures and methods that faults of training are planted in."""
SANE = 0.03
"""Of the vectors' root mean square: what AdamW moves each number by in a step."""


class Tuned(nn.Module):
    """A frozen model with P trained vectors: rows in front of the embeddings, or keys and values in the cache."""

    def __init__(self, base: FrozenModel, method: str, start: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base, self.method, self.spec = private(base), method, base.spec
        self.base.requires_grad_(False)
        self.vectors = nn.Parameter(start.to(dtype))
        self.checkpointed = False

    def rows(self) -> Tensor:
        """Return the vectors as they enter."""
        return self.vectors.float()

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits: [B, P + T, V] for a prompt, [B, T, V] for keys and values."""
        rows = self.rows()
        if self.method == "prompt":
            text = self.base.get_input_embeddings()(ids)
            embeds = torch.cat([rows.expand(len(ids), -1, -1), text], dim=1)
            return call(self.base, inputs_embeds=embeds).logits  # type: ignore[no-any-return]
        if self.checkpointed:  # transformers runs checkpointed layers without a cache
            embeds = self.base.get_input_embeddings()(ids).requires_grad_()
            return call(self.base, inputs_embeds=embeds).logits  # type: ignore[no-any-return]
        cache = DynamicCache()
        parts = rows.view(P, self.spec.num_layers, 2, *self.spec_heads()).permute(1, 2, 3, 0, 4)
        for index, (key, value) in enumerate(parts):
            cache.update(key.expand(len(ids), -1, -1, -1), value.expand(len(ids), -1, -1, -1), index)
        positions = P + torch.arange(ids.shape[1]).expand_as(ids)
        mask = torch.ones(len(ids), P + ids.shape[1], dtype=torch.long)
        return call(  # type: ignore[no-any-return]
            self.base, input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits

    def spec_heads(self) -> tuple[int, int]:
        """Return (Hkv, Dh)."""
        layer = self.spec.layers[0]
        return layer.num_kv_heads, layer.head_dim


def batch_of(step: int, rows: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids [rows, LENGTH], the answer last, and the answers: one of three, by the token before."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    ids = torch.randint(20, 97, (rows, LENGTH), generator=generator)
    answers = torch.tensor(ANSWERS)[ids[:, -2] % 3]
    ids[:, -1] = answers
    return ids, answers


def vocabulary_start(base: FrozenModel, seed: int = 0) -> Tensor:
    """Return P embedding rows of the base."""
    picked = torch.randperm(base.spec.vocab_size, generator=torch.Generator().manual_seed(seed))[:P]
    return base.embedding.weight.detach()[picked].clone()


def text_kv_start(base: FrozenModel, seed: int = 0, num: int = P) -> Tensor:
    """Return the keys and values of P tokens, flat [P, L·2·Hkv·Dh]."""
    picked = torch.randperm(base.spec.vocab_size, generator=torch.Generator().manual_seed(seed))[None, :num]
    with torch.no_grad():
        cache = base.model(input_ids=picked, use_cache=True).past_key_values
    parts = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    return parts.permute(3, 0, 1, 2, 4).flatten(1).contiguous()


def plain_labels(ids: Tensor, num: int) -> Tensor:
    """Return labels [B, num + T]: the answer at the last place, nothing elsewhere."""
    labels = torch.full((len(ids), num + ids.shape[1]), -100)
    labels[:, -1] = ids[:, -1]
    return labels


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of each label by the logits one place before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class Trainer:
    """A loop held between two steps; switches plant what goes wrong in one."""

    def __init__(
        self,
        name: str,
        method: str = "prompt",
        *,
        relative_lr: float = SANE,
        start: Tensor | None = None,
        labels: Callable[[Tensor, int], Tensor] = plain_labels,
        loss: Callable[[Tensor, Tensor], Tensor] = shifted_loss,
        dtype: torch.dtype = torch.float32,
        prepare: Callable[[Tuned], Any] | None = None,
        seed: int = 0,
        trained: Callable[[Tuned], list[nn.Parameter]] | None = None,
    ) -> None:
        base = tiny(name)
        self.base, self.seed, self.labels, self.compute_loss = base, seed, labels, loss
        if start is None:
            start = vocabulary_start(base, seed) if method == "prompt" else text_kv_start(base, seed)
        self.model = Tuned(base, method, start, dtype)
        if prepare is not None:
            prepare(self.model)
        parameters = [self.model.vectors] if trained is None else trained(self.model)
        self.lr = relative_lr * float(start.square().mean().sqrt())
        self.optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.num_front = P if method == "prompt" else 0
        self.taken = 0
        self.history: list[dict[str, float]] = []
        self.initial = {"vectors": self.model.vectors.detach().clone()}

    def loss_on(self, ids: Tensor) -> Tensor:
        """Return the training loss."""
        return self.compute_loss(self.model(ids), self.labels(ids, self.num_front))

    def step(self) -> float:
        """Take a step on the next batch."""
        ids, _ = batch_of(self.taken, seed=self.seed)
        self.optimizer.zero_grad()
        loss = self.loss_on(ids)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.taken += 1
        return float(loss.detach())

    def run(self, steps: int) -> list[float]:
        """Take steps and keep their records."""
        losses = []
        for _ in range(steps):
            losses.append(self.step())
            self.history.append({"step": self.taken, "train_loss": losses[-1], "lr": self.lr})
        return losses

    @torch.no_grad()
    def judge(self, rows: int = 64) -> float:
        """Return the true loss at the answers of rows that no step saw."""
        ids, answers = batch_of(10**6, rows)
        logits = self.model(ids)[:, -2].float()
        return float(F.cross_entropy(logits, answers))

    def subject(self, **more: Any) -> TrainingRun:
        """Hand the run over."""
        ids, _ = batch_of(self.taken, seed=self.seed)
        taken = self.taken

        def rewind() -> None:
            self.taken = taken

        given: dict[str, Any] = {
            "model": self.model,
            "base": self.model.base,
            "vectors": {"vectors": self.model.vectors},
            "num_vectors": P,
            "optimizer": self.optimizer,
            "loss": lambda: self.loss_on(ids),
            "step": self.step,
            "labels": self.labels(ids, self.num_front),
            "input_ids": ids,
            "logits": lambda: self.model(ids),
            "vocabulary": self.base.embedding.weight.detach() if self.num_front else None,
            "reference": None if self.num_front else {"vectors": text_kv_start(self.base, 7)},
            "initial": self.initial,
            "history": tuple(self.history),
            "rewind": rewind,
        }
        return TrainingRun(**{**given, **more})


def histories(make: Callable[[int], Trainer], steps: int, seeds: tuple[int, ...] = (0, 1, 2, 3)) -> Mapping[int, Any]:
    """Return the histories of real runs under several seeds."""
    found = {}
    for seed in seeds:
        trainer = make(seed)
        trainer.run(steps)
        found[seed] = tuple(trainer.history)
    return found
