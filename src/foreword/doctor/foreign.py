"""Adapters: what foreword, transformers and PEFT call a model with vectors, as an `Implementation` to examine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.forward import batch_cache, forward_rows
from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix, SoftKV, SoftPrompt, Vectors
from foreword.core.spec import Method
from foreword.doctor.subjects import Forward, Implementation
from foreword.errors import ConfigError, IncompatibleModel

PEFT_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING")
PEFT_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


def from_vectors(base: FrozenModel, vectors: Vectors) -> Implementation:
    """Return foreword's own way of running vectors: compiled once, text behind the prefix.

    It is what other implementations are compared with, and has no fault of theirs by construction. Raises
    IncompatibleModel where the base cannot hold the vectors.
    """
    prefix = compile(base, vectors)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        return _as_given(forward_rows(base, rows, [prefix] * len(rows)), mask)

    def generate(ids: Tensor, mask: Tensor, count: int) -> Tensor:
        rows: list[list[int]] = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        return torch.tensor([_greedy(base, row, prefix, count) for row in rows])

    return Implementation(
        declared=vectors.method,
        num_vectors=vectors.num_vectors,
        base=base,
        forward=forward,
        model=base.model,
        vectors=vectors,
        generate=generate,
        turns=lambda turns: _turn_by_turn(base, turns, prefix),
    )


def _as_given(logits: Tensor, mask: Tensor) -> Tensor:
    """Return right-padded logits [B, T, V] at the places of `mask`'s ones, zeros elsewhere."""
    placed = torch.zeros(*mask.shape, logits.shape[-1], dtype=logits.dtype, device=logits.device)
    for row, keep in enumerate(mask.bool()):
        placed[row, keep] = logits[row, : int(keep.sum())]
    return placed


def _greedy(base: FrozenModel, row: Sequence[int], prefix: KVPrefix, count: int) -> list[int]:
    cache, _ = batch_cache(base, [prefix])
    found: list[int] = []
    ids, start = list(row), prefix.num_positions
    for _ in range(count):
        logits = _step(base, ids, start, cache)
        start += len(ids)
        found.append(int(logits[-1].argmax()))
        ids = found[-1:]
    return found


def _turn_by_turn(base: FrozenModel, turns: Sequence[Sequence[int]], prefix: KVPrefix) -> Tensor:
    cache, _ = batch_cache(base, [prefix])
    start, logits = prefix.num_positions, torch.empty(0)
    for turn in turns:
        logits = _step(base, turn, start, cache)[-1]
        start += len(turn)
    return logits


def _step(base: FrozenModel, ids: Sequence[int], start: int, cache: Any) -> Tensor:
    positions = torch.arange(start, start + len(ids), device=base.device)[None]
    mask = torch.ones(1, start + len(ids), dtype=torch.long, device=base.device)
    with torch.no_grad():
        return base.run(ids=torch.tensor([list(ids)], device=base.device), positions=positions, cache=cache, mask=mask)[
            0
        ]


def from_peft(peft_model: Any, base: FrozenModel) -> Implementation:
    """Return a PEFT model (prompt tuning, P-tuning, CPT, prefix tuning, cartridge) with its active adapter.

    `base` is the same model without PEFT, or one that shares its modules. The P rows of logits that PEFT puts in front
    are cut off here, as its documentation asks of a caller; masks are PEFT's own affair, so its way with padding at the
    left is examined too. Generation gets its rows padded at the left, as transformers asks for. Raises
    IncompatibleModel for another kind of adapter.
    """
    config = peft_model.active_peft_config
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in (*PEFT_PROMPTS, *PEFT_PREFIXES):
        known = ", ".join((*PEFT_PROMPTS, *PEFT_PREFIXES))
        raise IncompatibleModel(f"peft_type {kind!r} is no soft prompt or prefix", hint=f"Known: {known}.")
    prompt, count = kind in PEFT_PROMPTS, int(config.num_virtual_tokens)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        extra = {"task_ids": torch.zeros(len(ids), dtype=torch.long)} if kind == "MULTITASK_PROMPT_TUNING" else {}
        logits: Tensor = peft_model(input_ids=ids, attention_mask=mask, **extra).logits
        return logits[:, count:] if prompt else logits

    def generate(ids: Tensor, mask: Tensor, new: int) -> Tensor:
        moved, shown, _ = _left_padded(ids, mask)
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out: Tensor = peft_model.generate(input_ids=moved, attention_mask=shown, **options)
        return out[:, -new:]

    vectors = None if kind == "MULTITASK_PROMPT_TUNING" else _peft_vectors(peft_model, base, prompt, count)
    return Implementation(
        declared="prompt" if prompt else "kv",
        num_vectors=count,
        base=base,
        forward=forward,
        model=peft_model,
        vectors=vectors,
        generate=generate if kind != "MULTITASK_PROMPT_TUNING" else None,
    )


