"""Attention counted in pairs of a query and a key that it sees; sliding windows limit what is seen."""

from __future__ import annotations

from foreword.advise.bases.shapes import BaseShape, LayerShape
from foreword.advise.cost.quantity import Quantity, quantity, show_number


def pairs_within(length: int, window: int | None = None) -> int:
    """Return the pairs of `length` causal positions with each other, a position with itself included."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def pairs_across(before: int, after: int, window: int | None = None) -> int:
    """Return the pairs of `after` positions with the `before` positions in front of them."""
    return pairs_within(before + after, window) - pairs_within(before, window) - pairs_within(after, window)


def visible(before: int, distance: int, window: int | None = None) -> int:
    """Return how many of `before` positions a query sees with `distance` positions between them and itself."""
    return before if window is None else max(0, min(before, window - 1 - distance))


def flops_per_pair(base: BaseShape, layer: LayerShape) -> int:
    """Return the FLOP of one pair in one layer over all heads: score, and weighted sum of the values."""
    return 0 if layer.kind == "state" else 2 * base.num_heads * (layer.head_dim + layer.value_dim)


def own_flops(base: BaseShape, length: int) -> int:
    """Return the FLOP of attention among `length` positions, all layers."""
    return sum(flops_per_pair(base, layer) * pairs_within(length, layer.window) for layer in base.layers)


def cross_flops(base: BaseShape, before: int, after: int) -> int:
    """Return the FLOP of attention of `after` positions to `before` ones in front, all layers."""
    return sum(flops_per_pair(base, layer) * pairs_across(before, after, layer.window) for layer in base.layers)


def read_elements(base: BaseShape, before: int, distance: int) -> int:
    """Return how many cached numbers of `before` positions one query reads over all layers.

    `distance` positions lie between. A layer that borrows keys and values reads them again.
    """
    total = 0
    for layer in base.layers:
        stored = layer.elements_per_token
        if layer.kind == "shared":
            stored = layer.num_kv_heads * (layer.head_dim + layer.value_dim)
        total += stored * visible(before, distance, layer.window)
    return total


def reach_tokens(base: BaseShape) -> int | None:
    """Return how many text tokens behind a prefix it can influence at all, None where a layer sees everything.

    Each window layer carries influence W-1 positions on, so a stack of L reaches to text index L·(W-1)-1.
    """
    windows = [layer.window for layer in base.layers]
    if any(window is None for window in windows):
        return None
    return sum(window - 1 for window in windows if window is not None)


def is_cut(base: BaseShape, length: int) -> bool:
    """Return whether a sliding window hides something within a sequence of `length` positions."""
    return base.window is not None and base.window < length


def cross_attention(base: BaseShape, before: int, after: int, name: str, *, with_own: bool = False) -> Quantity:
    """Return the FLOP of attention of `after` text tokens to `before` positions in front, called `name` in the formula.

    `with_own` adds those of the positions among themselves, as computing them costs.
    """
    flops = cross_flops(base, before, after) + (own_flops(base, before) if with_own else 0)
    if not flops:
        return quantity(0, "FLOP", "0: no layer attends" if after or with_own else "0: no text attends to it")
    own = (f"{name}·({name} + 1)/2", f"{before}·{before + 1}/2")
    letters, numbers = (f"{name}·T", f"{before}·{after}")
    if with_own:
        letters, numbers = f"({letters} + {own[0]})", f"({numbers} + {own[1]})"
    layer, cut = base.layers[0], is_cut(base, before + after)
    alike = {(one.kind, one.head_dim, one.value_dim) for one in base.layers}
    if not cut and len(alike) == 1 and layer.head_dim == layer.value_dim:
        shown = f"4·{base.num_layers}·{base.num_heads}·{layer.head_dim}·{numbers}"
        return quantity(flops, "FLOP", f"4·L·H·Dh·{letters}", shown)
    words = ", less what windows hide" if cut else ""
    return quantity(flops, "FLOP", f"Σ over layers 2·H·(Dh + Dv)·{letters}{words}", show_number(flops))
