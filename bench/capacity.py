"""What a version takes, where: bytes of files, of host memory and of KV blocks, by formulas; and measured on base-3m.

python bench/capacity.py --json bench/results/capacity.json     # bench/scale_tables.py puts it into the docs
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from hardware import describe

from foreword.core.spec import LayerSpec, ModelSpec
from foreword.serve.vllm.args import HOST_BYTES

VECTORS = 100
POSITIONS = VECTORS + 1
"""Behind one BOS token."""
BLOCK_SIZE = 16
"""vLLM's on GPUs."""
ITEMSIZE = {"artefact": 4, "cache": 2}
"""Training writes float32; a bfloat16 base has a bfloat16 cache."""


def llama_like(model_type: str, layers: int, kv_heads: int, head_dim: int, hidden: int, vocab: int) -> ModelSpec:
    layer = LayerSpec(num_kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim)
    return ModelSpec(
        model_type=model_type,
        hidden_size=hidden,
        embed_size=hidden,
        vocab_size=vocab,
        max_positions=None,
        num_parameters=0,
        layers=(layer,) * layers,
    )


SHAPES = {  # from the checkpoints' config.json
    "Qwen3-0.6B": llama_like("qwen3", 28, 8, 128, 1024, 151_936),
    "Llama-3-8B": llama_like("llama", 32, 8, 128, 4096, 128_256),
    "Llama-3-70B": llama_like("llama", 80, 8, 128, 8192, 128_256),
}


def sheet(name: str, spec: ModelSpec) -> dict[str, Any]:
    """Return what a version of this shape takes.

    Artefact, float32: P*D (prompt), L*P*D (prefix), the sum over layers of 2*Hkv*P*Dh (kv), each times 4 bytes.
    Compiled: the sum over layers of 2*Hkv*N*Dh, times 2 bytes, for N positions. Blocks: N // 16 shared, 1 of one's own.
    """
    compiled = spec.kv_bytes(POSITIONS, ITEMSIZE["cache"])
    return {
        "shape": name,
        "artefact": {
            "prompt": VECTORS * spec.embed_size * ITEMSIZE["artefact"],
            "prefix": spec.num_layers * VECTORS * spec.hidden_size * ITEMSIZE["artefact"],
            "kv": spec.kv_bytes(VECTORS, ITEMSIZE["artefact"]),
        },
        "compiled": compiled,
        "per_position": spec.kv_bytes(1, ITEMSIZE["cache"]),
        "fit_in_host_cache": HOST_BYTES // compiled,
        "shared_blocks": POSITIONS // BLOCK_SIZE,
        "own_blocks": int(POSITIONS % BLOCK_SIZE > 0),
        "block_bytes": spec.kv_bytes(BLOCK_SIZE, ITEMSIZE["cache"]),
    }


def measured() -> dict[str, Any]:
    """Return the sizes of real files for the bundled base, and what a version adds to a registry's SQLite file."""
    import torch

    import foreword.demo
    from foreword.core.artefact import ArtefactHeader, load_artefact, save_artefact
    from foreword.core.compile import compile
    from foreword.core.compiled import save_compiled
    from foreword.core.model import load_base
    from foreword.core.template import TaskTemplate
    from foreword.registry.store import Registry

    base = load_base(str(Path(foreword.demo.__file__).parent / "base-3m"))
    template = TaskTemplate(f"{{soft:{VECTORS}}}{{input}}")
    sizes: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def write(method: Any, seed: int) -> Path:
            header = ArtefactHeader(
                method=method,
                task="task",
                block=template.block(base.tokenizer),
                base=base.fingerprint,
                spec=base.spec,
                template=template.to_json(),
            )
            generator = torch.Generator().manual_seed(seed)
            shapes = header.tensor_shapes().items()
            save_artefact(
                folder / f"{method}-{seed}.safetensors",
                header,
                {tensor: torch.randn(shape, generator=generator) for tensor, shape in shapes},
            )
            return folder / f"{method}-{seed}.safetensors"

        for method in ("prompt", "prefix", "kv"):
            path, compiled = write(method, 0), folder / f"{method}.compiled.safetensors"
            prefix = compile(base, load_artefact(path))
            save_compiled(compiled, prefix, base=base.fingerprint, spec=base.spec)
            sizes[method] = {
                "artefact_file": path.stat().st_size,
                "compiled_file": compiled.stat().st_size,
                "kv_bytes": prefix.num_bytes,
            }
        database = []
        for first in (1, 101):
            with Registry.open(folder / "home") as registry:
                for seed in range(first, first + 100):
                    registry.publish(write("prompt", seed), alias="prod")
            database.append((folder / "home" / "registry.sqlite").stat().st_size)
    return {
        "shape": "base-3m",
        "sizes": sizes,
        "positions": template.block(base.tokenizer).num_positions,
        "registry_bytes_per_version": (database[1] - database[0]) / 100,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = {
        "what": f"bytes and blocks of a version of {VECTORS} vectors behind one BOS token",
        "hardware": describe(),
        "setting": {"vectors": VECTORS, "positions": POSITIONS, "block_size": BLOCK_SIZE, "host_bytes": HOST_BYTES},
        "sheet": [sheet(name, spec) for name, spec in SHAPES.items()],
        "measured": measured(),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
