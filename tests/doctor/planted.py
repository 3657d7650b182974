"""Faults planted by hand in small models, for the tests of the checks; each is a whole `Implementation`."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.forward import forward_rows
from foreword.core.init import initial_vectors
from foreword.core.prompt import SoftPrefix
from foreword.doctor.foreign import from_vectors
from foreword.doctor.subjects import Implementation

NUM = 5


def made(base, method, seed=0):
    """Vectors of usual norm, far from those of any other layer."""
    return initial_vectors(base, method, Block((NUM,)), "random", seed=seed)


def cached(base, vectors, *, prefix=None, start=None, seen=1, keep=None, **fields):
    """A cache in front of the text, as users of transformers write it; each argument can be made wrong.

    `start` is the text's first position, `seen` what the mask has over the prefix, `keep` a cache made once.
    """
    prefix = prefix or compile(base, vectors)
    num = prefix.num_positions
    first = num if start is None else start

    def forward(ids, mask):
        rows = len(ids)
        order = torch.argsort(mask, dim=1, stable=True)  # rows padded at the right go to the left
        moved, shown = ids.gather(1, order), mask.gather(1, order)
        positions = first + (shown.cumsum(1) - 1).clamp_min(0)
        whole = torch.cat([torch.full((rows, num), seen), shown], dim=1)
        cache = prefix.cache(rows) if keep is None else keep
        if keep is not None:
            whole = torch.cat([torch.ones(rows, cache.get_seq_length() - num, dtype=torch.long), whole], dim=1)
        logits = base.run(ids=moved, positions=positions, cache=cache, mask=whole)
        return logits.gather(1, torch.argsort(order, dim=1)[..., None].expand_as(logits))

    return Implementation(
        declared=vectors.method,
        num_vectors=NUM,
        base=base,
        model=base.model,
        forward=forward,
        vectors=vectors,
        **fields,
    )


def embedded(base, vectors, *, cut=True, pads_between=False, keep=slice(None), **fields):
    """Prompt rows written into `inputs_embeds`."""
    from transformers import DynamicCache

    def forward(ids, mask):
        rows, num = len(ids), NUM
        embeds = base.embed(ids)
        soft = vectors.vectors.to(base.dtype).expand(rows, -1, -1)
        if pads_between:
            built, whole = torch.cat([soft, embeds], dim=1), torch.cat([torch.ones(rows, num).long(), mask], dim=1)
            positions = torch.arange(whole.shape[1]).expand(rows, -1)
        else:
            built, whole, positions = torch.cat([embeds, soft], dim=1), None, None
            parts, masks = [], []
            for row, own in enumerate(mask):
                first = int(own.argmax())
                parts.append(torch.cat([embeds[row, :first], soft[row], embeds[row, first:]]))
                masks.append(torch.cat([own[:first], torch.ones(num).long(), own[first:]]))
            built, whole = torch.stack(parts), torch.stack(masks)
            positions = (whole.cumsum(1) - 1).clamp_min(0)
        logits = base.run(embeds=built, positions=positions, cache=DynamicCache(), mask=whole)
        if not cut:
            return logits
        if pads_between or bool(mask[:, 0].all()):
            return logits[:, num:]
        return logits[:, num:]

    return Implementation(
        declared=fields.pop("declared", vectors.method), num_vectors=NUM, base=base, model=base.model, forward=forward,
        vectors=vectors, **fields,
    )  # fmt: skip


class Deep(nn.Module):
    """A hidden-state prefix run layer by layer, in plain Llama code: no cache, no hook."""

    def __init__(self, base, vectors, *, keep_outputs=False, sites=None):
        super().__init__()
        self.base, self.vectors, self.keep_outputs = base.model, vectors, keep_outputs
        self.sites = range(len(vectors)) if sites is None else sites

    def forward(self, ids, mask):
        inner = self.base.model
        hidden, rows = inner.embed_tokens(ids), len(ids)
        for layer, module in enumerate(inner.layers):
            if layer in self.sites:
                hidden = torch.cat([self.vectors[layer].to(hidden).expand(rows, -1, -1), hidden], dim=1)
            length = hidden.shape[1]
            front = length - ids.shape[1]
            whole = torch.cat([torch.ones(rows, front).long(), mask], dim=1)
            positions = (whole.cumsum(1) - 1).clamp_min(0)
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            seen = causal & whole.bool()[:, None, None, :]
            seen = seen | torch.eye(length, dtype=torch.bool)
            out = module(
                hidden, attention_mask=torch.zeros(seen.shape).masked_fill(~seen, -1e9).to(hidden.dtype),
                position_ids=positions, position_embeddings=inner.rotary_emb(hidden, positions),
            )  # fmt: skip
            hidden = out[0] if isinstance(out, tuple) else out
            if (not self.keep_outputs and layer + 1 in self.sites) or layer + 1 == len(inner.layers):
                hidden = hidden[:, -ids.shape[1] :]
        return self.base.lm_head(inner.norm(hidden))


def deep(base, vectors, *, shown=None, **options):
    """`Deep` as an implementation; `shown` are the vectors that its maker believes to be in it."""
    module = Deep(base, vectors.vectors, **options).eval()
    return Implementation(
        declared="prefix", num_vectors=NUM, base=base, model=module, forward=module, vectors=shown or vectors
    )


def zeroed(prefix, layers):
    """The prefix without keys and values in some layers."""
    keys = tuple(torch.zeros_like(k) if layer in layers else k for layer, k in enumerate(prefix.keys))
    values = tuple(torch.zeros_like(v) if layer in layers else v for layer, v in enumerate(prefix.values))
    return dataclasses.replace(prefix, keys=keys, values=values)


def rounded(prefix, dtype):
    """The prefix after a round trip through another dtype."""
    keys, values = (tuple(t.to(dtype).to(t.dtype) for t in kind) for kind in (prefix.keys, prefix.values))
    return dataclasses.replace(prefix, keys=keys, values=values)


def evicting(base, vectors, width):
    """A cache that shows a token the last `width` positions only."""
    prefix = compile(base, vectors)
    num = prefix.num_positions

    def forward(ids, mask):
        length = ids.shape[1]
        columns, queries = torch.arange(num + length), torch.arange(num, num + length)[:, None]
        seen = (columns <= queries) & (columns > queries - width)
        seen = seen & torch.cat([torch.ones(len(ids), num).long(), mask], dim=1).bool()[:, None, None]
        seen = seen | (columns == queries)
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(base.dtype).min).to(base.dtype)
        positions = num + (mask.cumsum(1) - 1).clamp_min(0)
        return base.run(ids=ids, positions=positions, cache=prefix.cache(len(ids)), mask=bias)

    return Implementation(
        declared=vectors.method, num_vectors=NUM, base=base, model=base.model, forward=forward, vectors=vectors
    )


def random_states(base, scale=1.0):
    """Hidden-state vectors [L, P, D] of usual norm."""
    return SoftPrefix(scale * made(base, "prefix").vectors, Block((NUM,)))


def generating(base, vectors, *, again=False, lose=False, read_last=False):
    """Greedy generation with a cache; the prefix comes again at each step, is lost at the second, or the last column is
    read whatever stands there."""
    whole, prefix = from_vectors(base, vectors), compile(base, vectors)
    num = prefix.num_positions

    def generate(ids, mask, count):
        answers = []
        for row, own in zip(ids, mask, strict=True):
            text = row.tolist() if read_last else row[own.bool()].tolist()
            cache, start, tokens, new = prefix.cache(), num, text, []
            for step in range(count):
                if again and step:
                    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
                        cache.update(key[None], value[None], layer)
                    start += num
                if lose and step:
                    new.append(int(forward_rows(base, [[*text, *new]], [None])[0, -1].argmax()))
                    continue
                full = torch.ones(1, start + len(tokens), dtype=torch.long)
                positions = torch.arange(start, start + len(tokens))[None]
                logits = base.run(ids=torch.tensor([tokens]), positions=positions, cache=cache, mask=full)
                new.append(int(logits[0, -1].argmax()))
                start, tokens = start + len(tokens), new[-1:]
            answers.append(new)
        return torch.tensor(answers)

    return dataclasses.replace(whole, generate=generate)


def conversing(base, vectors, *, second):
    """Turns of which the second comes behind `second`: "again" (prefix, turn), "lost" (nothing), or raises."""
    whole, prefix = from_vectors(base, vectors), compile(base, vectors)

    def turns(given):
        if len(given) == 1:
            return forward_rows(base, [list(given[0])], [prefix])[0, -1]
        if second == "raises":
            raise RuntimeError("size of tensor a (16) must match the size of tensor b (11)")
        rows = [t for turn in given for t in turn] if second == "unadapted" else list(given[-1])
        return forward_rows(base, [rows], [prefix if second == "again" else None])[0, -1]

    return dataclasses.replace(whole, turns=turns)


def training(base, vectors, *, how):
    """A training forward that drops the prefix, fails, or is right."""
    whole, prefix = from_vectors(base, vectors), compile(base, vectors)

    def forward(ids, mask):
        if how == "raises":
            raise RuntimeError("The size of tensor a (11) must match the size of tensor b (16) at dimension 3")
        return forward_rows(base, ids.tolist(), [prefix if how == "right" else None] * len(ids))

    return dataclasses.replace(whole, training_forward=forward)
