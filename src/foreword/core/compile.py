"""Compile the three kinds of vectors to a KVPrefix: one forward over the block, kept keys and values.

Exact for a causal decoder with a constant block in front: prompt rows act on the text only through the keys and values
they leave, and a hidden-state prefix has its outputs dropped by definition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from foreword.core.artefact import Artefact
from foreword.core.block import Block
from foreword.core.model import FrozenModel, put_rows
from foreword.core.prompt import KVPrefix, SoftKV, SoftPrefix, SoftPrompt, Vectors, tensors_digest
from foreword.core.template import TaskTemplate
from foreword.errors import IncompatibleModel

LayerKV = list[tuple[Tensor, Tensor]]
"""Keys and values [1, Hkv, N, Dh] of every layer."""


def compile(base: FrozenModel, source: Artefact | Vectors, *, name: str = "", allow_mismatch: bool = False) -> KVPrefix:
    """Run a block of literal tokens and vectors once through the frozen model and keep its keys and values.

    `source` is an artefact, or vectors made elsewhere (their block defaults to the vectors alone, from position 0).
    The result has the model's dtype and device; serving it equals writing the vectors into the sequence, up to
    rounding (tests/core/test_compile.py). Raises IncompatibleModel when the artefact belongs to another base
    (unless `allow_mismatch`) or a layer cannot hold the block.
    """
    extra: dict[str, Any] = {}
    if not isinstance(source, Artefact):
        vectors, digest = source, tensors_digest(source.tensors())
    else:
        header = source.header
        if not allow_mismatch:
            check_base(base, source)
        template = TaskTemplate.from_json(header.template) if header.template else None
        vectors, digest, name = source.vectors, source.sha256, name or header.task
        extra = {"template": template, "labels": header.labels, "max_new_tokens": header.max_new_tokens}
    block = vectors.block or Block((vectors.num_vectors,))
    check_shapes(base, vectors, block)
    with torch.no_grad():
        layers = compute_block(base, vectors, block)
    after = vectors.after if isinstance(vectors, SoftPrompt) else None
    return KVPrefix(
        keys=tuple(key[0].detach().contiguous() for key, _ in layers),
        values=tuple(value[0].detach().contiguous() for _, value in layers),
        digest=digest,
        name=name,
        method=vectors.method,
        block=block,
        after=None if after is None else after.to(base.device, base.dtype),
        **extra,
    )


def check_base(base: FrozenModel, artefact: Artefact) -> None:
    """Raise IncompatibleModel naming the first field in which the artefact's base differs from `base`."""
    if difference := artefact.header.base.first_difference(base.fingerprint):
        field, trained, found = difference
        raise IncompatibleModel(
            f"artefact {artefact.header.task!r} was trained for another base: {field} {trained} there, {found} here",
            hint="Serve it with the base it was trained for, or train again; --allow-mismatch overrides this check.",
        )


def check_shapes(base: FrozenModel, vectors: Vectors, block: Block) -> None:
    """Raise IncompatibleModel when shapes do not fit the base, or the block does not fit its layers."""
    spec, num = base.spec, block.num_soft
    if isinstance(vectors, SoftPrompt):
        found, expected = [list(vectors.vectors.shape)], [[num, spec.embed_size]]
    elif isinstance(vectors, SoftPrefix):
        found, expected = [list(vectors.vectors.shape)], [[spec.num_layers, num, spec.hidden_size]]
    else:
        found = [list(tensor.shape) for tensor in (*vectors.keys, *vectors.values)]
        expected = [[layer.num_kv_heads, num, layer.head_dim] for layer in spec.layers]
        expected += [[layer.num_kv_heads, num, layer.value_dim] for layer in spec.layers]
    if found != expected:
        raise IncompatibleModel(f"{vectors.method} vectors of shape {found}, this base needs {expected}")
    base.check_holds(block.num_positions)


def compute_block(base: FrozenModel, vectors: Vectors, block: Block) -> LayerKV:
    """Return every layer's keys and values [1, Hkv, N, Dh] for the block; gradients flow into the vectors."""
    return compute_blocks(base, [(vectors, block)])[0]


def compute_blocks(base: FrozenModel, items: Sequence[tuple[Vectors, Block]], *, lean: bool = False) -> list[LayerKV]:
    """Return each item's keys and values as `compute_block` does; those of one method share a forward.

    Shorter blocks are padded at the right, where causal attention cannot see it. `lean` leaves out what leaves no
    trace in keys and values: the last layer's output, and each layer's at the vectors of a hidden-state prefix.
    """
    results: dict[int, LayerKV] = {}
    for kind in (SoftPrompt, SoftPrefix):
        chosen = [index for index, (vectors, _) in enumerate(items) if isinstance(vectors, kind)]
        if chosen:
            found = _blocks_by_forward(base, [items[index] for index in chosen], lean)
            results.update(zip(chosen, found, strict=True))
    for index, (vectors, block) in enumerate(items):
        if isinstance(vectors, SoftKV):
            results[index] = _block_with_kv(base, vectors, block)
    return [results[index] for index in range(len(items))]


