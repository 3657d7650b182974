"""Prompt tuning, prefix tuning and key/value prefixes as people write them on plain transformers models.

Nothing of foreword's own forward or compile is used: the point is to be independent of it. Each class holds a right
implementation; its keyword switches make the mistakes that are seen in the wild, one at a time.

A batch has two layouts. "mask": the vectors stand in front of the row as it was handed over, padding included, and
positions are counted from the mask (right for full attention and for ALiBi counted from the mask). "rows": padding is
taken off, rows are put at the left and padded behind (right for sliding windows, too).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache


def call(model: Any, **arguments: Any) -> Any:
    """Call a causal language model with those of the arguments that its family knows."""
    known = inspect.signature(model.base_model.forward).parameters
    if "position_ids" not in known:
        arguments.pop("position_ids", None)
    return model(use_cache=arguments.get("past_key_values") is not None, **arguments)


def layers_of(model: Any) -> nn.ModuleList:
    """Return the decoder layers: the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def count_positions(mask: Tensor) -> Tensor:
    """Return positions [B, N] counted over real tokens."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def put_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows with their padding behind them."""
    rows = [row[real.bool()] for row, real in zip(ids, mask, strict=True)]
    width = max(len(row) for row in rows)
    padded = torch.zeros(len(rows), width, dtype=ids.dtype)
    real = torch.zeros(len(rows), width, dtype=mask.dtype)
    for place, row in enumerate(rows):
        padded[place, : len(row)], real[place, : len(row)] = row, 1
    return padded, real


