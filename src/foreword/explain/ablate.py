"""Vectors with some of them taken out, and forwards behind what is left.

To take a vector out is to close its position to everything that stands behind it: to the later vectors of a prompt, to
literal tokens of the block, and to the text. Nothing moves up: all others keep their positions and, but for what the
vector itself had told them, their keys and values. (BLOOM's and Falcon's ALiBi count positions from the mask, so there
the gap closes.) Vectors of a prefix or of keys and values do not see one another, so these stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foreword.core.block import Block
from foreword.core.compile import check_shapes
from foreword.core.model import FrozenModel, put_rows
from foreword.core.prompt import KVPrefix, SoftKV, SoftPrompt, Vectors
from foreword.explain.examples import Example

TOKENS_AT_ONCE = 4096
"""Padded tokens of one forward at most."""
LOGITS_AT_ONCE = 2**25
"""Logits of one forward at most: 256 MiB in float64."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Form:
    """A block as the text sees it: N positions, some of them closed."""

    keys: tuple[Tensor, ...]
    """Per layer [Hkv, N, Dh]; zero where closed."""
    values: tuple[Tensor, ...]
    is_open: Tensor
    """[N] bool."""
    after: Tensor | None
    """Rows [S, D] of soft slots behind the text."""
    after_open: Tensor
    """[S] bool."""


def count_vectors(vectors: Vectors) -> int:
    """Return the number of vectors, those behind the text included."""
    after = vectors.after if isinstance(vectors, SoftPrompt) else None
    return vectors.num_vectors + (0 if after is None else len(after))


def block_of(vectors: Vectors) -> Block:
    """Return the vectors' block; of bare vectors they are all of it."""
    return vectors.block or Block((vectors.num_vectors,))


