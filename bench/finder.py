"""Does the learning-rate finder choose what a grid would? Both on the shared tasks, with the displacement.

python bench/finder.py --base ../shared/models/base-3m [--json bench/results/finder.json]

For each task and method: `find_lr` (24 steps at each of ten rates), then a grid of six rates around the default, 60
steps each with the usual schedule, all in one joint pass, judged by dev loss. Finished rows of the JSON are kept, so a
killed measurement goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from hardware import describe

import foreword as fw
from foreword.cli.train_command import progress_printer
from foreword.recipes.finder import find_lr

EXAMPLES = Path(__file__).parents[1] / "examples" / "twelve_tasks"
CASES = "trec:kv,trec:prompt,sst2:kv,bitext_support_triage:kv"
FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--cases", default=CASES, help="task:method, comma-separated")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = fw.load_base(options.base)
    rows: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    for case in options.cases.split(","):
        task, method = case.split(":")
        if not any((row["task"], row["method"]) == (task, method) for row in rows):
            rows.append(measure(base, task, method, options.steps, options.batch_size))
            print(json.dumps(rows[-1]), flush=True)
        if options.json:
            what = f"learning-rate finder against a grid, {Path(options.base).name}, {options.steps} steps of "
            what += f"{options.batch_size} rows, P = 20"
            data = {"what": what, "hardware": describe(), "rows": rows}
            options.json.write_text(json.dumps(data, indent=1) + "\n")


def measure(base: fw.FrozenModel, task: str, method: str, steps: int, batch_size: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"method": method, "batch_size": batch_size, "steps": steps, "max_train_rows": 1000}
    settings |= {"eval_every": steps // 2, "eval_rows": 64}
    run = fw.Run.from_toml(EXAMPLES / f"{task}.toml", **settings)
    started = time.process_time()
    finding = find_lr(base, run)
    seconds = time.process_time() - started
    rates = sorted({float(f"{run.lr * factor:.3g}") for factor in FACTORS} | {finding.lr})
    runs = [fw.Run.from_toml(EXAMPLES / f"{task}.toml", name=f"lr{rate}", lr=rate, **settings) for rate in rates]
    with tempfile.TemporaryDirectory() as folder:
        results = fw.fit(base, runs, out=folder, on_progress=progress_printer(30))
    losses = {rate: result.best["value"] for rate, result in zip(rates, results, strict=True)}
    best = min(losses, key=lambda rate: losses[rate])
    return {
        "task": task,
        "method": method,
        "found_lr": finding.lr,
        "displacement": finding.best.displacement,
        "found_loss": losses[finding.lr],
        "default_lr": run.lr,
        "default_loss": losses[run.lr],
        "grid_lr": best,
        "grid_loss": losses[best],
        "losses": {str(rate): loss for rate, loss in losses.items()},
        "finder_cpu_seconds": seconds,
        "trials": [
            {"lr": t.lr, "displacement": t.displacement, "losses": t.losses, "stable": t.is_stable}
            for t in finding.trials
        ],
    }


if __name__ == "__main__":
    main()
