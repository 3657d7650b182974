"""How a step runs the base: packed or padded rows, compiled layers, and what is done with saved activations.

None of it changes what is learned; tests/train/test_strategy.py holds loss and gradients equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from foreword.core.compiled_layers import compile_layers
from foreword.core.model import FrozenModel
from foreword.core.packed import flexible_attention, packs
from foreword.errors import ConfigError
from foreword.train.distributed import world

Layout = Literal["auto", "packed", "padded"]


@dataclass(frozen=True, slots=True)
class Strategy:
    """How `fit` runs the base. The default is what any machine can do."""

    packed: bool = False
    """All rows, and the blocks in front of them, in one sequence without padding (core/packed.py)."""
    compiled: bool = False
    """Decoder layers through `torch.compile`. The first steps take minutes."""
    checkpointing: bool = False
    """Keep each layer's input only and compute the layer again in the backward pass: a third more time."""
    offload: bool = False
    """Keep saved activations in the host's memory."""

    @contextmanager
    def active(self, base: FrozenModel) -> Iterator[None]:
        """Set the base up for the rows of a step: their forward and backward passes belong inside, blocks do not."""
        _ = base.per_token  # found by trial forwards of the base as it is
        with ExitStack() as stack:
            if self.packed:
                stack.enter_context(flexible_attention(base))
            if self.compiled:
                stack.enter_context(compile_layers(base))
            if self.checkpointing:
                stack.enter_context(_checkpointed(base))
            if self.offload:
                stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=base.device.type == "cuda"))
            yield


def choose_strategy(
    base: FrozenModel,
    layout: Layout = "auto",
    *,
    compiled: bool | None = None,
    checkpointing: bool = False,
    offload: bool = False,
) -> Strategy:
    """Return how to run `base` where it is: `auto` packs on CUDA, if a trial shows that the base packs right.

    On a CPU padded rows of similar length are faster (bench/training.py): attention over a packed sequence costs the
    square of its length there. A sharded base packs always: gradients reach its layers through their outputs alone.
    `compiled` None compiles packed layers on CUDA. Raises ConfigError for a layout that
    does not exist, and for `packed` on a base that cannot.
    """
    if layout not in ("auto", "packed", "padded"):
        raise ConfigError(f"layout {layout!r} is not one of auto, packed, padded")
    several = world().size
    if several > 1 and layout == "padded":
        raise ConfigError(
            f"padded rows in {several} processes: a sharded base takes packed rows only",
            hint="Leave the layout to auto.",
        )
    layout = "packed" if several > 1 else layout
    on_gpu = base.device.type == "cuda"
    able = layout != "padded" and (layout == "packed" or on_gpu) and packs(base)
    if layout == "packed" and not able:
        raise ConfigError(
            f"{base.spec.model_type} does not compute a packed sequence right: in a trial its logits differ from those "
            f"of padded rows",
            hint="Train in one process." if several > 1 else 'Use layout "padded", or "auto", which falls back to it.',
        )
    return Strategy(
        packed=able,
        compiled=able and on_gpu if compiled is None else compiled,
        checkpointing=checkpointing,
        offload=offload,
    )


@contextmanager
def _checkpointed(base: FrozenModel) -> Iterator[None]:
    """While active, layers keep their inputs only; the last, whose modules may skip rows, keeps all."""
    layers = base.layers[:-1]
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = _recomputing(layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.__dict__["forward"]
            if own is not None:
                layer.__dict__["forward"] = own


def _recomputing(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
