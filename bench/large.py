"""One training step of a 32.8B base on one GPU: ours beside PEFT, against the limit of its matrix products.

python bench/large.py [--json bench/results/large.json] [--shape qwen3-32b] [--device cuda]
python bench/large.py --shape tiny --device cpu        # the same path in a minute, to see that it runs

Random weights are built on the device; 8 rows x 256 tokens, 32 of them targets. Ways take turns, round by round; the
limit is 4 N FLOPs a token (N the parameters of the layers) at the best product measured in the same run. Each figure
is written as soon as it is known, and those in the file are not measured again. `--joint` runs another script (a sweep,
twelve tasks) at the end and keeps what it prints.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hardware import describe
from transformers import AutoModelForCausalLM, Qwen3Config

from foreword.core.block import Block
from foreword.core.init import initial_vectors
from foreword.core.model import FrozenModel
from foreword.train.data import Example
from foreword.train.loss import Batch, step_gradients
from foreword.train.strategy import Strategy, choose_strategy
from foreword.train.tuners import Tuner

SHAPES: dict[str, dict[str, int]] = {
    "qwen3-32b": {
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 25_600,
        "vocab_size": 151_936,
    },
    "tiny": {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 160,
        "vocab_size": 512,
    },
}
BATCHES = {"qwen3-32b": (8, 256, 32), "tiny": (3, 24, 4)}
"""Rows, tokens of a row, targets among them."""
PEERS = {"prompt": "prompt", "prefix": "prefix", "kv": "prefix"}
Step = Callable[[], float]


def build(shape: str, device: torch.device) -> FrozenModel:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**SHAPES[shape], max_position_embeddings=4096), dtype=dtype
        )
    return FrozenModel(model.eval())


def rows(base: FrozenModel) -> list[Example]:
    shape = next(name for name, numbers in SHAPES.items() if numbers["vocab_size"] == base.spec.vocab_size)
    count, tokens, targets = BATCHES[shape]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, base.spec.vocab_size, (count, tokens), generator=generator)
    return [Example(row, targets) for row in ids.tolist()]


def ours(base: FrozenModel, method: str, num: int, strategy: Strategy) -> Step:
    block = Block((num,))
    tuner = Tuner(initial_vectors(base, method, block, "random", seed=0), block).to(base.device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-3)
    data = rows(base)

    def step() -> float:
        optimizer.zero_grad()
        loss = step_gradients(base, [Batch(tuner, data)], strategy=strategy)[0]
        optimizer.step()
        return loss

    return step


def peft(base: FrozenModel, method: str, num: int) -> Step:
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    kind = PromptTuningConfig if PEERS[method] == "prompt" else PrefixTuningConfig
    model = get_peft_model(base.model, kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    data = rows(base)
    ids = torch.tensor([row.ids for row in data], device=base.device)
    labels = ids.clone()
    labels[:, : -data[0].num_targets] = -100
    mask = torch.ones_like(ids)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def timed(step: Step, device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device) -> float:
    """FLOP per second of the best of 20 square products."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [timed(lambda: float((a @ b)[0, 0]), device) for _ in range(20)]
    return 2 * size**3 / min(times)


def memory(step: Step, device: torch.device) -> float | None:
    """GiB over what lies there before the step."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(base: FrozenModel, method: str, num: int, ways: dict[str, Strategy], rounds: int, best: float) -> Any:
    device = base.device
    steps: dict[str, Step] = {name: ours(base, method, num, strategy) for name, strategy in ways.items()}
    steps["peft"] = peft(base, method, num)
    tokens = sum(len(row.ids) for row in rows(base)) + (0 if method == "kv" else num)
    layers = sum(p.numel() for layer in base.layers for p in layer.parameters())
    limit = 4 * layers * tokens / best
    found: dict[str, Any] = {"method": method, "P": num, "tokens": tokens, "limit_ms": limit * 1e3, "ways": {}}
    alive: dict[str, Step] = {}
    for name, step in steps.items():
        try:
            first = timed(step, device)
            warm = [timed(step, device) for _ in range(2)]
            found["ways"][name] = {"first_step_s": first, "warm_s": warm, "memory_gib": memory(step, device)}
            alive[name] = step
        except (RuntimeError, ValueError) as error:  # a way that fails is a result, and the others go on
            found["ways"][name] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(rounds):
        for name, step in alive.items():
            times[name].append(timed(step, device))
    for name, taken in times.items():
        median = statistics.median(taken)
        found["ways"][name] |= {"ms": median * 1e3, "over_limit": median / limit, "all_ms": [t * 1e3 for t in taken]}
    return found


def kernels(step: Step, device: torch.device) -> list[dict[str, Any]]:
    """What the time of a step goes to: the twenty costliest kernels."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    step()
    with profile(activities=activities) as seen:
        step()
        synchronise(device)
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, field))[:20]
    return [{"kernel": e.key[:120], "calls": e.count, "ms": getattr(e, field) / 1e3} for e in events]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-32b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--joint", action="append", default=[], help="A command whose output is kept too.")
    options = parser.parse_args()
    device = torch.device(options.device)
    result: dict[str, Any] = {"steps": [], "joint": {}}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
    best = peak(device)
    result |= {
        "what": "one step, {}, {} rows x {} tokens, {} targets, random weights".format(
            options.shape, *BATCHES[options.shape]
        ),
        "shape": SHAPES[options.shape],
        "hardware": describe("peft"),
        "matmul_tflops": best / 1e12,
    }
    done = {(row["method"], row["P"]) for row in result["steps"]}
    base = build(options.shape, device)
    plain = choose_strategy(base, "packed", compiled=False)
    fast = choose_strategy(base, "packed", compiled=True)
    for number, (method, num) in enumerate(
        [("prompt", 20), ("prefix", 20), ("kv", 20), ("prompt", 100), ("prefix", 100), ("kv", 100)]
    ):
        if (method, num) in done:
            continue
        ways = {"packed, compiled": fast}
        if number == 0:  # what each part is worth
            ways |= {"packed": plain, "padded": Strategy()}
        result["steps"].append(measure(base, method, num, ways, options.rounds, best))
        save(result, options.json)
    if "kernels" not in result:
        result["kernels"] = kernels(ours(base, "prompt", 20, fast), device)
        result["graphs"] = dict(torch._dynamo.utils.counters["stats"])
        save(result, options.json)
    del base
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for command in options.joint:
        ran = subprocess.run(shlex.split(command), capture_output=True, text=True)
        result["joint"][command] = {"code": ran.returncode, "out": ran.stdout[-20_000:], "err": ran.stderr[-2000:]}
        save(result, options.json)
    print(json.dumps(result, indent=2))


def save(result: dict[str, Any], path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
