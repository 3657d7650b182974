"""Prefix tuning in hidden states by joining vectors to each layer's input, with output selection and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.doctor.lab.handmade import Handmade, call, count_positions, layers_of


class HandStacked(Handmade):
    """Prefix tuning in hidden states by joining: each layer reads [p^l ; h] and its output is cut to the text.

    The hooks rebuild what a layer is told about its sequence (mask, rotary embedding, ALiBi), since the model knows
    the text alone. With `keep_outputs` nothing is cut: each layer's sequence is P rows longer than the one before it.
    No cache: decoding computes the whole row again.
    """

    def __init__(self, model: Any, states: Tensor, *, keep_outputs: bool = False, tied: bool = False, **switches: Any):
        super().__init__(model, states.shape[1], **switches)
        self.states, self.keep_outputs = states[:1].expand(len(states), -1, -1) if tied else states, keep_outputs

    def begin(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Run the text; vectors join in each layer."""
        handles, layers = [], layers_of(self.model)
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(self.join(index, mask), with_kwargs=True))
            if not self.keep_outputs:
                handles.append(layer.register_forward_hook(self.cut_rows))
        if self.keep_outputs and hasattr(self.model.base_model, "ln_f"):  # GPT-2 and BLOOM expect the text's length
            keep = ids.shape[1]
            last = self.model.base_model.ln_f
            handles.append(last.register_forward_pre_hook(lambda module, args: (args[0][:, -keep:],)))
        try:
            logits = call(
                self.model,
                inputs_embeds=self.model.get_input_embeddings()(ids),
                attention_mask=mask,
                position_ids=self.text_positions(mask),
            ).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits, None, self.whole_mask(mask), self.text_positions(mask)

    def join(self, index: int, mask: Tensor) -> Any:
        """Return the hook that puts layer `index`'s vectors in front."""

        def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0]
            rows = self.states[index].to(hidden.dtype).expand(len(hidden), -1, -1)
            joined = torch.cat([rows, hidden], dim=1)
            front = joined.shape[1] - mask.shape[1]
            real = torch.cat([mask.new_ones(len(mask), front), mask], dim=1)
            causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
            seen = (causal[None] & real[:, None].bool()) | torch.eye(real.shape[1], dtype=torch.bool)
            bias = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)[
                :, None
            ]
            rest = list(args[1:])
            for place, value in enumerate(rest):
                if torch.is_tensor(value) and value.ndim == 4:
                    rest[place] = bias
            if rest and rest[1:2] and kwargs.get("attention_mask") is None and not torch.is_tensor(rest[1]):
                rest[1] = bias  # GPT-2 takes it third
            if "attention_mask" in kwargs:
                kwargs["attention_mask"] = bias
            positions = count_positions(real)
            if kwargs.get("position_embeddings") is not None:
                kwargs["position_embeddings"] = self.model.base_model.rotary_emb(hidden, positions)
            if kwargs.get("alibi") is not None:
                heads = self.model.config.n_head
                kwargs["alibi"] = self.model.base_model.build_alibi_tensor(real, heads, dtype=hidden.dtype)
            if "position_ids" in kwargs:
                kwargs["position_ids"] = positions
            return (joined, *rest), kwargs

        return put

    def cut_rows(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Keep the text's rows of a layer's output."""
        if isinstance(output, tuple):
            return output[0][:, self.num :], *output[1:]
        return output[:, self.num :]

    def decode(self, ids: Tensor, mask: Tensor, num_new: int) -> Tensor:
        """Decode without a cache."""
        found: list[Tensor] = []
        while len(found) < num_new:
            new = self.begin(ids, mask)[0][:, -1].argmax(-1)
            ids = torch.cat([ids, new[:, None]], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            found.append(new)
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def turns(self, turns: Sequence[Sequence[int]]) -> Tensor:
        """Run all turns as one row."""
        ids = torch.tensor([[token for turn in turns for token in turn]])
        return self.begin(ids, torch.ones_like(ids))[0][0, -1]
