"""Training step against PEFT, and a joint pass against one task: time, memory, equality, and how near the limit.

python bench/training.py [--json FILE] [--rounds 5]

All figures are ratios within this run: the two ways take turns, round by round, and the medians are compared.
FLOPs are counted by a formula (`flops`), the peak is this machine's best product of that size in the same run, and
utilisation is their ratio. Peak memory is measured in a process of its own for each way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hardware import describe
from transformers import AutoModelForCausalLM, LlamaConfig

from foreword.core.block import Block
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt, Vectors
from foreword.train.data import Example
from foreword.train.loss import Batch, step_gradients
from foreword.train.tuners import Tuner

ROWS, TOKENS, TARGETS, LAYERS = 8, 128, 16, 8
Step = Callable[[], tuple[float, torch.Tensor]]
SHAPE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1376,
    "max_position_embeddings": 1024,
}


def llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()


def rows(count: int = ROWS, seed: int = 1) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 32_000, (count, TOKENS), generator=generator).tolist()
    return [Example(row, TARGETS) for row in ids]


def start(num: int) -> torch.Tensor:
    return torch.randn(num, 512, generator=torch.Generator().manual_seed(2)) * 0.02


def start_kv(num: int) -> torch.Tensor:
    """PEFT's prefix table [P, L * 2 * D], each position's keys and values of all layers."""
    return torch.randn(num, LAYERS * 2 * 512, generator=torch.Generator().manual_seed(2)) * 0.02


def vectors(method: str, num: int) -> Vectors:
    if method == "prompt":
        return SoftPrompt(start(num), Block((num,)))
    if method == "prefix":
        return SoftPrefix(start(num).expand(LAYERS, -1, -1).clone(), Block((num,)))
    parts = start_kv(num).view(num, LAYERS * 2, 8, 64).permute(1, 2, 0, 3)
    return SoftKV(tuple(parts[0::2]), tuple(parts[1::2]), Block((num,)))


def ours(method: str, num: int) -> Step:
    base = FrozenModel(llama())
    tuner = Tuner(vectors(method, num), Block((num,)))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-3)
    data = rows()

    def step() -> tuple[float, torch.Tensor]:
        optimizer.zero_grad()
        loss = step_gradients(base, [Batch(tuner, data)])[0]
        theta = next(p for p in tuner.parameters())
        gradient = theta.grad / tuner.scale
        optimizer.step()
        return loss, gradient

    return step


def peft(method: str, num: int) -> Step:
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    kind = PromptTuningConfig if method == "prompt" else PrefixTuningConfig
    model = get_peft_model(llama(), kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num))
    weight = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        weight.copy_(start(num) if method == "prompt" else start_kv(num))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    ids = torch.tensor([row.ids for row in rows()])
    labels = ids.clone()
    labels[:, :-TARGETS] = -100
    mask = torch.ones_like(ids)

    def step() -> tuple[float, torch.Tensor]:
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        gradient = weight.grad.clone()
        optimizer.step()
        return loss.item(), gradient

    return step


def flops(way: str, method: str, num: int) -> float:
    """Floating point operations of a step that its matrix products need: two a product and token forward, two back.

    Ours: text without its last tokens; the last layer beyond keys and values, and the head, at targets only; a
    hidden-state prefix passes key and value projections only. PEFT: every row with its own prompt, logits everywhere.
    Attention: the visible pairs, 2 products forward and 4 back. No gradient into the text's embeddings, but for PEFT's
    prompt, whose embeddings are one tensor with the vectors.
    """
    width, inner, heads = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"] * SHAPE["hidden_size"]
    kv, query, rest = 2 * width**2, width**2, width**2 + 3 * width * inner
    whole, targets = kv + query + rest, ROWS * TARGETS
    if way == "peft":
        length = TOKENS + (num if method == "prompt" else 0)
        tokens, front = ROWS * length, 0 if method == "prompt" else num
        body = 4 * tokens * whole * LAYERS - (0 if method == "prompt" else 2 * tokens * (kv + query))
        pairs = ROWS * (length * front + length * (length + 1) / 2)
        return body + 4 * tokens * heads + 12 * LAYERS * pairs * width
    length = TOKENS - 1
    tokens = ROWS * length
    body = 4 * tokens * (whole * (LAYERS - 1) + kv) + 4 * targets * (query + rest) - 2 * tokens * (kv + query)
    block = {"prompt": 4 * num * (whole * (LAYERS - 1) + kv), "prefix": 4 * num * kv * LAYERS, "kv": 0}[method]
    pairs = ROWS * (length * num + length * (length + 1) / 2) + (num * (num + 1) / 2 if method == "prompt" else 0)
    return body + block + 4 * targets * heads + 12 * LAYERS * pairs * width


def race(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return wall seconds and CPU seconds of every round; the ways take turns."""
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in ways}
    for turn in range(rounds + 1):
        for name, step in ways.items():
            begin, spent = time.perf_counter(), time.process_time()
            step()
            if turn:  # the first round warms up
                times[name]["wall"].append(time.perf_counter() - begin)
                times[name]["cpu"].append(time.process_time() - spent)
    return times


