r"""How the defaults of training were found: optimizers, learning rates, starts, encoders and lengths on real tasks.

python bench/defaults.py --base ../shared/models/base-3m [--json bench/results/defaults.json]
python bench/defaults.py --base ../shared/models/base-3m --batch 32 --seeds 2 --rows 150 \
  --tasks trec,bitext_support_triage,sst2,restaurant8k_slots --settings '[{"method": "prompt", "init": "random"}]'

Every line changes one thing and leaves the rest at its default. The measure is dev loss in nats per target token, and
exact match of free generation on dev rows. Results are written after each line; a second call goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hardware import describe

import foreword as fw
from foreword.train.run import DEFAULTS

EXAMPLES = Path(__file__).parents[1] / "examples" / "twelve_tasks"


def grid() -> list[dict[str, Any]]:
    """Return one changed setting per line, for every method."""
    settings: list[dict[str, Any]] = []
    for method, defaults in DEFAULTS.items():
        settings += [
            {"method": method},
            {"method": method, "optimizer": "adamw"},
            {"method": method, "encoder": "residual"},
            {"method": method, "lr": round(defaults.lr / 3, 4)},
            {"method": method, "lr": round(defaults.lr * 3, 4)},
            {"method": method, "init": "random"},
            {"method": method, "init": "vocab"},
            {"method": method, "num_vectors": 40},
            {"method": method, "schedule": "cosine"},
            {"method": method, "warmup_steps": 5},
        ]
    return settings


def measure(base: fw.FrozenModel, task: str, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    run = fw.Run.from_toml(EXAMPLES / f"{task}.toml", steps=options.steps, batch_size=options.batch, **settings)
    with tempfile.TemporaryDirectory() as folder:
        result = fw.fit(base, [run], out=folder)[0]
        assert result.artefact is not None
        engine = fw.Engine(base, kv_memory="512MiB", max_batch=96)
        engine.add_prefix(task, fw.compile(base, fw.load_artefact(result.artefact)))
    report = fw.evaluate(engine, run.task, prefix=task, split="dev", limit=options.rows, decoding="free")
    return {"dev_loss": result.best["value"], "score": report.score}


def table(rows: list[dict[str, Any]]) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [f"| setting (others at default) | {' | '.join(tasks)} |", "| --- " * (len(tasks) + 1) + "|"]
    for setting in {json.dumps(row["setting"]): row["setting"] for row in rows}.values():
        cells = []
        for task in tasks:
            found = [row for row in rows if row["task"] == task and row["setting"] == setting]
            cells.append(", ".join(f"{row['dev_loss']:.3f} / {row['score']:.2f}" for row in found) or "-")
        changed = ", ".join(f"{key} {value}" for key, value in setting.items() if key != "method")
        lines.append(f"| `{setting['method']}`{', ' + changed if changed else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--tasks", default="trec,bitext_support_triage")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=200, help="dev rows")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--settings", type=json.loads, default=grid(), help="a JSON list, in place of the grid")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = fw.load_base(options.base)
    result: dict[str, Any] = {
        "what": f"training defaults on {Path(options.base).name}, {options.steps} steps, batch {options.batch}, P = 20",
        "hardware": describe(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "defaults": {method: {"lr": found.lr, "init": found.init} for method, found in DEFAULTS.items()},
        "rows": [],
    }
    if options.json and options.json.exists():
        old = json.loads(options.json.read_text())
        if old.get("defaults") == result["defaults"] and old["what"] == result["what"]:
            result["rows"] = old["rows"]
    for settings, seed, task in itertools.product(options.settings, range(options.seeds), options.tasks.split(",")):
        key = {"task": task, "setting": settings, "seed": seed}
        if not any(row.items() >= key.items() for row in result["rows"]):
            found = measure(base, task, settings | {"seed": seed}, options)
            result["rows"].append(key | found)
            print(json.dumps(result["rows"][-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
