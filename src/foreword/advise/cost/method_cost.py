"""What a method costs on a base: bytes, context, prefill, decoding, the wire, training; each with its formula.

Letters: T text tokens, P vectors or M text tokens before them, b bytes per element, A trained parameters that layers
gain, N' the parameters that one token passes (all but the experts that the router does not pick).
A dense product costs 2·N' FLOP per token; N' counts the embeddings too, so small bases with large vocabularies are
overstated by that share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foreword.advise.bases.shapes import BaseShape
from foreword.advise.cost.attention import cross_attention, read_elements
from foreword.advise.cost.feasible import IMPORTS_KV, impossible, layer_without_form
from foreword.advise.cost.hardware import Hardware
from foreword.advise.cost.load import Load
from foreword.advise.cost.notes import cost_notes
from foreword.advise.cost.parameters import Trained, kv_numbers, trained
from foreword.advise.cost.quantity import Quantity, quantity, show_number
from foreword.advise.cost.training import training_quantities
from foreword.errors import ConfigError, did_you_mean

__all__ = ["QUANTITIES", "Load", "MethodCost", "Quantity", "method_cost"]

QUANTITIES: Mapping[str, str] = {
    "bytes_per_task": "Bytes per task",
    "bytes_all_tasks": "Bytes of all tasks",
    "trained_parameters": "Trained parameters",
    "context_tokens": "Context used",
    "kv_bytes_per_sequence": "Added KV per sequence",
    "kv_bytes_per_task": "Added KV per task, blocks shared",
    "prefill_dense_flops": "Added prefill, dense products",
    "prefill_attention_flops": "Added prefill, attention",
    "prefill_flops_uncached": "Added prefill, uncached",
    "prefill_dense_s": "Added prefill time, dense products alone",
    "prefill_s_uncached": "Added prefill time, uncached",
    "prefill_s_cached": "Added prefill time, cached",
    "decode_bytes_per_token": "Added reads per generated token",
    "decode_s_per_token": "Added time per generated token",
    "decode_share_of_weights": "Added reads against the weights",
    "wire_bytes_per_request": "Bytes on the wire per request",
    "training_dense_flops": "Training, dense products",
    "training_attention_flops": "Training, attention",
    "training_flops": "Training",
    "training_dense_hours": "Training time, dense products alone",
    "training_hours": "Training time",
    "tweak_hours": "Time to ship a tweak, machine time alone",
}
"""Every key of `MethodCost.quantities`, in the order of a report, with its title."""

TEXT_METHODS = ("hard_text", "few_shot")
VECTOR_METHODS = ("prompt", "prefix", "kv", "compiled_prompt", "cartridge")
LAYER_METHODS = ("lora", "adapter", "ia3")
COSTED = (*TEXT_METHODS, *VECTOR_METHODS, *LAYER_METHODS, "full")
"""The methods that `method_cost` knows."""
TEXT_BYTES_PER_TOKEN = 4
"""Bytes of English text per token, about."""
NEED_KV = ("kv_bytes_per_sequence", "kv_bytes_per_task", "decode_bytes_per_token", "decode_s_per_token")
"""Quantities that cannot be had where a method's keys and values cannot be written."""
NAME_BYTES = 64
"""A task's name in a request, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCost:
    """The numbers of one method."""

    method: str
    quantities: Mapping[str, Quantity | None]
    """By the keys of `QUANTITIES`; None where the number cannot be had on this base."""
    impossible: str = ""
    """Why this base cannot carry the method, naming the layer; empty where it can."""
    notes: tuple[str, ...] = ()
    """What the numbers leave out or assume."""

    def value(self, key: str) -> float | None:
        """Return a quantity's value, None where it cannot be had."""
        found = self.quantities[key]
        return None if found is None else found.value

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "method": self.method,
            "impossible": self.impossible,
            "notes": list(self.notes),
            "quantities": {key: None if q is None else q.to_json() for key, q in self.quantities.items()},
        }


def method_cost(method: str, base: BaseShape, load: Load, hardware: Hardware) -> MethodCost:
    """Return the numbers of one method on a base. Raises ConfigError for an unknown method.

    Where a method has no such cost the value is 0 and the formula says why. Times are of one accelerator at the
    utilisation that `hardware` assumes.
    """
    if method not in COSTED:
        raise ConfigError(f"no method {method!r} is known", hint=did_you_mean(method, COSTED))
    learned, tokens = trained(method, base, load), positions(method, load)
    found: dict[str, Quantity | None] = {
        **_storage(method, load, learned),
        **_kv(method, base, load, tokens),
        **_prefill(method, base, load, hardware, tokens, learned),
        **_decode(method, base, load, hardware, tokens, learned),
        "wire_bytes_per_request": _wire(method, base, load, tokens),
        **training_quantities(method, base, load, hardware, tokens, learned),
    }
    if layer_without_form(method, base) is not None:
        found |= dict.fromkeys((*NEED_KV, "decode_share_of_weights", "prefill_attention_flops", "prefill_s_cached"))
        if method in ("kv", "cartridge"):
            found |= dict.fromkeys(QUANTITIES.keys() - {"context_tokens", "wire_bytes_per_request"})
    return MethodCost(
        method=method,
        quantities={key: found[key] for key in QUANTITIES},
        impossible=impossible(method, base, load, tokens),
        notes=cost_notes(method, base, load, hardware, tokens),
    )


