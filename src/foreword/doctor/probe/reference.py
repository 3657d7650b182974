"""What the vectors should do on their base, and what they would do under each fault that can be computed."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.forward import forward_rows
from foreword.core.model import FrozenModel, put_rows
from foreword.core.prompt import KVPrefix, SoftKV, SoftPrefix, SoftPrompt, Vectors
from foreword.doctor.probe.attention import AttentionWatch


def reference_logits(base: FrozenModel, rows: Sequence[Sequence[int]], prefix: KVPrefix | None) -> list[Tensor]:
    """Return logits [T, V] of each row alone behind `prefix`, or of the base itself, in evaluation mode."""
    with torch.no_grad(), at_rest(base), AttentionWatch(dropout=False, keep=False):
        return [forward_rows(base, [row], [prefix])[0].float() for row in rows]


def rounding_noise(
    base: FrozenModel, rows: Sequence[Sequence[int]], prefix: KVPrefix | None, eps: float | None = None
) -> list[Tensor]:
    """Return the reference's logits with every layer's input rounded otherwise, by one last place at most.

    It is what another kernel, batch shape or order of sums does to this base in its dtype; `eps` is one unit.
    """
    generator = torch.Generator().manual_seed(0)
    eps = float(torch.finfo(base.dtype).eps) if eps is None else eps

    def shake(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        factor = 1 + eps * (2 * torch.rand(hidden.shape, generator=generator) - 1).to(hidden.device)
        new = (hidden.float() * factor).to(hidden.dtype)
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    with ExitStack() as stack:
        for layer in base.layers:
            stack.callback(layer.register_forward_pre_hook(shake, with_kwargs=True).remove)
        return reference_logits(base, rows, prefix)


def logits_at(base: FrozenModel, row: Sequence[int], prefix: KVPrefix | None, start: int) -> Tensor:
    """Return logits [T, V] of a row whose text starts at position `start`, whatever stands in front."""
    with torch.no_grad(), at_rest(base), AttentionWatch(dropout=False, keep=False):
        return _run_at(base, row, prefix, start)


def text_keys_from(base: FrozenModel, row: Sequence[int], starts: Sequence[int]) -> Tensor | None:
    """Return the first layer's keys [S, Hkv, T, Dh] of a row at each start; None where they cannot be seen."""
    from transformers import DynamicCache

    found = []
    places = torch.arange(len(row), device=base.device)
    for first in range(0, len(starts), 32):
        part = torch.tensor(starts[first : first + 32], device=base.device)
        ids = torch.tensor([list(row)], device=base.device).expand(len(part), -1)
        with torch.no_grad(), at_rest(base), AttentionWatch(dropout=False) as watch:
            base.run(
                ids=ids, positions=part[:, None] + places, cache=DynamicCache(), mask=torch.ones_like(ids),
                select=torch.zeros(1, dtype=torch.long, device=base.device),
            )  # fmt: skip
        if not watch.calls or watch.calls[0].keys is None:
            return None
        found.append(watch.calls[0].keys)
    return torch.cat(found)


def _run_at(base: FrozenModel, row: Sequence[int], prefix: KVPrefix | None, start: int) -> Tensor:
    from transformers import DynamicCache

    width = 0 if prefix is None else prefix.num_positions
    positions = torch.arange(start, start + len(row), device=base.device)[None]
    cache: Any = DynamicCache() if prefix is None else prefix.cache()
    mask = torch.ones(1, width + len(row), dtype=torch.long, device=base.device)
    return base.run(ids=torch.tensor([list(row)], device=base.device), positions=positions, cache=cache, mask=mask)[
        0
    ].float()