def form_without(base: FrozenModel, vectors: Vectors, removed: Collection[int] = ()) -> Form:
    """Return the block with the vectors `removed` taken out; indices over P are those behind the text.

    With nothing removed it is what `compile` gives. Raises IncompatibleModel where the vectors do not fit the base.
    """
    block = block_of(vectors)
    check_shapes(base, vectors, block)
    soft, num = block.soft_positions(), block.num_positions
    closed = {soft[index] for index in removed if index < len(soft)}
    kept = [position for position in range(num) if position not in closed]
    after = vectors.after if isinstance(vectors, SoftPrompt) else None
    after_open = torch.tensor([len(soft) + index not in removed for index in range(0 if after is None else len(after))])
    with torch.no_grad():
        pairs = _keys_and_values(base, vectors, block, kept) if kept else []
    index = torch.tensor(kept, dtype=torch.long, device=base.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for place, layer in enumerate(base.spec.layers):
        for found, kind, width in ((keys, 0, layer.head_dim), (values, 1, layer.value_dim)):
            whole = torch.zeros(layer.num_kv_heads, num, width, dtype=base.dtype, device=base.device)
            found.append(whole.index_copy(1, index, pairs[place][kind]) if kept else whole)
    is_open = torch.zeros(num, dtype=torch.bool, device=base.device)
    is_open[index] = True
    return Form(
        keys=tuple(keys),
        values=tuple(values),
        is_open=is_open,
        after=None if after is None else after.to(base.device, base.dtype),
        after_open=after_open.bool().to(base.device),
    )


def as_prefix(form: Form, block: Block, method: str = "") -> KVPrefix:
    """Return a form with nothing removed as a KVPrefix."""
    return KVPrefix(form.keys, form.values, "", method=method, block=block, after=form.after)


def _keys_and_values(base: FrozenModel, vectors: Vectors, block: Block, kept: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's keys and values [Hkv, len(kept), Dh] of a block that holds the positions `kept` alone."""
    from transformers import DynamicCache

    soft = block.soft_positions()
    places = [place for place, position in enumerate(kept) if position in set(soft)]
    chosen = torch.tensor([soft.index(kept[place]) for place in places], dtype=torch.long, device=base.device)
    cache = DynamicCache()
    if isinstance(vectors, SoftKV):
        _fill_with_kv(base, vectors, block, set(kept), cache)
    else:
        index = torch.tensor(places, dtype=torch.long, device=base.device)
        ids = torch.tensor([block.literal_ids()], device=base.device)[:, kept]
        positions = torch.tensor([kept], device=base.device)
        arguments: dict[str, Any] = {"positions": positions, "cache": cache, "mask": torch.ones_like(positions)}
        rows = vectors.vectors.to(base.device, base.dtype)
        if isinstance(vectors, SoftPrompt):
            base.run_decoder(put_rows(base.embed(ids), index, rows[chosen]), **arguments)
        else:
            with base.layer_inputs_replaced(index, rows[:, chosen].unbind()):
                base.run_decoder(base.embed(ids), **arguments)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def _fill_with_kv(base: FrozenModel, vectors: SoftKV, block: Block, kept: set[int], cache: Any) -> None:
    """Fill a cache segment by segment: vectors are put in, literal tokens are run behind them."""
    start = used = held = 0
    for segment in block.segments:
        count = segment if isinstance(segment, int) else len(segment)
        if isinstance(segment, int):
            chosen = [used + offset for offset in range(count) if start + offset in kept]
            if chosen:
                for layer, (key, value) in enumerate(zip(vectors.keys, vectors.values, strict=True)):
                    pair = (part[None, :, chosen].to(base.device, base.dtype) for part in (key, value))
                    cache.update(*pair, layer)
            used, held = used + count, held + len(chosen)
        else:
            ids = torch.tensor([segment], device=base.device)
            positions = torch.arange(start, start + count, device=base.device)[None]
            mask = torch.ones(1, held + count, dtype=torch.long, device=base.device)
            base.run_decoder(base.embed(ids), positions=positions, cache=cache, mask=mask)
            held += count
        start += count


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class TextBatch:
    """Rows behind a form, ready for the base."""

    embeds: Tensor
    positions: Tensor
    mask: Tensor
    cache: Any
    is_text: Tensor
    """[B, T] bool: real tokens, neither padding nor closed."""


def text_batch(base: FrozenModel, form: Form, examples: Sequence[Example]) -> TextBatch:
    """Lay examples out as one right-padded batch behind a form."""
    from transformers import DynamicCache

    device, num = base.device, len(form.is_open)
    longest = max(len(example.ids) for example in examples)
    ids = torch.tensor([[*e.ids, *[0] * (longest - len(e.ids))] for e in examples], device=device)
    lengths = torch.tensor([len(e.ids) for e in examples], device=device)
    places = torch.arange(longest, device=device)
    is_text = places < lengths[:, None]
    index, vectors = [], []
    for row, example in enumerate(examples):
        for offset, first, count in example.slots:
            assert form.after is not None
            index.append(row * longest + offset + torch.arange(count, device=device))
            vectors.append(form.after[first : first + count])
            is_text[row, offset : offset + count] = form.after_open[first : first + count]
    embeds = base.embed(ids)
    if index:
        embeds = put_rows(embeds, torch.cat(index), torch.cat(vectors))
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(form.keys, form.values, strict=True)):
        if num:
            cache.update(*(part.expand(len(examples), *part.shape) for part in (key, value)), layer)
    return TextBatch(
        embeds=embeds,
        positions=num + torch.minimum(places[None], lengths[:, None] - 1),
        mask=torch.cat([form.is_open.expand(len(examples), -1), is_text], dim=1).long(),
        cache=cache,
        is_text=is_text,
    )


def run_form(base: FrozenModel, form: Form, examples: Sequence[Example], select: Tensor) -> Tensor:
    """Return logits [len(select), V] behind a form; `select` holds flat indices b·T + t, T the longest example."""
    batch = text_batch(base, form, examples)
    with torch.no_grad():
        return base.run(
            embeds=batch.embeds, positions=batch.positions, cache=batch.cache, mask=batch.mask, select=select
        )


def parts_of(examples: Sequence[Example], width: int) -> Iterator[list[int]]:
    """Yield indices of examples of similar length, for forwards of bounded size that give `width` logits a token."""
    part: list[int] = []
    for index in sorted(range(len(examples)), key=lambda index: len(examples[index].ids)):
        tokens = len(examples[index].ids) * (len(part) + 1)
        if part and (tokens > TOKENS_AT_ONCE or tokens * width > LOGITS_AT_ONCE):
            yield part
            part = []
        part.append(index)
    if part:
        yield part


def answer_losses(base: FrozenModel, form: Form, examples: Sequence[Example]) -> Tensor:
    """Return each example's summed loss over its answer in nats [rows], float64."""
    sums = torch.zeros(len(examples), dtype=torch.float64)
    for part in parts_of(examples, 1):
        chosen = [examples[index] for index in part]
        longest = max(len(example.ids) for example in chosen)
        spans = [range(len(e.ids) - e.num_answer, len(e.ids)) for e in chosen]
        places = [row * longest + place - 1 for row, span in enumerate(spans) for place in span]
        targets = [e.ids[place] for e, span in zip(chosen, spans, strict=True) for place in span]
        logits = run_form(base, form, chosen, torch.tensor(places, device=base.device)).float()
        losses = F.cross_entropy(logits, torch.tensor(targets, device=base.device), reduction="none")
        owners = torch.tensor([index for index, span in zip(part, spans, strict=True) for _ in span])
        sums.index_add_(0, owners, losses.double().cpu())
    return sums


def divergences(base: FrozenModel, one: Form, other: Form, examples: Sequence[Example]) -> list[Tensor]:
    """Return KL(one || other) in nats of the next token at every place of every example, [T] each.

    In float64, where the smallest difference of logits still counts: exactly 0 means that nothing arrived.
    """
    found: list[Tensor] = [torch.zeros(0, dtype=torch.float64)] * len(examples)
    for part in parts_of(examples, base.spec.vocab_size):
        chosen = [examples[index] for index in part]
        longest = max(len(example.ids) for example in chosen)
        places = [row * longest + place for row, e in enumerate(chosen) for place in range(len(e.ids))]
        select = torch.tensor(places, device=base.device)
        a, b = (torch.log_softmax(run_form(base, form, chosen, select).double(), dim=-1) for form in (one, other))
        kl = (a.exp() * (a - b)).nan_to_num().sum(-1).clamp_min(0.0).cpu()
        for index, row in zip(part, torch.split(kl, [len(e.ids) for e in chosen]), strict=True):
            found[index] = row
    return found


def greedy_answers(
    base: FrozenModel, form: Form, examples: Sequence[Example], num_tokens: int
) -> list[tuple[int, ...]]:
    """Return greedy answers of up to `num_tokens` tokens, the end token included where it came."""
    answers: list[list[int]] = [[] for _ in examples]
    running = list(range(len(examples)))
    for _ in range(num_tokens):
        grown = [Example((*examples[i].ids, *answers[i]), 0, examples[i].slots) for i in running]
        for part in parts_of(grown, 1):
            chosen = [grown[index] for index in part]
            longest = max(len(example.ids) for example in chosen)
            last = [row * longest + len(e.ids) - 1 for row, e in enumerate(chosen)]
            best = run_form(base, form, chosen, torch.tensor(last, device=base.device)).argmax(-1)
            for index, token in zip(part, best.tolist(), strict=True):
                answers[running[index]].append(token)
        running = [index for index in running if answers[index][-1] not in base.stop_ids]
        if not running:
            break
    return [tuple(answer) for answer in answers]
