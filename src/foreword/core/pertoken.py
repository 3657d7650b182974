"""Modules that work token by token, run only at the rows whose output somebody reads.

Behind the last layer's attention only the places whose logits are wanted matter: its queries, output projection and
MLP need not run elsewhere. The rows are gathered before such a module and its output is scattered into zeros behind
it, by forward hooks: no layer code is touched. Exact for logits at those places, and for all gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel

WITHIN = {torch.float32: 1e-4, torch.float64: 1e-8}
"""How far logits may move, relative to their spread, for a set of modules to be taken; other dtypes: 0.1."""


@contextmanager
def computed_only_at(modules: Sequence[nn.Module], rows: Tensor, fill: float = 0.0) -> Iterator[None]:
    """While active, `modules` compute `rows` [K] only, flat indices without repeats into their input's B·T rows.

    Their other outputs are `fill`.
    """
    handles = []
    for module in modules:
        shapes: list[torch.Size] = []
        handles.append(module.register_forward_pre_hook(_gather(rows, shapes)))
        handles.append(module.register_forward_hook(_scatter(rows, shapes, fill)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gather(rows: Tensor, shapes: list[torch.Size]) -> Any:
    def gather(module: nn.Module, args: tuple[Any, ...]) -> Any:
        hidden = args[0]
        shapes.append(hidden.shape[:-1])
        return (hidden.flatten(0, -2).index_select(0, rows.to(hidden.device))[None], *args[1:])

    return gather


def _scatter(rows: Tensor, shapes: list[torch.Size], fill: float) -> Any:
    def scatter(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        shape = shapes.pop()
        whole = output.new_full((shape.numel(), output.shape[-1]), fill)
        return whole.index_copy(0, rows.to(output.device), output[0]).view(*shape, -1)

    return scatter


def per_token_modules(base: FrozenModel) -> dict[str, type[nn.Module]]:
    """Find the last layer's modules whose output at a place is read for that place alone; return names and types.

    Found by measurement, not by family: a module stays if NaN in all its other rows leaves the wanted logits finite,
    and all found together if they leave the logits as they were. Largest first, none inside another.
    """
    layer, found = base.layers[-1], dict[str, type[nn.Module]]()
    ids = torch.arange(12, device=base.device).view(2, 6) % base.spec.vocab_size
    rows = torch.tensor([2, 5, 9], device=base.device)
    with torch.no_grad():
        reference, takes = _probe_shapes(base, layer, ids, rows)
        for name in takes:
            if any(name.startswith(f"{outer}.") for outer in found):
                continue
            module = layer.get_submodule(name)
            if _logits(base, ids, rows, [module], fill=float("nan")).isfinite().all():
                found[name] = type(module)
        modules = [layer.get_submodule(name) for name in found]
        apart = (_logits(base, ids, rows, modules) - reference).abs().max()
    return found if apart <= WITHIN.get(base.dtype, 0.1) * reference.std() else {}


def _probe_shapes(base: FrozenModel, layer: nn.Module, ids: Tensor, rows: Tensor) -> tuple[Tensor, list[str]]:
    """Return the plain logits, and the names of modules with matrices that map one [B, T, ·] to another."""
    calls: dict[str, list[bool]] = {}

    def seen(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            plain = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor) and not kwargs
            calls.setdefault(name, []).append(
                plain and args[0].shape[:-1] == ids.shape and output.shape[:-1] == ids.shape
            )

        return hook

    handles = [
        module.register_forward_hook(seen(name), with_kwargs=True)
        for name, module in layer.named_modules()
        if name and any(parameter.ndim > 1 for parameter in module.parameters())
    ]
    try:
        reference = _logits(base, ids, rows, [])
    finally:
        for handle in handles:
            handle.remove()
    order = [name for name, _ in layer.named_modules()]
    return reference, sorted((name for name, fits in calls.items() if fits == [True]), key=order.index)


def _logits(base: FrozenModel, ids: Tensor, rows: Tensor, modules: Sequence[nn.Module], fill: float = 0.0) -> Tensor:
    from transformers import DynamicCache

    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    arguments: dict[str, Any] = {"positions": positions, "cache": DynamicCache(), "mask": torch.ones_like(ids)}
    with computed_only_at(modules, rows, fill):
        return base.run(ids=ids, select=rows, **arguments).float()
