"""What a base is known by: a fingerprint of samples that travels with artefacts, and an exact hash of every bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from foreword.core.spec import Fingerprint

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel

SAMPLES_PER_TENSOR = 256


def bits_sha256(model: nn.Module) -> str:
    """Return an exact hash of every bit of every parameter and buffer; of sharded ones, of this process's share."""
    digest = hashlib.sha256()
    for name, tensor in _named_tensors(model):
        digest.update(name.encode())
        digest.update(_bits_checksum(tensor))
    return digest.hexdigest()


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from sorted(model.named_parameters())
    yield from sorted(model.named_buffers())


def compute_fingerprint(base: FrozenModel) -> Fingerprint:
    """Compute the identity of a base from its shapes, a fixed sample of its weights, tokenizer and chat template."""
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(base.model.named_parameters()):
        kind = "float" if tensor.is_floating_point() else str(tensor.dtype)
        shapes.update(f"{name}:{list(tensor.shape)}:{kind};".encode())
        weights.update(_sampled_bytes(tensor))
    quantisation = getattr(base.model.config, "quantization_config", None)
    method = getattr(quantisation, "quant_method", None) or (quantisation or {}).get("quant_method", "unknown")
    return Fingerprint(
        model_type=base.spec.model_type,
        shapes_sha256=shapes.hexdigest(),
        quantisation=str(getattr(method, "value", method)) if quantisation else "none",
        weights_sha256=weights.hexdigest(),
        tokenizer_sha256=tokenizer_sha256(base.tokenizer),
        chat_template_sha256=chat_template_sha256(base.tokenizer),
    )


def _sampled_bytes(tensor: Tensor) -> bytes:
    """Return up to SAMPLES_PER_TENSOR evenly spread elements as bytes; floats rounded to bfloat16."""
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLES_PER_TENSOR, flat.numel())
    index = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
    sample = flat[index]
    if sample.is_floating_point():
        return sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
    return sample.cpu().numpy().tobytes()


def _bits_checksum(tensor: Tensor) -> bytes:
    """Return 16 bytes from all bits of a tensor: a sum and a position-weighted sum of its words, modulo 2^64."""
    data = tensor.detach()
    data = (data.to_local() if isinstance(data, DTensor) else data).contiguous()
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    total, weighted = 0, 0
    for start, chunk in enumerate(torch.split(data.reshape(-1).view(words), 1 << 24)):
        numbers = chunk.to(torch.int64)
        places = torch.arange(1, numbers.numel() + 1, device=numbers.device)
        total += int(numbers.sum())
        weighted += int((numbers * (places * 2 + 1)).sum()) * (2 * start + 1)
    return (total % 2**64).to_bytes(8, "little") + (weighted % 2**64).to_bytes(8, "little")


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return a hash of the vocabulary, special tokens and of how probe texts are cut; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    probes = ["Hello, world", "  two  spaces\n\nlines", "naïve café 12,345.67", "<b>x=1;</b>\t日本"]
    digest = hashlib.sha256()
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(repr(sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())).encode())
    for probe in probes:
        digest.update(repr(tokenizer(probe).input_ids).encode())
    return digest.hexdigest()


def chat_template_sha256(tokenizer: Any) -> str:
    """Return a hash of the chat template; empty where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest() if template else ""
