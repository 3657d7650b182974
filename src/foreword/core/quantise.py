"""Bases held in fewer bits: what it takes, said before anything is loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from foreword.errors import ConfigError

BITS = ("8bit", "4bit")


def quantisation(quantise: str, device: str) -> Any:
    """Return transformers' configuration for weights of 8 or 4 bits (bitsandbytes; 4 bits: NF4, products in bfloat16).

    Raises ConfigError for another kind, without a GPU, and without bitsandbytes.
    Source: LLM.int8(), arXiv:2208.07339; QLoRA, arXiv:2305.14314.
    """
    if quantise not in BITS:
        raise ConfigError(f"quantise {quantise!r} is not one of {', '.join(BITS)}")
    missing = []
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        missing.append(f"a CUDA device (asked for: {device}, found: {torch.cuda.device_count()})")
    if importlib.util.find_spec("bitsandbytes") is None:
        missing.append("the package bitsandbytes (not installed)")
    if missing:
        raise ConfigError(
            f"a base in {quantise} needs {' and '.join(missing)}",
            hint="pip install bitsandbytes, and give device=cuda; or leave the base in its own dtype.",
        )
    from transformers import BitsAndBytesConfig

    if quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
