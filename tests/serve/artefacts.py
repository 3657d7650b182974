"""Artefacts with random vectors for the demo base, and the base itself, loaded once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

import foreword
from foreword.core.artefact import ArtefactHeader, save_artefact
from foreword.core.model import FrozenModel, load_base
from foreword.core.spec import Method
from foreword.core.template import TaskTemplate

BASE = Path(foreword.__file__).parent / "demo" / "base-3m"


@cache
def demo_base() -> FrozenModel:
    """float32, so that a batch gives exactly what its rows give alone."""
    return load_base(str(BASE), dtype="float32")


def write_artefact(
    folder: Path,
    task: str,
    method: Method = "prompt",
    *,
    seed: int = 0,
    num_vectors: int = 6,
    chat: bool = True,
    base: FrozenModel | None = None,
) -> Path:
    """Write an artefact whose vectors are large enough to change every answer."""
    base = base or demo_base()
    template = TaskTemplate(f"{{soft:{num_vectors}}}{{input}}", chat=chat)
    spec = base.spec
    header = ArtefactHeader(
        method=method,
        task=task,
        block=template.block(base.tokenizer),
        base=base.fingerprint,
        spec=spec,
        template=template.to_json(),
        max_new_tokens=12,
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in header.tensor_shapes().items():
        tensors[name] = torch.randn(shape, generator=generator) * (0.3 if method == "prompt" else 1.0)
    path = folder / f"{task}-{method}-{seed}.safetensors"
    save_artefact(path, header, tensors)
    return path
