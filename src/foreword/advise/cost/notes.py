"""What the numbers of a method leave out or assume on a given base, in sentences."""

from __future__ import annotations

import math

from foreword.advise.bases.shapes import BaseShape
from foreword.advise.cost.attention import reach_tokens
from foreword.advise.cost.feasible import IMPORTS_KV
from foreword.advise.cost.hardware import Hardware
from foreword.advise.cost.load import Load
from foreword.advise.cost.parameters import lora_width
from foreword.advise.cost.quantity import human

TRAINING_BYTES_PER_PARAMETER = 16
"""Full fine-tuning with Adam in mixed precision: weight and gradient in 16 bits, master copy and two moments in 32."""


def cost_notes(method: str, base: BaseShape, load: Load, hardware: Hardware, tokens: int) -> tuple[str, ...]:
    """Return what a reader of the numbers must know, in the order of weight."""
    return tuple(
        note
        for note in (
            *_layer_notes(method, base),
            _window_note(method, base, tokens),
            _block_note(method, load, tokens),
            _memory_note(method, base, hardware),
            _method_note(method, base, load),
        )
        if note
    )


def _layer_notes(method: str, base: BaseShape) -> list[str]:
    index = base.first_layer_without_kv()
    if index is None or method not in ("prompt", *IMPORTS_KV):
        return []
    notes = ["foreword itself trains and compiles on plain keys and values only; on this base train with PEFT"]
    if method in ("prefix", "compiled_prompt") and base.layers[index].kind == "latent":
        notes.append("what is imported are latents and rotary keys, which the engine must be able to take")
    return notes


def _window_note(method: str, base: BaseShape, tokens: int) -> str:
    if not tokens or base.window is None:
        return ""
    if base.context_tokens is not None and base.window >= base.context_tokens:
        return ""
    if (reach := reach_tokens(base)) is not None:
        return (
            f"every layer has a sliding window: what stands before the text can influence its first {reach:,} tokens "
            "and none behind them"
        )
    full = base.num_full_layers
    return (
        f"behind {base.window:,} tokens only {full} of {base.num_layers} layers still see what stands before the text; "
        "the others have sliding windows"
    )


def _block_note(method: str, load: Load, tokens: int) -> str:
    rest = tokens % load.block_tokens
    if not rest:
        return ""
    whole = tokens - rest + load.block_tokens
    return (
        f"{tokens} positions are no multiple of the cache's block of {load.block_tokens}: the last {rest} are not "
        f"shared between sequences; {whole} would be"
    )


def _memory_note(method: str, base: BaseShape, hardware: Hardware) -> str:
    need = base.weight_bytes
    if method == "full":
        need = base.num_parameters * TRAINING_BYTES_PER_PARAMETER
    if need <= hardware.memory_bytes:
        return ""
    count = math.ceil(need / hardware.memory_bytes)
    what = "training holds 16 bytes per parameter" if method == "full" else "the weights take"
    return (
        f"{what}{', ' if method == 'full' else ' '}{human(need, 'bytes')}: at least {count} {hardware.name} of "
        f"{human(hardware.memory_bytes, 'bytes')}; times are for one, divide them by the number at best"
    )


def _method_note(method: str, base: BaseShape, load: Load) -> str:
    if method == "lora" and base.is_moe:
        size = load.lora_rank * lora_width(base, ("expert",)) * load.bytes_per_element
        return (
            f"experts carry no LoRA here; with one on each of them it would be {human(size, 'bytes')} more per task, "
            "and few engines serve that"
        )
    if method == "prefix":
        return (
            "served as compiled keys and values, a request pays what it pays for a kv prefix of the same P; an "
            "implementation that puts the vectors into each layer at run time pays a prompt's uncached prefill as well"
        )
    if method == "compiled_prompt":
        return "the file is the prompt's; its keys and values are computed once per version"
    if method == "cartridge":
        context, limit = load.cartridge_context_tokens, base.context_tokens
        if limit is not None and context + load.input_tokens > limit:
            return (
                f"the teacher reads {context:,} tokens of context and {load.input_tokens:,} of a row, and the base "
                f"takes {limit:,} positions: train on shorter chunks"
            )
        return (
            f"the teacher reads {context:,} tokens of context before each row; writing the questions and answers to "
            "train on is generation, and is not in the training figures"
        )
    if method == "ia3" and any(linear.name in ("c_attn", "qkv_proj", "query_key_value") for linear in base.linears):
        return "this base fuses queries, keys and values: implementations that scale the fused output hold more"
    return ""
