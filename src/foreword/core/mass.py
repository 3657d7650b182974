"""The prefix mass: how much of each layer's and head's attention falls on the block in front of the text.

For one query, layer and head, a = Z_prefix / (Z_prefix + Z_text + Z_sink) over the scores that the layer really uses
(softcap, ALiBi, window and learned sink included), and the head's output is (1 - a)·(attention without the prefix) +
a·(attention within the prefix). The weights are read while the model runs with eager attention, the one implementation
that forms them; no layer code is touched and the former implementation is put back.
Source: the split of the softmax in Petrov et al. 2024, arXiv:2310.19698.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from foreword.core.block import Block
from foreword.core.conformance import TOLERANCES
from foreword.core.forward import forward_rows
from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix
from foreword.errors import IncompatibleModel

ROWS_AT_ONCE = 8
"""Rows of one forward: eager attention holds H·T·(N + T) weights per row and layer."""

Read = TypeVar("Read")
Splice = tuple[int, int, Tensor]
"""Row, offset, vectors [S, D]: see `forward_rows`."""


def prefix_mass(
    base: FrozenModel,
    rows: Sequence[Sequence[int]],
    prefix: KVPrefix,
    slots: Sequence[Sequence[tuple[int, int, int]]] | None = None,
) -> PrefixMass:
    """Return how each text token's attention is shared between vectors, literal tokens of the block, and text.

    `rows` are token ids that follow the block, ragged; `slots` are each row's soft slots behind the text (offset, first
    row of `prefix.after`, count), which count as text. Exact up to the rounding of the base's dtype (bfloat16 weights
    have three digits); shares are gathered in float32. The base is left as it was (tests/core/test_mass.py). Raises
    ValueError on an empty row, IncompatibleModel where a layer forms no attention weights or where eager attention
    is not what the base computes otherwise.
    """
    if not rows or not all(len(row) for row in rows):
        raise ValueError("prefix mass needs rows of at least one token")
    num = prefix.num_positions
    is_soft = soft_columns(prefix.block, num).to(base.device)
    longest = max(len(row) for row in rows)
    parts: list[list[_Shares]] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        lengths = torch.tensor([len(row) for row in part], device=base.device)

        def read(weights: Tensor, lengths: Tensor = lengths) -> _Shares:
            return _shares(weights, lengths, is_soft, longest)

        splices = _splices(prefix, slots[start : start + ROWS_AT_ONCE] if slots else ())

        def run(part: Sequence[Sequence[int]] = part, splices: list[Splice] = splices) -> Tensor:
            return _last_logprobs(base, part, prefix, splices)

        if start == 0:
            _check_eager(base, run)
        found = watch_attention(base.model, run, read)
        if len(found) != base.spec.num_layers:
            raise IncompatibleModel(
                f"{len(found)} of {base.spec.num_layers} layers of {base.spec.model_type} show attention weights",
                hint="Prefix mass needs layers whose attention returns its weights under eager attention.",
            )
        parts.append(found)
    layers = list(zip(*parts, strict=True))
    num_queries = sum(len(row) for row in rows)
    return PrefixMass(
        soft=tuple(torch.cat([part.soft for part in layer], dim=1) for layer in layers),
        literal=tuple(torch.cat([part.literal for part in layer], dim=1) for layer in layers),
        text=tuple(torch.cat([part.text for part in layer], dim=1) for layer in layers),
        by_position=tuple(sum(part.by_position for part in layer) / num_queries for layer in layers),
        num_tokens=tuple(len(row) for row in rows),
    )


def attention_share(model: nn.Module, run: Callable[[], Any], columns: slice) -> list[Tensor]:
    """Return the share [B, H, T] of attention that falls on the key `columns`, per attention call while `run()` runs.

    For any transformers model, wrapped or not: `run` calls it as its owner does, for example with `past_key_values`,
    and `columns` says where among the keys the prefix lies. One forward gives one entry per layer, in their order.
    Shares at padded queries mean nothing. Raises IncompatibleModel where no layer forms weights.
    """
    return watch_attention(model, run, lambda weights: weights[..., columns].float().sum(-1))


def watch_attention(model: nn.Module, run: Callable[[], Any], read: Callable[[Tensor], Read]) -> list[Read]:
    """Run `run()` with eager attention and return `read(weights)` of every attention call, in the order of the calls.

    `weights` [B, H, T, keys] sum to 1 over the keys, less what a learned sink takes. Hooks are removed and the
    attention implementation is put back also when `run` fails. Raises IncompatibleModel where no weights appear.
    """
    found: list[Read] = []
    last: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4 and not (last and last[0] is weights):
            last[:] = [weights]  # a module around another may hand on the same weights
            found.append(read(weights.detach()))

    watched = [module for module in model.modules() if "attention" in type(module).__name__.lower()]
    handles = [module.register_forward_hook(hook) for module in watched]
    try:
        with eager_attention(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise IncompatibleModel(
            f"no attention weights were seen in {type(model).__name__}, {len(watched)} attention modules were watched",
            hint="A model with attention of its own must return (output, weights) from it.",
        )
    return found


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """While active, every part of a transformers model uses eager attention; afterwards what it used before."""
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    twice = [m for m in model.modules() if type(m).__name__ == "FalconAttention" and set(before) != {"eager"}]
    handles = [module.register_forward_pre_hook(_alibi_once, with_kwargs=True) for module in twice]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):  # an inner one last: setting goes inwards
            config._attn_implementation = implementation
        for handle in handles:
            handle.remove()


def soft_columns(block: Block | None, num_positions: int) -> Tensor:
    """Return a mask [N] of a block's positions that hold vectors; all of them where the block is unknown."""
    mask = torch.ones(num_positions, dtype=torch.bool)
    if block is not None:
        mask[:] = False
        mask[block.soft_positions()] = True
    return mask


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PrefixMass:
    """Shares of attention per layer: tensors [H, B, T], float32 on the CPU, NaN at padding (rows end at the right)."""

    soft: tuple[Tensor, ...]
    """On the vectors."""
    literal: tuple[Tensor, ...]
    """On literal tokens of the block, such as BOS and hard text."""
    text: tuple[Tensor, ...]
    """On the text itself."""
    by_position: tuple[Tensor, ...]
    """Per layer [H, N]: each block position's share, mean over all text tokens of all rows."""
    num_tokens: tuple[int, ...]
    """Text tokens of each row."""

    @property
    def prefix(self) -> tuple[Tensor, ...]:
        """On the whole block: vectors and literal tokens."""
        return tuple(soft + literal for soft, literal in zip(self.soft, self.literal, strict=True))

    @property
    def sink(self) -> tuple[Tensor, ...]:
        """What a learned sink takes; zero up to rounding where the model has none."""
        return tuple(1.0 - whole - text for whole, text in zip(self.prefix, self.text, strict=True))


