"""Times of the embedded engine on this machine, against transformers' own generate and PEFT.

python bench/engine.py --json engine.json            # all parts
python bench/engine.py twelve_tasks --repeats 7      # one part

Every ratio is between numbers of one run, taken in turns, so that a busy machine slows both sides alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from hardware import describe

from foreword.core.compile import compile as compile_vectors
from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix, SoftKV, SoftPrefix, SoftPrompt, Vectors
from foreword.engine.engine import Engine
from foreword.engine.request import Request

VOCAB = 32_000
METHODS = ("prompt", "prefix", "kv")


def make_base(args: argparse.Namespace) -> FrozenModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(args.seed)
    return FrozenModel(transformers.AutoModelForCausalLM.from_config(config))


def make_vectors(base: FrozenModel, method: str, num: int, seed: int) -> Vectors:
    generator = torch.Generator().manual_seed(seed)
    spec = base.spec
    if method == "prompt":
        return SoftPrompt(torch.randn(num, spec.embed_size, generator=generator) * 0.02)
    if method == "prefix":
        return SoftPrefix(torch.randn(spec.num_layers, num, spec.hidden_size, generator=generator) * 0.02)
    shapes = [(layer.num_kv_heads, num, layer.head_dim) for layer in spec.layers]
    return SoftKV(*(tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(2)))


def make_prefix(base: FrozenModel, index: int, num: int) -> KVPrefix:
    return compile_vectors(base, make_vectors(base, METHODS[index % 3], num, seed=index), name=f"task-{index}")


def random_ids(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count, length), generator=generator).tolist()


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and processor seconds."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Run the sides in turns after one warm-up each; return each one's median and best wall and processor seconds."""
    for work in sides.values():
        work()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            seconds[name].append(timed(work))
    found = {}
    for name, pairs in seconds.items():
        wall, cpu = zip(*pairs, strict=True)
        found[name] = {"median_s": statistics.median(wall), "best_s": min(wall), "cpu_s": statistics.median(cpu)}
    return found


def ratios(found: dict[str, dict[str, float]], of: str, to: str) -> dict[str, float]:
    return {kind[:-2]: round(found[of][kind] / found[to][kind], 3) for kind in found[of]}


def twelve_tasks(base: FrozenModel, args: argparse.Namespace) -> dict[str, Any]:
    """Twelve requests behind twelve prefixes against twelve plain rows through transformers' generate."""
    engine = Engine(base, kv_memory=args.kv_memory)
    rows = random_ids(12, args.prompt, seed=1)
    for index in range(12):
        engine.add_prefix(f"task-{index}", make_prefix(base, index, args.vectors))
    options = {"max_tokens": args.new, "ignore_eos": True}
    mixed = [Request(prompt_ids=row, prefix=f"task-{index}", **options) for index, row in enumerate(rows)]
    plain = [Request(prompt_ids=row, **options) for row in rows]
    sides: dict[str, Callable[[], Any]] = {
        "engine_12_prefixes": lambda: engine.generate(mixed),
        "engine_12_plain": lambda: engine.generate(plain),
        "transformers_12_plain": lambda: transformers_generate(base.model, rows, args.new),
    }
    if peft := None if args.without_peft else peft_generate(base, rows, args):
        sides["peft_one_task_at_a_time"] = peft
    found = compare(sides, args.repeats)
    return {
        "seconds": found,
        "prefixes_to_transformers_plain": ratios(found, "engine_12_prefixes", "transformers_12_plain"),
        "target": "at most 1.10",
        "prefixes_to_engine_plain": ratios(found, "engine_12_prefixes", "engine_12_plain"),
        **({"peft_to_engine": ratios(found, "peft_one_task_at_a_time", "engine_12_prefixes")} if peft else {}),
    }


def transformers_generate(model: Any, rows: list[list[int]], num_new: int) -> None:
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)


def peft_generate(base: FrozenModel, rows: list[list[int]], args: argparse.Namespace) -> Callable[[], Any] | None:
    """Return PEFT's way through the same work: one prompt-tuning adapter active at a time."""
    try:
        import peft
    except ImportError:
        return None
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.vectors)
    model = peft.get_peft_model(base.model, config, adapter_name="task-0").eval()
    for index in range(1, 12):
        model.add_adapter(f"task-{index}", config)

    def work() -> None:
        for index, row in enumerate(rows):
            model.set_adapter(f"task-{index}")
            transformers_generate_one(model, row, args.new)

    return work


def transformers_generate_one(model: Any, row: list[int], num_new: int) -> None:
    ids = torch.tensor([row])
    mask = torch.ones_like(ids)
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)


