"""What every decoder layer reads and writes: lengths, and rows that do not come from the layer below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LayerPass:
    """One layer's forward: its input and output [B, S, D] as its body saw and left them."""

    index: int
    inputs: Tensor
    outputs: Tensor


def find_layers(model: nn.Module | None, count: int) -> list[nn.Module]:
    """Return the `count` decoder layers below a module: the list of that length with most parameters, or []."""
    found: list[nn.ModuleList] = []
    for module in () if model is None else model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            found.append(module)
    return list(max(found, key=_num_parameters)) if found else []


def _num_parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def layers_watched(layers: Sequence[nn.Module]) -> Iterator[list[LayerPass]]:
    """While active, the list fills with what each layer reads and writes, in the order in which they run.

    The body's own `forward` is wrapped, so that rows which any hook puts in are seen, whenever it was registered.
    """
    passes: list[LayerPass] = []
    former = [vars(layer).get("forward") for layer in layers]

    def wrapped(index: int, body: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states")
            result = body(*args, **kwargs)
            written = result[0] if isinstance(result, tuple | list) else result
            if isinstance(hidden, Tensor) and isinstance(written, Tensor) and hidden.ndim == written.ndim == 3:
                passes.append(LayerPass(index, hidden.detach().clone(), written.detach().clone()))
            return result

        return forward

    for index, layer in enumerate(layers):
        layer.forward = wrapped(index, layer.forward)
    try:
        yield passes
    finally:
        for layer, body in zip(layers, former, strict=True):
            if body is None:
                del layer.forward
            else:
                layer.forward = body


def foreign_rows(passes: Sequence[LayerPass]) -> list[Tensor]:
    """Return, for every layer but the first, the rows [K, D] of its input (first of the batch) that the layer below did
    not write.

    The text comes last in a sequence, so inputs and outputs of different length are aligned at their ends.
    """
    found = []
    for below, above in pairwise(passes):
        written, read = below.outputs[0], above.inputs[0]
        common = min(len(written), len(read))
        tail = read[len(read) - common :]
        changed = (tail != written[len(written) - common :].to(tail.dtype)).any(-1)
        found.append(torch.cat([read[: len(read) - common], tail[changed]]))
    return found