class Handmade:
    """What the three methods share: layout of batches, greedy decoding, turns.

    `begin` runs a batch behind its vectors and returns (logits, cache, mask, positions): what decoding needs next.
    """

    def __init__(
        self,
        model: Any,
        num: int,
        *,
        layout: str = "mask",
        mask: str = "ones",
        positions: str = "counted",
        cut: str = "front",
        serving: str = "",
        keep_last: int | None = None,
    ) -> None:
        self.model, self.num = model, num
        self.layout, self.mask, self.positions, self.cut, self.serving = layout, mask, positions, cut, serving
        self.keep_last = keep_last

    def begin(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Run text [B, T] behind the vectors."""
        raise NotImplementedError

    def whole_mask(self, mask: Tensor) -> Tensor:
        """Return the mask over vectors and text."""
        front = mask.new_full((len(mask), self.num), 0 if self.mask == "zeros" else 1)
        return torch.cat([front, mask], dim=1)

    def text_positions(self, mask: Tensor) -> Tensor:
        """Return the positions [B, T] of the text."""
        counted = count_positions(mask)
        shifts = {
            "counted": counted + self.num,
            "unshifted": counted,
            "one-short": counted + self.num - 1,
            "twice": counted + 2 * self.num,
            "blind": torch.arange(mask.shape[1]).expand_as(mask) + self.num,
        }
        return shifts[self.positions]

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits for the text [B, T]."""
        if self.layout == "mask":
            return self.cut_logits(self.begin(ids, mask)[0], ids.shape[1])
        left, real = put_left(ids, mask)
        logits = self.cut_logits(self.begin(left, real)[0], left.shape[1])
        found = logits.new_zeros(*ids.shape, logits.shape[-1])
        found[mask.bool()] = logits[real.bool()]
        return found

    def cut_logits(self, logits: Tensor, num_text: int) -> Tensor:
        """Drop the logits at the vectors' places, if there are any."""
        if self.cut == "none":
            return logits
        return logits[:, :num_text] if self.cut == "behind" else logits[:, logits.shape[1] - num_text :]

    @torch.no_grad()
    def generate(self, ids: Tensor, mask: Tensor, num_new: int) -> Tensor:
        """Return the best next tokens [B, num_new]."""
        if self.serving == "right-padded":
            return self.decode(*put_left(ids, mask), num_new)
        if self.serving == "as-given":
            return self.decode(ids, mask, num_new)
        if self.layout == "rows" or not bool(mask[:, -1].all()):
            rows = [row[real.bool()][None] for row, real in zip(ids, mask, strict=True)]
            return torch.cat([self.decode(row, torch.ones_like(row), num_new) for row in rows])
        return self.decode(ids, mask, num_new)

    def decode(self, ids: Tensor, mask: Tensor, num_new: int) -> Tensor:
        """Decode from the last column of a batch."""
        logits, cache, whole, positions = self.begin(ids, mask)
        found = [logits[:, -1].argmax(-1)]
        last = positions[:, -1:]
        while len(found) < num_new:
            last = last + 1
            logits, cache, whole, last = self.one_step(found[-1][:, None], cache, whole, last)
            found.append(logits[:, -1].argmax(-1))
        return torch.stack(found, dim=1)

    def one_step(self, ids: Tensor, cache: Any, whole: Tensor, positions: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Run new tokens [B, S] on a cache."""
        if self.serving == "again":
            return self.again(ids, cache, whole, positions)
        if self.serving == "lost":
            cache, whole, positions = self.without_vectors(cache, whole, positions)
        whole = torch.cat([whole, whole.new_ones(ids.shape)], dim=1)
        if self.keep_last is not None:  # a rolling cache: the oldest entries go, whoever they are
            over = whole.shape[1] - self.keep_last
            if over > 0:
                whole = whole[:, over:]
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, over:], layer.values[:, :, over:]
        logits = call(
            self.model, input_ids=ids, attention_mask=whole, position_ids=positions, past_key_values=cache
        ).logits
        return logits, cache, whole, positions[:, -1:]

    def again(self, ids: Tensor, cache: Any, whole: Tensor, positions: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Run new tokens with the vectors in front of them once more."""
        raise NotImplementedError

    def without_vectors(self, cache: Any, whole: Tensor, positions: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Cut the vectors' entries off a cache, as one does who keeps the text's alone."""
        if whole.shape[1] < self.num or getattr(cache, "is_cut", False):
            return cache, whole, positions
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, self.num :], layer.values[:, :, self.num :]
        cache.is_cut = True
        return cache, whole[:, self.num :], positions

    @torch.no_grad()
    def turns(self, turns: Sequence[Sequence[int]]) -> Tensor:
        """Run turns one after the other on one cache; return the logits [V] behind the last."""
        first = torch.tensor([list(turns[0])])
        logits, cache, whole, positions = self.begin(first, torch.ones_like(first))
        last = positions[:, -1:]
        for turn in turns[1:]:
            ids = torch.tensor([list(turn)])
            steps = last + 1 + torch.arange(ids.shape[1])[None]
            logits, cache, whole, last = self.one_step(ids, cache, whole, steps)
        return logits[0, -1]


class HandPrompt(Handmade):
    """Prompt tuning: rows [P, D] in front of the embeddings."""

    def __init__(self, model: Any, rows: Tensor, **switches: Any) -> None:
        super().__init__(model, len(rows), **switches)
        self.rows = rows

    def embed(self, ids: Tensor) -> Tensor:
        """Return [vectors ; embeddings of the text]."""
        text = self.model.get_input_embeddings()(ids)
        return torch.cat([self.rows.to(text.dtype).expand(len(ids), -1, -1), text], dim=1)

    def begin(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Run [P ; text]."""
        cache, whole = DynamicCache(), self.whole_mask(mask)
        front = torch.arange(self.num).expand(len(ids), -1)
        positions = torch.cat([front, self.text_positions(mask)], dim=1)
        arguments: dict[str, Any] = {"position_ids": positions}
        if self.positions == "default":  # left to the model
            arguments = {}
        logits = call(
            self.model, inputs_embeds=self.embed(ids), attention_mask=whole, past_key_values=cache, **arguments
        ).logits
        return logits, cache, whole, positions

    def text_positions(self, mask: Tensor) -> Tensor:
        """As the model itself would count, where it is left to it."""
        if self.positions == "default":
            return torch.arange(mask.shape[1]).expand_as(mask) + self.num
        return super().text_positions(mask)

    def again(self, ids: Tensor, cache: Any, whole: Tensor, positions: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Put the rows before the new tokens as well: what `prepare_inputs` does when it never looks at the cache."""
        count = self.num + ids.shape[1]
        whole = torch.cat([whole, whole.new_ones(len(ids), count)], dim=1)
        places = positions[:, :1] + torch.arange(count)
        logits = call(
            self.model,
            inputs_embeds=self.embed(ids),
            attention_mask=whole,
            position_ids=places,
            past_key_values=cache,
        ).logits
        return logits, cache, whole, places[:, -1:]


class HandKV(Handmade):
    """A key/value prefix: keys and values [Hkv, P, Dh] of every layer, put into the cache."""

    def __init__(self, model: Any, keys: Sequence[Tensor], values: Sequence[Tensor], **switches: Any) -> None:
        super().__init__(model, keys[0].shape[1], **switches)
        self.keys, self.values = keys, values

    def fresh_cache(self, batch: int) -> Any:
        """Return a cache with the prefix."""
        cache, dtype = DynamicCache(), self.model.dtype
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            rows = [tensor.to(dtype).expand(batch, -1, -1, -1).contiguous() for tensor in (key, value)]
            cache.update(rows[0], rows[1], index)
        return cache

    def begin(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Run the text on the prefix's cache."""
        cache, whole, positions = self.fresh_cache(len(ids)), self.whole_mask(mask), self.text_positions(mask)
        given = mask if self.mask == "text-only" else whole
        logits = call(
            self.model, input_ids=ids, attention_mask=given, position_ids=positions, past_key_values=cache
        ).logits
        return logits, cache, whole, positions

    def again(self, ids: Tensor, cache: Any, whole: Tensor, positions: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Append the prefix's keys and values to the cache once more before the new tokens."""
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            rows = [t.to(self.model.dtype).expand(len(ids), -1, -1, -1) for t in (key, value)]
            cache.update(rows[0], rows[1], index)
        whole = torch.cat([whole, whole.new_ones(len(ids), self.num), whole.new_ones(ids.shape)], dim=1)
        positions = positions + self.num
        logits = call(
            self.model, input_ids=ids, attention_mask=whole, position_ids=positions, past_key_values=cache
        ).logits
        return logits, cache, whole, positions[:, -1:]


class HandPrefix(Handmade):
    """Prefix tuning in hidden states by hooks: layer l's first P rows are replaced by its vectors [P, D].

    `states` [L, P, D]. With `installed`, the hooks are put on the model for good, as most do; otherwise they live as
    long as a forward. `sites` are the layers that get vectors.
    """

    def __init__(
        self,
        model: Any,
        states: Tensor,
        *,
        installed: bool = False,
        sites: Sequence[int] | None = None,
        late_binding: bool = False,
        **switches: Any,
    ) -> None:
        super().__init__(model, states.shape[1], **switches)
        self.states, self.is_prefill = states, False
        self.sites = range(len(states)) if sites is None else sites
        self.late_binding = late_binding
        if installed:
            self.install()
        self.installed = installed

    def install(self) -> list[Any]:
        """Put the hooks on; return their handles."""
        handles, layers = [], layers_of(self.model)
        for index in self.sites:
            if self.late_binding:  # every closure sees the loop's last value
                handles.append(layers[index].register_forward_pre_hook(self.hook(lambda: self.states[self.sites[-1]])))
            else:
                rows = self.states[index]
                handles.append(layers[index].register_forward_pre_hook(self.hook(lambda rows=rows: rows)))
        return handles

    def hook(self, rows: Callable[[], Tensor]) -> Any:
        """Return a hook that overwrites the first P rows while the prompt is read."""

        def replace(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not self.is_prefill:
                return None
            hidden = args[0]
            front = rows().to(hidden.dtype).expand(len(hidden), -1, -1)
            return torch.cat([front, hidden[:, self.num :]], dim=1), *args[1:]

        return replace

    @contextmanager
    def prefill(self) -> Iterator[None]:
        """While active, the vectors enter."""
        handles = [] if self.installed else self.install()
        self.is_prefill = True
        try:
            yield
        finally:
            self.is_prefill = False
            for handle in handles:
                handle.remove()

    def begin(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Run [places of the vectors ; text]."""
        text = self.model.get_input_embeddings()(ids)
        embeds = torch.cat([text.new_zeros(len(ids), self.num, text.shape[-1]), text], dim=1)
        cache, whole = DynamicCache(), self.whole_mask(mask)
        front = torch.arange(self.num).expand(len(ids), -1)
        positions = torch.cat([front, self.text_positions(mask)], dim=1)
        with self.prefill():
            logits = call(
                self.model,
                inputs_embeds=embeds,
                attention_mask=whole,
                position_ids=positions,
                past_key_values=cache,
            ).logits
        return logits, cache, whole, positions

    def again(self, ids: Tensor, cache: Any, whole: Tensor, positions: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Let the vectors enter before the new tokens as well."""
        text = self.model.get_input_embeddings()(ids)
        embeds = torch.cat([text.new_zeros(len(ids), self.num, text.shape[-1]), text], dim=1)
        count = embeds.shape[1]
        places = positions[:, :1] + torch.arange(count)
        whole = torch.cat([whole, whole.new_ones(len(ids), count)], dim=1)
        with self.prefill():
            logits = call(
                self.model, inputs_embeds=embeds, attention_mask=whole, position_ids=places, past_key_values=cache
            ).logits
        return logits, cache, whole, places[:, -1:]