def positions(method: str, load: Load) -> int:
    """Return how many positions before the text a method takes, in tokens."""
    if method in TEXT_METHODS:
        return load.hard_tokens if method == "hard_text" else load.few_shot_tokens
    if method in VECTOR_METHODS:
        return load.cartridge_tokens if method == "cartridge" else load.num_vectors
    return 0


def _storage(method: str, load: Load, learned: Trained) -> dict[str, Quantity]:
    size = learned.count * load.bytes_per_element
    formula, numbers = learned.times_b(load.bytes_per_element)
    if method in TEXT_METHODS:
        tokens = positions(method, load)
        size = tokens * TEXT_BYTES_PER_TOKEN
        formula, numbers = "M·4, about 4 bytes of text per token", f"{tokens}·{TEXT_BYTES_PER_TOKEN}"
    return {
        "bytes_per_task": quantity(size, "bytes", formula, numbers),
        "bytes_all_tasks": quantity(size * load.num_tasks, "bytes", f"tasks·{formula}", f"{load.num_tasks}·{numbers}"),
        "trained_parameters": quantity(
            learned.count,
            "parameters",
            f"{learned.formula}{f', {learned.where}' if learned.where else ''}",
            learned.numbers,
        ),
    }


def _kv(method: str, base: BaseShape, load: Load, tokens: int) -> dict[str, Quantity]:
    name = "M" if method in TEXT_METHODS else "P"
    if not tokens:
        none = quantity(0, "bytes", "0: nothing stands before the text")
        context = quantity(0, "tokens", "0: nothing stands before the text")
        return {"context_tokens": context, "kv_bytes_per_sequence": none, "kv_bytes_per_task": none}
    b, block = load.bytes_per_element, load.block_tokens
    blocks = -(-tokens // block)
    per_task = _kv_bytes(
        kv_numbers(base, blocks * block, "n"), b, f"; n = {name} in whole blocks of {block}, held once"
    )
    return {
        "context_tokens": quantity(tokens, "tokens", name),
        "kv_bytes_per_sequence": _kv_bytes(kv_numbers(base, tokens, name), b),
        "kv_bytes_per_task": per_task,
    }


def _kv_bytes(held: Trained, b: float, words: str = "") -> Quantity:
    if not held.count:
        return quantity(0, "bytes", held.formula)
    formula, numbers = held.times_b(b)
    return quantity(held.count * b, "bytes", formula + words, numbers)


def _prefill(
    method: str, base: BaseShape, load: Load, hardware: Hardware, tokens: int, learned: Trained
) -> dict[str, Quantity]:
    if tokens:
        parts = _import_prefill if method in IMPORTS_KV else _position_prefill
        return parts(method, base, load, hardware, tokens)
    flops, rate = 0, hardware.flops_per_s
    formula, numbers = "0: the weights are changed, not added to", ""
    if method in LAYER_METHODS:
        flops, formula = 2 * learned.count * load.input_tokens, "2·A·T"
        numbers = f"2·{show_number(learned.count)}·{load.input_tokens}"
    dense, time = quantity(flops, "FLOP", formula, numbers), _seconds(flops, rate, formula)
    words = ": it works on every token, no cache saves it" if flops else ""
    return {
        "prefill_dense_flops": dense,
        "prefill_attention_flops": quantity(0, "FLOP", "0: nothing stands before the text"),
        "prefill_flops_uncached": dense,
        "prefill_dense_s": time,
        "prefill_s_uncached": time,
        "prefill_s_cached": dataclasses.replace(time, formula=time.formula + words),
    }


def _position_prefill(method: str, base: BaseShape, load: Load, hardware: Hardware, tokens: int) -> dict[str, Quantity]:
    """Return what positions cost that run through the model: M tokens of text, or P embeddings."""
    name, rate = "M" if method in TEXT_METHODS else "P", hardware.flops_per_s
    dense = 2 * base.num_active_parameters * tokens
    formula = f"2·N'·{name}"
    across = cross_attention(base, tokens, load.input_tokens, name)
    attention = cross_attention(base, tokens, load.input_tokens, name, with_own=True)
    total = dense + attention.value
    return {
        "prefill_dense_flops": quantity(
            dense, "FLOP", formula, f"2·{show_number(base.num_active_parameters)}·{tokens}"
        ),
        "prefill_attention_flops": attention,
        "prefill_flops_uncached": quantity(
            total, "FLOP", "dense + attention", f"{show_number(dense)} + {show_number(attention.value)}"
        ),
        "prefill_dense_s": _seconds(dense, rate, formula),
        "prefill_s_uncached": _seconds(total, rate, f"({formula} + attention)"),
        "prefill_s_cached": _seconds(across.value, rate, across.formula),
    }


def _import_prefill(method: str, base: BaseShape, load: Load, hardware: Hardware, tokens: int) -> dict[str, Quantity]:
    """Return what positions cost whose keys and values are written into the cache."""
    none = "0: keys and values are imported, not computed"
    across = cross_attention(base, tokens, load.input_tokens, "P")
    size = kv_numbers(base, tokens).count * load.bytes_per_element
    rate, link = hardware.flops_per_s, hardware.host_bytes_per_s
    return {
        "prefill_dense_flops": quantity(0, "FLOP", none),
        "prefill_attention_flops": across,
        "prefill_flops_uncached": across,
        "prefill_dense_s": quantity(0, "s", none),
        "prefill_s_uncached": quantity(
            across.value / rate + size / link,
            "s",
            "attention / (FLOP/s reached) + KV bytes / (bytes/s from the host)",
            f"{show_number(across.value)} / {show_number(rate)} + {show_number(size)} / {show_number(link)}",
        ),
        "prefill_s_cached": _seconds(across.value, rate, across.formula),
    }


def _seconds(flops: float, rate: float, formula: str) -> Quantity:
    if not flops:
        return quantity(0, "s", formula)
    formula = formula if "+" not in formula or formula.startswith("(") else f"({formula})"
    return quantity(flops / rate, "s", f"{formula} / (FLOP/s reached)", f"{show_number(flops)} / {show_number(rate)}")


def _decode(
    method: str, base: BaseShape, load: Load, hardware: Hardware, tokens: int, learned: Trained
) -> dict[str, Quantity]:
    b, weights = load.bytes_per_element, base.active_weight_bytes
    sets, batch = min(load.batch, load.num_tasks), load.batch
    name = "M" if method in TEXT_METHODS else "P"
    size = 0.0
    formula, numbers = "0: nothing is read beside the weights", ""
    if tokens:
        own = kv_numbers(base, tokens, name)
        count = read_elements(base, tokens, load.input_tokens)
        size, (formula, numbers) = count * b, own.times_b(b)
        if count != own.count:
            formula = f"b·Σ over layers of what a window of W still shows of {name} behind T tokens"
            numbers = f"{show_number(b)}·{show_number(count)}"
    elif method in LAYER_METHODS:
        size = learned.count * b * sets / batch
        formula = "A·b·min(batch, tasks) / batch: each task's parameters once per step"
        numbers = f"{show_number(learned.count)}·{show_number(b)}·{sets}/{batch}"
    elif method == "full":
        size = weights * (sets - 1) / batch
        formula = "weights·(min(batch, tasks) - 1) / batch: each task reads a base of its own"
        numbers = f"{show_number(weights)}·({sets} - 1)/{batch}"
    rate = hardware.bytes_per_s
    return {
        "decode_bytes_per_token": quantity(size, "bytes", formula, numbers),
        "decode_s_per_token": quantity(
            size / rate, "s", "bytes / (bytes/s of memory)", f"{show_number(size)} / {show_number(rate)}"
        ),
        "decode_share_of_weights": quantity(
            size / weights,
            "share",
            "bytes / bytes of the weights that a token passes",
            f"{show_number(size)} / {show_number(weights)}",
        ),
    }


def _wire(method: str, base: BaseShape, load: Load, tokens: int) -> Quantity:
    if method in TEXT_METHODS:
        numbers = f"{tokens}·{TEXT_BYTES_PER_TOKEN}"
        return quantity(tokens * TEXT_BYTES_PER_TOKEN, "bytes", "M·4, unless the server keeps the text", numbers)
    if method == "prompt":
        width, b = base.embed_size, load.bytes_per_element
        size = (tokens + load.input_tokens) * width * b * 4 / 3
        numbers = f"({tokens} + {load.input_tokens})·{width}·{show_number(b)}·4/3"
        return quantity(size, "bytes", "(P + T)·D·b·4/3, embeddings in base64", numbers)
    return quantity(NAME_BYTES, "bytes", "a name of 64 characters at most; the server holds the rest")
