"""A sweep of 16 settings, and twelve tasks, each in one joint pass against one run: time of a step, scores, memory.

python bench/joint.py --base ../shared/models/base-3m [--json bench/results/joint.json]
python bench/joint.py --base ../shared/models/base-30m --device cuda --steps 400 --batch-size 32 --rows 4000 \
    --json bench/results/joint_h200.json

Three measurements: (1) a step of one run, of 16 settings of the same task, and of twelve tasks; the median of several
steps, of the processor's time on a CPU (other programs do not count), of the wall's on a GPU; (2) whether each of the
twelve has alone the dev loss that it has beside the others; (3) with `--memory`, the peak of a joint fit's memory over
the loaded base against the plan that `foreword sweep` makes before it starts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hardware import describe

import foreword as fw
from foreword.recipes.memory import Meter
from foreword.train.loss import MICRO_TOKENS

EXAMPLES = Path(__file__).parents[1] / "examples" / "twelve_tasks"
RATES = [0.01 * 1.3**place for place in range(16)]


def main() -> None:
    options = arguments()
    if options.peak:
        print(json.dumps(peak(options)))
        return
    base = fw.load_base(options.base, device=options.device)
    found: dict[str, Any] = {}
    for method in options.methods.split(","):
        found[method] = measure(base, options, method)
        print(json.dumps({method: {key: found[method][key] for key in ("ratios", "largest_difference")}}), flush=True)
        if options.memory:
            found[method]["memory"] = [memory(options, method, count) for count in (1, 4, 16)]
            print(json.dumps(found[method]["memory"]), flush=True)
        if options.json:
            what = f"joint steps on {Path(options.base).name}, {options.batch_size} rows a run, P = 20"
            data = {"what": what, "clock": clock_name(options), "hardware": describe(), "methods": found}
            options.json.write_text(json.dumps(data, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default="kv,prompt")
    parser.add_argument("--task", default="trec", help="of the sweep")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=200, help="training rows of a task at most")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(base: fw.FrozenModel, options: argparse.Namespace, method: str) -> dict[str, Any]:
    tasks = sorted(path.stem for path in EXAMPLES.glob("*.toml"))
    one = [make(options, method, options.task)]
    sweep = [make(options, method, options.task, lr=rate, name=f"lr{place}") for place, rate in enumerate(RATES)]
    twelve = [make(options, method, task) for task in tasks]
    alone = [step_time(base, [run], options) for run in twelve]
    joint_s, joint = step_time(base, twelve, options)
    one_s, _ = step_time(base, one, options)
    sweep_s, _ = step_time(base, sweep, options)
    pairs = [(losses[0], beside) for (_, losses), beside in zip(alone, joint, strict=True)]
    return {
        "step_seconds": {
            "one run": one_s,
            "sweep of 16": sweep_s,
            "twelve tasks": joint_s,
            "each of twelve alone": dict(zip(tasks, (seconds for seconds, _ in alone), strict=True)),
        },
        "ratios": {
            "sweep of 16 to one run": sweep_s / one_s,
            "twelve tasks to their mean alone": joint_s / (sum(seconds for seconds, _ in alone) / len(alone)),
            "twelve tasks to their sum alone": joint_s / sum(seconds for seconds, _ in alone),
        },
        "dev_losses": {task: {"alone": a, "joint": b} for task, (a, b) in zip(tasks, pairs, strict=True)},
        "largest_difference": max(abs(a - b) / a for a, b in pairs),
    }


def make(options: argparse.Namespace, method: str, task: str, name: str | None = None, **settings: Any) -> fw.Run:
    common = {
        "method": method, "steps": options.steps, "batch_size": options.batch_size, "eval_every": options.steps,
        "eval_rows": 32, "max_train_rows": options.rows,
    }  # fmt: skip
    return fw.Run.from_toml(EXAMPLES / f"{task}.toml", name=name or task, **common, **settings)


def step_time(base: fw.FrozenModel, runs: Sequence[fw.Run], options: argparse.Namespace) -> tuple[float, list[float]]:
    """Return the median seconds of a step (the first two and the last, which is judged, left out) and dev losses."""
    now, marks = clock(options), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        results = fw.fit(base, runs, out=folder, on_progress=lambda progress: marks.append(now()), reports=False)
    steps = [after - before for before, after in itertools.pairwise(marks[1:-1])]
    return median(steps), [result.best["value"] for result in results]


def clock(options: argparse.Namespace) -> Callable[[], float]:
    if options.device == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall


def clock_name(options: argparse.Namespace) -> str:
    return "processor seconds" if options.device == "cpu" else "wall seconds"


def memory(options: argparse.Namespace, method: str, count: int) -> dict[str, Any]:
    """Measure the peak of `count` runs in a process of their own."""
    asked = [*sys.argv[1:]]
    for name in ("--json", "--methods"):
        if name in asked:
            place = asked.index(name)
            del asked[place : place + 2]
    asked = [part for part in asked if part != "--memory"]
    command = [sys.executable, __file__, *asked, "--methods", method, "--peak", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def peak(options: argparse.Namespace) -> dict[str, Any]:
    """Return bytes planned and bytes that a fit took over the loaded base."""
    base = fw.load_base(options.base, device=options.device)
    runs = [
        make(options, options.methods, options.task, name=f"lr{place}", lr=rate)
        for place, rate in enumerate(RATES[: options.peak])
    ]
    with tempfile.TemporaryDirectory() as folder:
        reset_peak(options)
        before = used(options)
        fw.fit(base, runs, out=folder, reports=False)
        taken = peak_used(options) - before
    planned = Meter(base, runs).need(len(runs), MICRO_TOKENS).total  # afterwards: its own measurement takes memory
    return {"runs": options.peak, "planned_bytes": planned, "taken_bytes": taken, "planned_to_taken": planned / taken}


def reset_peak(options: argparse.Namespace) -> None:
    if options.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts again
    else:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def used(options: argparse.Namespace) -> int:
    return status("VmRSS") if options.device == "cpu" else torch.cuda.memory_allocated()


def peak_used(options: argparse.Namespace) -> int:
    return status("VmHWM") if options.device == "cpu" else torch.cuda.max_memory_reserved()


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