def peak() -> float:
    """FLOP per second of CPU time of the best of several products of this step's size."""
    a, b = torch.randn(1024, 512), torch.randn(1376, 512)
    best = 0.0
    for _ in range(20):
        begin = time.process_time()
        for _ in range(4):
            torch.nn.functional.linear(a, b)
        best = max(best, 4 * 2 * 1024 * 512 * 1376 / (time.process_time() - begin))
    return best


def compare_step(method: str, num: int, rounds: int) -> dict[str, Any]:
    kind = "prompt" if method == "prompt" else "prefix"
    ways = {"foreword": ours(method, num), "peft": peft(kind, num)}
    (loss, gradient), (peer_loss, peer_gradient) = (step() for step in ways.values())
    fastest = peak()
    times = race(ways, rounds)
    fastest = max(fastest, peak())
    medians = {
        clock: {name: statistics.median(taken[clock]) for name, taken in times.items()} for clock in ("wall", "cpu")
    }
    memory = {name: memory_of(name, method if name == "foreword" else kind, num) for name in ways}
    counted = {"foreword": flops("foreword", method, num), "peft": flops("peft", kind, num)}
    same = {}
    if method != "prefix":  # PEFT has no hidden-state form to compare values with
        same = {
            "loss_relative_difference": abs(loss - peer_loss) / abs(peer_loss),
            "gradient_relative_difference": float((gradient - peer_gradient).norm() / peer_gradient.norm()),
        }
    return {
        "method": method,
        "peer": f"PEFT {kind}",
        "P": num,
        "time_ratio": medians["wall"]["foreword"] / medians["wall"]["peft"],
        "cpu_time_ratio": medians["cpu"]["foreword"] / medians["cpu"]["peft"],
        "flops_ratio": counted["foreword"] / counted["peft"],
        "flops": counted,
        "peak_flops_per_cpu_second": fastest,
        "utilisation": {name: counted[name] / medians["cpu"][name] / fastest for name in ways},
        "seconds": times,
        "memory_ratio": memory["foreword"] / memory["peft"],
        "peak_mib_over_model": memory,
        **same,
    }


def memory_of(name: str, method: str, num: int) -> float:
    command = [sys.executable, __file__, "--memory", name, method, str(num)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_memory(name: str, method: str, num: int) -> float:
    """MiB of peak resident memory over what is resident before the first step (Linux)."""
    step = {"foreword": ours, "peft": peft}[name](method, num)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    for _ in range(3):
        step()
    return (status("VmHWM") - before) / 1024


def status(field: str) -> int:
    """KiB that /proc/self/status names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def joint(rounds: int) -> dict[str, Any]:
    """Twelve tasks in one pass against one task with the same rows per batch: text tokens per second."""
    base = FrozenModel(llama())
    generator = torch.Generator().manual_seed(3)

    def ragged(count: int, seed: int) -> list[Example]:
        lengths = torch.randint(32, TOKENS, (count,), generator=generator).tolist()
        return [Example(row.ids[:n], TARGETS) for row, n in zip(rows(count, seed), lengths, strict=True)]

    tuners = [Tuner(SoftPrompt(start(20), Block((20,))), Block((20,))) for _ in range(12)]
    data = [ragged(4, seed) for seed in range(12)]
    everything = [row for part in data for row in part]
    ways = {
        "one task": lambda: step_gradients(base, [Batch(tuners[0], everything)]),
        "twelve tasks": lambda: step_gradients(base, [Batch(t, part) for t, part in zip(tuners, data, strict=True)]),
    }
    times = race(ways, rounds)
    medians = {name: statistics.median(taken["wall"]) for name, taken in times.items()}
    return {"throughput_ratio": medians["one task"] / medians["twelve tasks"], "rows": 48, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", default="prompt,kv,prefix")
    parser.add_argument("--memory", nargs=3, metavar=("WAY", "METHOD", "P"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(measure_memory(*options.memory[:2], int(options.memory[2])))
        return
    result: dict[str, Any] = {
        "what": "training step, Llama shape 8 x 512, float32, 8 rows x 128 tokens, 16 target tokens",
        "hardware": describe("peft"),
        "note": "ways take turns, so ratios hold on a machine that others use too; absolute seconds do not",
        "steps": [],
    }
    for method in options.methods.split(","):
        for num in (20, 100):
            result["steps"].append(compare_step(method, num, options.rounds))
            save(result, options.json)
    result["joint"] = joint(options.rounds)
    save(result, options.json)
    print(json.dumps(result, indent=2))


def save(result: dict[str, Any], path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
