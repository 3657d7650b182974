"""A prompt trained by hand on a tiny model, as a `TrainingRun`: each argument can be made wrong."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from foreword.doctor.subjects import TrainingRun
from tests.tiny import tiny

P, T, B = 5, 9, 6


class Prompted(nn.Module):
    """P rows in front of the embeddings of a frozen model, whose own parameters are not shared with other tests."""

    def __init__(self, name="llama", dtype=torch.float32, start="vocabulary"):
        super().__init__()
        base = tiny(name)
        self.base = copy.deepcopy(base.model).requires_grad_(False)
        table = base.embedding.weight.detach()
        rows = table[10 : 10 + P].clone()
        if start == "random":
            rows = torch.randn(P, table.shape[1], generator=torch.Generator().manual_seed(0))
        self.rows = nn.Parameter(rows.to(dtype))
        self.mask = None
        self.wrong_slope = 1.0

    def forward(self, ids):
        rows = self.rows.float() if self.mask is None else self.rows.float() * self.mask
        if self.wrong_slope != 1.0:  # the same value, another gradient
            rows = self.wrong_slope * rows + (1 - self.wrong_slope) * rows.detach()
        embeds = torch.cat([rows.expand(len(ids), -1, -1), self.base.get_input_embeddings()(ids)], dim=1)
        return self.base(inputs_embeds=embeds, use_cache=False).logits


class Cached(Prompted):
    """P keys and values in the cache, [L, P, 2·Hkv·Dh]."""

    def __init__(self, name="llama"):
        super().__init__(name)
        spec = tiny(name).spec
        layer = spec.layers[0]
        with torch.no_grad():
            cache = self.base(input_ids=torch.arange(20, 20 + P)[None], use_cache=True).past_key_values
        parts = [torch.cat([c.keys[0], c.values[0]]).transpose(0, 1).flatten(1) for c in cache.layers]
        self.rows = nn.Parameter(torch.stack(parts).clone())
        self.heads, self.width = layer.num_kv_heads, layer.head_dim
        self.drops_in_training = False

    def forward(self, ids):
        if self.drops_in_training and self.base.training:
            return self.base(input_ids=ids, use_cache=False).logits + 0.0 * self.rows.sum()
        cache = DynamicCache()
        for index, layer in enumerate(self.rows):
            pair = layer.view(P, 2, self.heads, self.width).permute(1, 2, 0, 3)
            cache.update(*(part.expand(len(ids), -1, -1, -1) for part in pair), index)
        positions = torch.arange(P, P + ids.shape[1])[None].expand(len(ids), -1)
        mask = torch.ones(len(ids), P + ids.shape[1], dtype=torch.long)
        return self.base(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def batch(step):
    """Return ids [B, T] with the last token decided by the one before."""
    ids = torch.randint(20, 97, (B, T), generator=torch.Generator().manual_seed(step))
    ids[:, -1] = 11 + ids[:, -2] % 2
    return ids


def shifted(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def labels_of(ids, num):
    """Labels of HF's convention: P places and the question ignored."""
    labels = torch.full((len(ids), num + T), -100)
    labels[:, -2:] = ids[:, -2:]
    return labels


class Loop:
    """The trainer."""

    def __init__(
        self, model=None, lr=3e-3, optimizer=torch.optim.AdamW, trained=None, make_labels=labels_of, loss=shifted
    ):
        self.model = model or Prompted()
        self.num = P if type(self.model) is Prompted else 0
        self.optimizer = optimizer(trained or [self.model.rows], lr=lr)
        self.make_labels, self.compute = make_labels, loss
        self.taken = 0
        self.start = self.model.rows.detach().clone()
        self.history = []

    def loss(self, ids):
        return self.compute(self.model(ids), self.make_labels(ids, self.num))

    def step(self):
        self.optimizer.zero_grad()
        loss = self.loss(batch(self.taken))
        loss.backward()
        self.optimizer.step()
        self.taken += 1
        return float(loss.detach())

    def train(self, steps):
        for _ in range(steps):
            self.history.append({"step": self.taken, "train_loss": self.step(), "lr": 3e-3})
        return self

    def subject(self, **fields):
        ids, taken = batch(1000), self.taken
        known = {
            "model": self.model,
            "base": self.model.base,
            "vectors": {"rows": self.model.rows},
            "num_vectors": P,
            "layered": self.num == 0,
            "optimizer": self.optimizer,
            "loss": lambda: self.loss(ids),
            "step": self.step,
            "labels": self.make_labels(ids, self.num),
            "input_ids": ids,
            "logits": lambda: self.model(ids).detach(),
            "vocabulary": tiny("llama").embedding.weight.detach() if self.num else None,
            "initial": {"rows": self.start},
            "history": tuple(self.history),
            "rewind": lambda: setattr(self, "taken", taken),
        }
        return TrainingRun(**{**known, **fields})