@dataclass(frozen=True, eq=False, slots=True)
class _Shares:
    """One layer's shares of one part of the rows."""

    soft: Tensor
    literal: Tensor
    text: Tensor
    by_position: Tensor


def _shares(weights: Tensor, lengths: Tensor, is_soft: Tensor, longest: int) -> _Shares:
    """Sum weights [B, H, T, N + T] over the kinds of keys; queries are padded to `longest` with NaN."""
    weights, num = weights.float(), len(is_soft)
    block, text = weights[..., :num], weights[..., num:].sum(-1)
    real = torch.arange(weights.shape[2], device=weights.device) < lengths[:, None]  # [B, T]

    def laid_out(shares: Tensor) -> Tensor:
        shares = shares.masked_fill(~real[:, None], float("nan")).transpose(0, 1)
        return torch.nn.functional.pad(shares, (0, longest - shares.shape[2]), value=float("nan")).cpu()

    return _Shares(
        soft=laid_out(block[..., is_soft].sum(-1)),
        literal=laid_out(block[..., ~is_soft].sum(-1)),
        text=laid_out(text),
        by_position=block.masked_fill(~real[:, None, :, None], 0.0).sum((0, 2)).cpu(),
    )


def _splices(prefix: KVPrefix, slots: Sequence[Sequence[tuple[int, int, int]]]) -> list[Splice]:
    after = prefix.after
    if after is None:
        return []
    return [(row, at, after[first : first + num]) for row, places in enumerate(slots) for at, first, num in places]


def _last_logprobs(
    base: FrozenModel, rows: Sequence[Sequence[int]], prefix: KVPrefix, splices: Sequence[Splice]
) -> Tensor:
    """Run rows behind the prefix; return the log-probabilities [B, V] after each row's last token."""
    longest = max(len(row) for row in rows)
    last = [place * longest + len(row) - 1 for place, row in enumerate(rows)]
    with torch.no_grad():
        select = torch.tensor(last, device=base.device)
        logits = forward_rows(base, rows, [prefix] * len(rows), select=select, splices=splices)
    return torch.log_softmax(logits.float(), dim=-1)


def _check_eager(base: FrozenModel, run: Callable[[], Tensor]) -> None:
    """Raise IncompatibleModel where eager attention gives another model than the base's own implementation."""
    own = run()
    with eager_attention(base.model):
        eager = run()
    found = float((own.exp() * (own - eager)).nan_to_num().sum(-1).max())
    allowed = TOLERANCES[str(base.dtype).removeprefix("torch.")].max_kl
    if found > allowed:
        kind = base.config._attn_implementation
        raise IncompatibleModel(
            f"{base.spec.model_type} computes something else under eager attention than under {kind}: "
            f"KL {found:.2g} nats, allowed {allowed:g}",
            hint="Its attention weights would not be those of the model that is served; load it with attention=eager.",
        )


def _alibi_once(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take ALiBi from a Falcon layer's arguments: the mask holds it already, and eager attention would add it again.

    Seen in transformers 5.23; its fused attention reads the mask alone.
    """
    alibi = kwargs.get("alibi")
    return args, kwargs | {"alibi": None if alibi is None else torch.zeros_like(alibi)}


def _configs(model: nn.Module) -> list[Any]:
    """Return the configurations of a model and of its parts, outer ones first."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if config is None or not hasattr(config, "_attn_implementation") or id(config) in found:
            return
        found[id(config)] = config
        for name in getattr(config, "sub_configs", ()):
            add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())