def _peft_vectors(peft_model: Any, base: FrozenModel, prompt: bool, count: int) -> Vectors:
    """Return the vectors that PEFT would save, computed without leaving a trace of it."""
    with torch.no_grad():
        rows: Tensor = peft_model.get_prompt_embedding_to_save(peft_model.active_adapter).detach().float().cpu()
    block = Block((count,))
    if prompt:
        return SoftPrompt(rows, block)
    shape = base.spec.layers[0]
    split = rows.view(count, 2 * base.spec.num_layers, shape.num_kv_heads, shape.head_dim).permute(1, 2, 0, 3)
    return SoftKV(tuple(split[0::2]), tuple(split[1::2]), block)


def from_hf(
    model: nn.Module,
    base: FrozenModel,
    *,
    declared: Method,
    num_vectors: int,
    forward: Forward | None = None,
    past_key_values: Callable[[int], Any] | None = None,
    embeddings: Tensor | None = None,
    vectors: Vectors | None = None,
) -> Implementation:
    """Return a transformers model with vectors as an implementation; give one of three ways in which they enter.

    `past_key_values(batch_size)` makes the cache that holds the prefix, anew for each call; `embeddings` [P, D] are put
    in front of the text's by `inputs_embeds`; `forward` does whatever it does. With the first two, masks and positions
    are made as transformers' users do: ones for the vectors, positions from the mask. Rows padded at the right are
    moved to the left before. Raises ConfigError unless exactly one is given.
    """
    ways = [forward is not None, past_key_values is not None, embeddings is not None]
    if sum(ways) != 1:
        raise ConfigError(
            f"{sum(ways)} ways in which the vectors enter, one is needed",
            hint="Give forward=, past_key_values= or embeddings=.",
        )
    if forward is None:
        forward = _forward_of(model, num_vectors, past_key_values, embeddings)
    if vectors is None and embeddings is not None:
        vectors = SoftPrompt(embeddings.detach(), Block((num_vectors,)))
    return Implementation(
        declared=declared, num_vectors=num_vectors, base=base, forward=forward, model=model, vectors=vectors
    )


def _forward_of(
    model: Any, count: int, past_key_values: Callable[[int], Any] | None, embeddings: Tensor | None
) -> Forward:
    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        moved, shown, back = _left_padded(ids, mask)
        whole, positions = _with_vectors_after_padding(shown, count)
        if past_key_values is not None:
            places = positions[:, count:]
            logits = model(
                input_ids=moved,
                attention_mask=torch.cat([torch.ones_like(shown[:, :1]).expand(-1, count), shown], dim=1),
                position_ids=places,
                past_key_values=past_key_values(len(ids)),
                use_cache=True,
            ).logits
        else:
            assert embeddings is not None
            rows = model.get_input_embeddings()(moved)
            logits = model(
                inputs_embeds=_between(rows, shown, embeddings.to(rows)),
                attention_mask=whole,
                position_ids=_positions(whole),
                use_cache=False,
            ).logits[:, count:]
        return torch.stack([logit[order] for logit, order in zip(logits, back, strict=True)])

    return forward


def _left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and mask with each row's tokens at its end, and where each given place went."""
    order = torch.argsort(mask.long(), dim=1, stable=True)
    back = torch.argsort(order, dim=1)
    return ids.gather(1, order), mask.gather(1, order), back


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def _with_vectors_after_padding(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mask [B, P + T] of rows with their vectors right before the text, and positions as a cache counts."""
    pads = (mask == 0).sum(1, keepdim=True)
    places = torch.arange(count + mask.shape[1], device=mask.device)[None]
    whole = (places >= pads).long()
    vectors_first = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, count), mask], dim=1)
    return whole, _positions(vectors_first)


def _between(rows: Tensor, mask: Tensor, vectors: Tensor) -> Tensor:
    """Return [B, P + T, D]: each row's padding, the vectors, its text."""
    built = []
    for row, keep in zip(rows, mask, strict=True):
        pads = int((keep == 0).sum())
        built.append(torch.cat([row[:pads], vectors, row[pads:]]))
    return torch.stack(built)
