"""How long a version takes from the registry to an engine, and a name to its version.

python bench/versions.py --json bench/results/versions.json

Cold load: `Residents.acquire` of a version of about 1 MB that this process has not seen: fetch, digest, check, compile,
copy into the engine's pool; by method, median and worst of many different versions. Resolve: `Names.resolve` of a name
that was answered within its time to live. bench/registry.py has the database's own times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hardware import describe

from foreword.core.artefact import ArtefactHeader, save_artefact
from foreword.core.model import FrozenModel, load_base
from foreword.core.template import TaskTemplate
from foreword.engine.engine import Engine
from foreword.registry.records import Version
from foreword.registry.store import Registry
from foreword.serve.engines.embedded import EmbeddedBackend
from foreword.serve.versions.names import Names
from foreword.serve.versions.residents import Residents

BENCH = Path(__file__).parent
METHODS = ("prompt", "prefix", "kv")


def publish(registry: Registry, base: FrozenModel, method: str, num_bytes: int, count: int) -> list[Version]:
    """Publish `count` versions of a task with random vectors of about `num_bytes`."""
    per_vector = 4 * sum(
        {
            "prompt": [base.spec.embed_size],
            "prefix": [base.spec.hidden_size] * base.spec.num_layers,
            "kv": [layer.num_kv_heads * (layer.head_dim + layer.value_dim) for layer in base.spec.layers],
        }[method]
    )
    longest = (base.spec.max_positions or 4096) // 2
    template = TaskTemplate(f"{{soft:{min(longest, num_bytes // per_vector)}}}{{input}}", chat=True)
    header = ArtefactHeader(
        method=method,  # type: ignore[arg-type]
        task=method,
        block=template.block(base.tokenizer),
        base=base.fingerprint,
        spec=base.spec,
        template=template.to_json(),
        max_new_tokens=4,
    )
    versions = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(count):
            generator = torch.Generator().manual_seed(seed)
            shapes = header.tensor_shapes()
            tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
            save_artefact(Path(folder) / "a.safetensors", header, tensors)
            versions.append(registry.publish(Path(folder) / "a.safetensors"))
    return versions


async def cold_loads(registry: Registry, backend: EmbeddedBackend, versions: list[Version]) -> list[float]:
    """Return the seconds of each first load; every version is unloaded again."""
    residents, taken = Residents(backend, registry.path), []
    for version in versions:
        started = time.perf_counter()
        lease = await residents.acquire(version)
        taken.append(time.perf_counter() - started)
        lease.release()
        await backend.unload(version.sha256)
    return taken


async def resolves(registry: Registry, name: str, count: int) -> list[float]:
    """Return the seconds of resolving a known name."""
    names, taken = Names(registry, "base", ttl_s=60.0), []
    await names.resolve(name)
    for _ in range(count):
        started = time.perf_counter()
        await names.resolve(name)
        taken.append(time.perf_counter() - started)
    return taken


def ms(seconds: list[float]) -> dict[str, float]:
    """Return median, p99 and largest in milliseconds."""
    ordered = sorted(1e3 * value for value in seconds)
    return {
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "max": ordered[-1],
    }


async def measure(registry: Registry, backend: EmbeddedBackend, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all parts."""
    result: dict[str, Any] = {"cold_load_ms": {}}
    for method in METHODS:
        versions = publish(registry, backend.engine.base, method, args.bytes, args.count)
        taken = await cold_loads(registry, backend, versions)
        entry = {"file_bytes": versions[0].num_bytes, "vectors": versions[0].num_vectors}
        result["cold_load_ms"][method] = entry | ms(taken[1:])  # the first also imports
    result["resolve_cached_ms"] = ms(await resolves(registry, "kv", 2000))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(BENCH.parent / "src" / "foreword" / "demo" / "base-3m"))
    parser.add_argument("--bytes", type=int, default=10**6)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, Registry.open(home) as registry:
        engine = Engine(load_base(args.base), kv_memory="256MiB")
        engine.start()
        backend = EmbeddedBackend(engine)

        async def run() -> dict[str, Any]:
            try:
                return await measure(registry, backend, args)
            finally:
                await backend.aclose()

        result = {"hardware": describe("sqlalchemy"), **asyncio.run(run())}
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
