"""Where a base's shapes come from: a Hugging Face configuration, a folder that holds one, numbers, or a known name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from foreword.advise.bases.config_shapes import shape_from_config
from foreword.advise.bases.number_shapes import shape_from_numbers
from foreword.advise.bases.shapes import BaseShape, LayerShape, Linear
from foreword.errors import ConfigError, nearest

__all__ = ["KNOWN", "BaseShape", "LayerShape", "Linear", "find_base", "from_config", "from_folder", "from_numbers"]

from_config = shape_from_config
from_numbers = shape_from_numbers


def find_base(base: str | Path | Mapping[str, Any]) -> BaseShape:
    """Return the shapes of a known name, a folder, a Hugging Face configuration (it has model_type) or of numbers.

    Nothing is downloaded: a name that is neither known nor a folder is a ConfigError.
    """
    if isinstance(base, Mapping):
        is_config = any(key in base for key in ("model_type", "text_config", "architectures"))
        return from_config(base) if is_config else from_numbers(base)
    path = Path(base)
    if path.exists():
        return from_folder(path)
    name = str(base).lower().rpartition("/")[2]
    if name in KNOWN:
        return KNOWN[name]
    near = " or ".join(nearest(name, KNOWN))
    raise ConfigError(
        f"base {str(base)!r} is no folder and no known name, and configurations are not downloaded",
        hint=(f"Did you mean {near}? " if near else "") + "Give a folder with the model's config.json, the "
        f"base as numbers (num_layers, hidden_size, num_heads, ...), or one of {', '.join(KNOWN)}.",
    )


def from_folder(path: str | Path) -> BaseShape:
    """Return the shapes of the config.json in a folder, or of that file itself; nothing else is read.

    Raises ConfigError where it is missing, is not a JSON object, or is not the configuration of a decoder.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}",
            hint="Give the folder of a Hugging Face model; its config.json is enough, weights are not read.",
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}", hint="Copy config.json again from the model.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a {type(config).__name__}, not an object of keys and values")
    return from_config(config, path.resolve().name if path.is_dir() else path.resolve().parent.name)


def _llama(layers: int, hidden: int, heads: int, ffn: int) -> dict[str, Any]:
    """Return the configuration of a Llama 3.1 model."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": ffn,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }


_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "qwen3-32b": {
        "model_type": "qwen3",
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 25600,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "opt-30b": {
        "model_type": "opt",
        "num_hidden_layers": 48,
        "hidden_size": 7168,
        "num_attention_heads": 56,
        "ffn_dim": 28672,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 7168,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "llama-3.1-8b": _llama(32, 4096, 32, 14336),
    "llama-3.1-70b": _llama(80, 8192, 64, 28672),
    "mistral-7b-v0.1": {
        "model_type": "mistral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
}

KNOWN: Mapping[str, BaseShape] = MappingProxyType({name: from_config(_CONFIGS[name], name) for name in _CONFIGS})
"""Well-known public bases by name, from their published configurations."""
