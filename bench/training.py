"""Training step against PEFT, and a joint pass against one task: time, peak memory, equality of loss and gradient.

python bench/training.py [--json FILE] [--rounds 5]

All figures are ratios within this run: the two ways take turns, round by round, and the medians are compared.
Peak memory is measured in a process of its own for each way.
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
from foreword.core.prompt import SoftPrompt
from foreword.train.data import Example
from foreword.train.loss import Batch, step_gradients
from foreword.train.tuners import Tuner

ROWS, TOKENS, TARGETS = 8, 128, 16
SHAPE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "num_hidden_layers": 8,
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


def ours(num: int) -> Callable[[], tuple[float, torch.Tensor]]:
    base = FrozenModel(llama())
    tuner = Tuner(SoftPrompt(start(num), Block((num,))), Block((num,)))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-3)
    data = rows()

    def step() -> tuple[float, torch.Tensor]:
        optimizer.zero_grad()
        loss = step_gradients(base, [Batch(tuner, data)])[0]
        theta = tuner.encoder.theta
        gradient = theta.grad / tuner.scale
        optimizer.step()
        return loss, gradient

    return step


def peft(num: int) -> Callable[[], tuple[float, torch.Tensor]]:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    model = get_peft_model(llama(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num))
    weight = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        weight.copy_(start(num))
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


def race(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, step in ways.items():
            begin = time.perf_counter()
            step()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - begin)
    return times


def compare_step(num: int, rounds: int) -> dict[str, Any]:
    ways = {"foreword": ours(num), "peft": peft(num)}
    (loss, gradient), (peer_loss, peer_gradient) = (step() for step in ways.values())
    times = race(ways, rounds)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    memory = {name: memory_of(name, num) for name in ways}
    return {
        "P": num,
        "time_ratio": medians["foreword"] / medians["peft"],
        "seconds": times,
        "memory_ratio": memory["foreword"] / memory["peft"],
        "peak_mib_over_model": memory,
        "loss_relative_difference": abs(loss - peer_loss) / abs(peer_loss),
        "gradient_relative_difference": float((gradient - peer_gradient).norm() / peer_gradient.norm()),
    }


def memory_of(name: str, num: int) -> float:
    command = [sys.executable, __file__, "--memory", name, str(num)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_memory(name: str, num: int) -> float:
    """MiB of peak resident memory over what is resident before the first step (Linux)."""
    step = {"foreword": ours, "peft": peft}[name](num)
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
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {"throughput_ratio": medians["one task"] / medians["twelve tasks"], "rows": 48, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs=2, metavar=("WAY", "P"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(measure_memory(options.memory[0], int(options.memory[1])))
        return
    result = {
        "what": "training step, Llama shape 8 x 512, float32, 8 rows x 128 tokens, 16 target tokens",
        "hardware": describe("peft"),
        "steps": [compare_step(num, options.rounds) for num in (20, 100)],
        "joint": joint(options.rounds),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