def arriving(base: FrozenModel, args: argparse.Namespace) -> dict[str, Any]:
    """32 requests of mixed tasks and lengths, arriving over time, against 32 plain ones in the same way."""
    engine = Engine(base, kv_memory=args.kv_memory)
    for index in range(12):
        engine.add_prefix(f"task-{index}", make_prefix(base, index, args.vectors))
    generator = torch.Generator().manual_seed(5)
    prompt_lens = torch.randint(8, 64, (32,), generator=generator).tolist()
    new_lens = torch.randint(16, 48, (32,), generator=generator).tolist()
    rows = [random_ids(1, length, seed=index)[0] for index, length in enumerate(prompt_lens)]

    def requests(is_mixed: bool) -> list[Request]:
        return [
            Request(
                prompt_ids=row,
                prefix=f"task-{index % 12}" if is_mixed and index % 4 else None,
                max_tokens=count,
                ignore_eos=True,
            )
            for index, (row, count) in enumerate(zip(rows, new_lens, strict=True))
        ]

    with engine:
        sides = {
            "mixed": lambda: arrive(engine, requests(True), args.every_s),
            "plain": lambda: arrive(engine, requests(False), args.every_s),
        }
        found = compare(sides, args.repeats)
    total = sum(new_lens)
    return {
        "seconds": found,
        "tokens_per_s": {name: round(total / side["median_s"], 1) for name, side in found.items()},
        "mixed_to_plain_tokens_per_s": ratios(found, "plain", "mixed"),
        "target": "at least 0.90",
    }


def arrive(engine: Engine, requests: list[Request], every_s: float) -> None:
    """Submit one request every `every_s` seconds and wait for the last to end."""
    import threading

    left, done = [len(requests)], threading.Event()

    def on_chunk(chunk: Any) -> None:
        if chunk.finish_reason is not None:
            left[0] -= 1
            if not left[0]:
                done.set()

    for request in requests:
        engine.submit(request, on_chunk)
        time.sleep(every_s)
    done.wait()


def steady_memory(base: FrozenModel, args: argparse.Namespace) -> dict[str, Any]:
    """Resident memory over 2,000 requests whose prefixes are replaced now and then."""
    engine = Engine(base, kv_memory=args.kv_memory)
    for index in range(12):
        engine.add_prefix(f"task-{index}", make_prefix(base, index, args.vectors))
    generator = torch.Generator().manual_seed(9)
    curve = []
    for start in range(0, args.requests, 100):
        lens = torch.randint(4, 24, (100,), generator=generator).tolist()
        batch = [
            Request(
                prompt_ids=random_ids(1, length, seed=start + index)[0],
                prefix=f"task-{index % 12}" if index % 3 else None,
                max_tokens=1 + length % 6,
                temperature=0.8 if index % 5 == 0 else 0.0,
                seed=index,
            )
            for index, length in enumerate(lens)
        ]
        engine.generate(batch)
        engine.add_prefix(f"task-{start // 100 % 12}", make_prefix(base, start, args.vectors))
        curve.append(round(resident_mib(), 1))
    stats = engine.stats()
    settled = curve[len(curve) // 4 :]
    return {
        "rss_mib_every_100_requests": curve,
        "growth_mib_after_first_quarter": round(settled[-1] - settled[0], 1),
        "blocks_free_plus_prefix": stats.blocks_free + stats.prefix_blocks,
        "blocks_total": stats.blocks_total,
    }


def resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def compile_time(base: FrozenModel, args: argparse.Namespace) -> dict[str, Any]:
    """Loading a version's file and compiling it, against one forward over as many tokens.

    The engine writes the compiled prefix into its pool with the first request.
    """
    from safetensors.torch import load_file, save_file

    num = args.compile_vectors
    positions = torch.arange(num)[None]

    def forward() -> None:
        with torch.no_grad():
            base.model(input_ids=positions + 3, use_cache=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "version.safetensors"
        save_file({k: v.contiguous() for k, v in make_vectors(base, "prompt", num, 0).tensors().items()}, path)
        engine = Engine(base, kv_memory=args.kv_memory)

        def load_and_compile() -> None:
            prefix = compile_vectors(base, SoftPrompt(load_file(path)["prompt"]))
            engine.add_prefix("task", prefix)

        found = compare({"load_and_compile": load_and_compile, "forward": forward}, max(args.repeats, 11))
    return {
        "num_vectors": num,
        "seconds": found,
        "compile_to_forward": ratios(found, "load_and_compile", "forward"),
        "target": "below 3",
    }


PARTS = {
    "twelve_tasks": twelve_tasks,
    "arriving": arriving,
    "steady_memory": steady_memory,
    "compile_time": compile_time,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-peft", action="store_true", help="leave out the slowest side of twelve_tasks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vectors", type=int, default=20, help="positions of each prefix")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens of twelve_tasks")
    parser.add_argument("--new", type=int, default=32, help="new tokens of twelve_tasks")
    parser.add_argument("--every-s", type=float, default=0.02, help="pause between arrivals")
    parser.add_argument("--requests", type=int, default=6000, help="requests of steady_memory")
    parser.add_argument("--compile-vectors", type=int, default=100)
    parser.add_argument("--kv-memory", default="512MiB")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(args.threads)
    base = make_base(args)
    result: dict[str, Any] = {
        "hardware": describe() | {"load_before": os.getloadavg()[0]},
        "shape": f"Llama, width {args.width}, {args.layers} layers, 8 heads, vocabulary {VOCAB}, float32, random",
        "arguments": {name: str(value) for name, value in vars(args).items() if name != "json"},
    }
    for name in args.parts or PARTS:
        result[name] = PARTS[name](base, args)
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
