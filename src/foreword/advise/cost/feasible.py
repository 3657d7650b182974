"""Whether a base can carry a method at all: kinds of layers, sliding windows, positions."""

from __future__ import annotations

from foreword.advise.bases.shapes import BaseShape
from foreword.advise.cost.load import Load

IMPORTS_KV = ("prefix", "kv", "compiled_prompt", "cartridge")
"""Methods that stand in the cache as positions computed before."""
KINDS = {
    "latent": "keeps one latent that keys and values share (MLA), so free keys and values cannot be written",
    "state": "keeps a state of fixed size, no keys and values per position",
}


def impossible(method: str, base: BaseShape, load: Load, tokens: int) -> str:
    """Return why `base` cannot carry a method that takes `tokens` positions, naming the layer; empty where it can."""
    if (index := layer_without_form(method, base)) is not None:
        return f"layer {index} of {base.name} {KINDS[base.layers[index].kind]}"
    if method in IMPORTS_KV:
        for index, layer in enumerate(base.layers):
            if layer.window is not None and tokens >= layer.window:
                return (
                    f"layer {index} of {base.name} attends to a sliding window of {layer.window} tokens, "
                    f"which {tokens} positions in front of the text fill"
                )
    limit, needed = base.context_tokens, tokens + load.input_tokens + load.output_tokens
    if limit is not None and needed > limit:
        return (
            f"{base.name} takes {limit} positions; {tokens} of the method, {load.input_tokens} of the input and "
            f"{load.output_tokens} of the answer are {needed}"
        )
    return ""


def layer_without_form(method: str, base: BaseShape) -> int | None:
    """Return the first layer in which a method's keys and values cannot be written, None where all can.

    Free keys and values need plain ones; a compiled prompt or prefix can be latents too, but no state.
    """
    kinds = {"kv": ("latent", "state"), "cartridge": ("latent", "state")}.get(method, ("state",))
    if method not in IMPORTS_KV:
        return None
    return next((index for index, layer in enumerate(base.layers) if layer.kind in kinds), None)
