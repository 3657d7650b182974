"""Decoder layers through `torch.compile`, for the time of a step; the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel

BACKEND = "inductor"


@contextmanager
def compile_layers(base: FrozenModel, backend: str = BACKEND) -> Iterator[None]:
    """While active, all layers but the last, whose modules may skip rows, run compiled.

    Layers of one class share their graphs, so that a base of 64 layers is compiled once.
    """
    layers = base.layers[:-1]
    for layer in layers:
        layer.__dict__["forward"] = _compiled(type(layer), backend).__get__(layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


_COMPILED: dict[tuple[type[nn.Module], str], Any] = {}


def _compiled(kind: type[nn.Module], backend: str) -> Any:
    if (kind, backend) not in _COMPILED:
        _COMPILED[kind, backend] = torch.compile(kind.forward, backend=backend)
    return _COMPILED[kind, backend]