class at_rest:
    """Evaluation mode while a reference is computed on modules that the examined model may share; put back after."""

    def __init__(self, base: FrozenModel) -> None:
        self._modules: list[nn.Module] = [module for module in base.model.modules() if module.training]

    def __enter__(self) -> None:
        for module in self._modules:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            module.training = True


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What a fault would make of the vectors: the prefix to which it amounts, or None for no prefix at all."""

    fault: str
    what: str
    prefix: KVPrefix | None
    start: int
    """Position at which the text starts."""


def hypotheses(base: FrozenModel, vectors: Vectors, prefix: KVPrefix) -> Iterator[Hypothesis]:
    """Yield the faults whose output can be computed exactly, in the order in which causes are told apart."""
    num = prefix.num_positions
    yield Hypothesis("mask-blind", "the base without vectors", None, 0)
    yield Hypothesis("mask-blind", f"the base without vectors, its text at position {num}", None, num)
    if isinstance(vectors, SoftPrefix):
        block = vectors.block or Block((vectors.num_vectors,))
        if base.spec.embed_size == base.spec.hidden_size:
            prompt = SoftPrompt(vectors.vectors[0], vectors.block)
            yield Hypothesis("embeddings-only", "the first layer's vectors as a prompt", compile(base, prompt), num)
        first = with_sites(base, vectors, block, [0])
        yield Hypothesis("embeddings-only", "the vectors put into the first layer alone", first, num)
    if not isinstance(vectors, SoftPrompt):
        for layer in dict.fromkeys((0, base.spec.num_layers - 1)):
            if (same := tied(vectors, layer)) is not None:
                what = f"layer {layer}'s vectors in every layer"
                yield Hypothesis("layers-tied", what, compile(base, same), num)
        yield from _dropped(base, vectors, prefix)
    for start in (*range(num - 1, -1, -1), 2 * num):
        yield Hypothesis("positions-unshifted", f"text that starts at position {start}", prefix, start)
    for sign, what in ((1, "keys rotated once more"), (-1, "keys without their rotation")):
        if (turned := rotated(base, prefix, sign)) is not None:
            yield Hypothesis("keys-misrotated", what, turned, num)


def _dropped(base: FrozenModel, vectors: Vectors, prefix: KVPrefix) -> Iterator[Hypothesis]:
    count = base.spec.num_layers
    wholes = [[layer] for layer in range(count)]
    wholes += [list(range(layer, count)) for layer in range(1, count - 1)]
    wholes += [list(range(layer)) for layer in range(2, count)]
    for lost in wholes[:64]:
        what = f"no vectors in layer{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
        if isinstance(vectors, SoftPrefix) and 0 not in lost:
            block = vectors.block or Block((vectors.num_vectors,))
            kept = [layer for layer in range(count) if layer not in lost]
            yield Hypothesis("layers-dropped", what, with_sites(base, vectors, block, kept), prefix.num_positions)
        zeros = [torch.zeros_like(key) if layer in lost else key for layer, key in enumerate(prefix.keys)]
        blank = [torch.zeros_like(value) if layer in lost else value for layer, value in enumerate(prefix.values)]
        whole = replace(prefix, keys=tuple(zeros), values=tuple(blank))
        yield Hypothesis("layers-dropped", what, whole, prefix.num_positions)


def tied(vectors: Vectors, layer: int) -> Vectors | None:
    """Return the vectors with one layer's in every layer; None where layers differ in shape or there is one only."""
    if isinstance(vectors, SoftPrefix):
        return SoftPrefix(vectors.vectors[layer].expand_as(vectors.vectors), vectors.block)
    if isinstance(vectors, SoftKV):
        if len({tuple(t.shape) for t in vectors.keys}) > 1 or len({tuple(t.shape) for t in vectors.values}) > 1:
            return None
        count = len(vectors.keys)
        return SoftKV((vectors.keys[layer],) * count, (vectors.values[layer],) * count, vectors.block)
    return None


def with_sites(base: FrozenModel, vectors: SoftPrefix, block: Block, sites: Iterable[int]) -> KVPrefix:
    """Compile a hidden-state prefix that is put into the layers `sites` only; elsewhere its rows flow on."""
    from transformers import DynamicCache

    index = torch.tensor(block.soft_positions(), device=base.device)

    def hook_for(rows: Tensor) -> Any:
        def replace_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            new = put_rows(hidden, index, rows.to(base.device))
            return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

        return replace_rows

    cache = DynamicCache()
    ids = torch.tensor([block.literal_ids()], device=base.device)
    positions = torch.arange(ids.shape[1], device=base.device)[None]
    with torch.no_grad(), at_rest(base), ExitStack() as stack, AttentionWatch(dropout=False, keep=False):
        for layer in sites:
            handle = base.layers[layer].register_forward_pre_hook(hook_for(vectors.vectors[layer]), with_kwargs=True)
            stack.callback(handle.remove)
        base.run_decoder(base.embed(ids), positions=positions, cache=cache, mask=torch.ones_like(positions))
    keys, values = [tuple(getattr(layer, name)[0] for layer in cache.layers) for name in ("keys", "values")]
    return KVPrefix(keys=keys, values=values, digest="", block=block)


def rotated(base: FrozenModel, prefix: KVPrefix, sign: int) -> KVPrefix | None:
    """Return the prefix with its keys rotated once more (`sign` 1) or with their rotation taken off (-1).

    None where the base has no rotary embedding of the usual transformers form.
    """
    rotary = next((m for name, m in base.model.named_modules() if name.endswith("rotary_emb")), None)
    apply = getattr(importlib.import_module(type(base.layers[0]).__module__), "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        return None
    positions = torch.arange(prefix.num_positions, device=base.device)[None]
    keys = []
    try:
        with torch.no_grad():
            cos, sin = rotary(prefix.keys[0][None].float(), positions)
            for key in prefix.keys:
                width = cos.shape[-1]
                part = apply(key[None, ..., :width].float(), key[None, ..., :width].float(), cos, sign * sin)[1]
                keys.append(torch.cat([part[0].to(key.dtype), key[..., width:]], dim=-1))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None  # another form of rotary embedding
    return replace(prefix, keys=tuple(keys))
