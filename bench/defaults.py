"""How the defaults of training were found: learning rates, optimizer averages, starts and encoders on real tasks.

python bench/defaults.py --base ../shared/models/base-3m [--json bench/results/defaults.json]

Each line trains one setting for a hundred steps or more with everything else at its default; all settings of a task are
runs of one joint pass. The measure is dev loss, and exact match of free generation on dev rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hardware import describe

import foreword as fw
from foreword.cli.train_command import progress_printer
from foreword.train import state

EXAMPLES = Path(__file__).parents[1] / "examples" / "twelve_tasks"
GRID: list[dict[str, Any]] = [
    *({"method": "kv", "lr": lr} for lr in (0.03, 0.1, 0.3)),
    *({"method": "prefix", "lr": lr} for lr in (0.07, 0.2, 0.6)),
    *({"method": "prompt", "lr": lr} for lr in (0.3, 1.0, 3.0)),
    {"method": "kv", "init": "random"},
    {"method": "kv", "init": "vocab"},
    {"method": "kv", "encoder": "residual"},
    {"method": "kv", "schedule": "constant"},
    {"method": "kv", "num_vectors": 40},
    {"method": "prompt", "init": "random"},
    {"method": "prompt", "encoder": "residual"},
    {"method": "prompt", "encoder": "mlp"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--tasks", default="trec,bitext_support_triage")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = fw.load_base(options.base)
    found: list[dict[str, Any]] = []
    for betas in ((0.9, 0.999), state.BETAS):
        state.BETAS = betas
        grid = GRID if betas == (0.7, 0.9) else [{"method": method} for method in ("kv", "prefix", "prompt")]
        for task in options.tasks.split(","):
            found += measure(base, task, grid, options.steps, options.rows, betas)
            result = {
                "what": f"training defaults on {Path(options.base).name}, {options.steps} steps, batch 16, P = 20",
                "hardware": describe(),
                "rows": found,
            }
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    base: fw.FrozenModel, task: str, grid: list[dict[str, Any]], steps: int, rows: int, betas: tuple[float, float]
) -> list[dict[str, Any]]:
    path = EXAMPLES / f"{task}.toml"
    runs = [
        fw.Run.from_toml(path, name=f"{index}", steps=steps, batch_size=16, **settings)
        for index, settings in enumerate(grid)
    ]
    with tempfile.TemporaryDirectory() as folder:
        results = fw.fit(base, runs, out=folder, on_progress=progress_printer(30))
        engine = fw.Engine(base, kv_memory="512MiB", max_batch=96)
        found = []
        for run, result, settings in zip(runs, results, grid, strict=True):
            engine.add_prefix(run.name, fw.compile(base, fw.load_artefact(result.artefact)))
            report = fw.evaluate(engine, run.task, prefix=run.name, split="dev", limit=rows, decoding="free")
            engine.remove_prefix(run.name)
            row = {"task": task, **settings, "betas": betas, "dev_loss": result.best["value"], "score": report.score}
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


if __name__ == "__main__":
    main()