def _blocks_by_forward(base: FrozenModel, items: Sequence[tuple[Vectors, Block]], lean: bool) -> list[LayerKV]:
    """Run blocks of soft prompts, or of soft prefixes, as one batch."""
    from transformers import DynamicCache

    cache, device = DynamicCache(), base.device
    longest = max(block.num_positions for _, block in items)
    ids = [[*block.literal_ids(), *[0] * (longest - block.num_positions)] for _, block in items]
    index = torch.tensor(
        [row * longest + place for row, (_, block) in enumerate(items) for place in block.soft_positions()],
        device=device,
    )
    embeds = base.embed(torch.tensor(ids, device=device))
    positions = torch.arange(longest, device=device).expand(len(items), -1)
    prompts = [v.vectors.to(device, base.dtype) for v, _ in items if isinstance(v, SoftPrompt)]
    prefixes = [v.vectors.to(device, base.dtype) for v, _ in items if isinstance(v, SoftPrefix)]
    arguments: dict[str, Any] = {"positions": positions, "cache": cache, "mask": torch.ones_like(positions)}
    with ExitStack() as stack:
        if lean:
            first = torch.zeros(1, dtype=torch.long, device=device)
            stack.enter_context(base.computed_only_at([-1], first))
            if prefixes:
                places = set(range(len(items) * longest)) - set(index.tolist())
                literal = torch.tensor(sorted(places), device=device) if places else first
                stack.enter_context(base.computed_only_at(range(len(base.layers) - 1), literal))
        if prefixes:
            stack.enter_context(base.layer_inputs_replaced(index, torch.cat(prefixes, dim=1).unbind()))
        else:
            embeds = put_rows(embeds, index, torch.cat(prompts))
        base.run_decoder(embeds, **arguments)
    kept = [block.num_positions for _, block in items]
    return [
        [(layer.keys[row, None, :, :count], layer.values[row, None, :, :count]) for layer in cache.layers]
        for row, count in enumerate(kept)
    ]


def _block_with_kv(base: FrozenModel, vectors: SoftKV, block: Block) -> LayerKV:
    from transformers import DynamicCache

    cache, start, used = DynamicCache(), 0, 0
    for segment in block.segments:
        if isinstance(segment, int):
            part = slice(used, used + segment)
            for index, (key, value) in enumerate(zip(vectors.keys, vectors.values, strict=True)):
                rows = key[None, :, part], value[None, :, part]
                cache.update(*(row.to(base.device, base.dtype) for row in rows), index)
            used, start = used + segment, start + segment
        else:
            ids = torch.tensor([segment], device=base.device)
            positions = torch.arange(start, start + len(segment), device=base.device)[None]
            mask = torch.ones(1, start + len(segment), dtype=torch.long, device=base.device)
            base.run_decoder(base.embed(ids), positions=positions, cache=cache, mask=mask)
            start += len(segment)
    return [(layer.keys, layer.values) for layer in cache.layers]


def uncompiled_logits(base: FrozenModel, ids: Tensor, vectors: SoftPrompt | SoftPrefix) -> Tensor:
    """Return logits [B, T, V] for `ids` [B, T] with the vectors written into the sequence: the reference form.

    For a prompt, its rows stand in `inputs_embeds`; for a hidden-state prefix, each layer reads
    `[p^l ; h^(l-1)]` and the rows at prefix positions of its output are dropped.
    """
    from transformers import DynamicCache

    block = vectors.block or Block((vectors.num_vectors,))
    rows, count = ids.shape[0], block.num_positions + ids.shape[1]
    soft = torch.tensor(block.soft_positions(), device=base.device)
    index = (torch.arange(rows, device=base.device)[:, None] * count + soft).reshape(-1)
    left = torch.tensor([block.literal_ids()], device=base.device).expand(rows, -1)
    embeds = base.embed(torch.cat([left, ids], dim=1))
    positions = torch.arange(count, device=base.device).expand(rows, -1)
    arguments: dict[str, Any] = {"positions": positions, "cache": DynamicCache(), "mask": torch.ones_like(positions)}
    if isinstance(vectors, SoftPrompt):
        logits = base.run(embeds=put_rows(embeds, index, vectors.vectors.to(base.dtype).repeat(rows, 1)), **arguments)
    else:
        with base.layer_inputs_replaced(index, vectors.vectors.to(base.dtype).repeat(1, rows, 1).unbind()):
            logits = base.run(embeds=embeds, **arguments)
    return logits[:, block.num_positions :]


def with_name(prefix: KVPrefix, name: str) -> KVPrefix:
    """Return the same prefix under another name."""
    return dataclasses.replace(prefix, name=name)
