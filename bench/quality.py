"""Scores of prompt, prefix and kv beside PEFT's prompt and prefix tuning and LoRA: the same steps, rows, batch and P.

python bench/quality.py --base ../shared/models/base-3m --steps 120 --tasks trec,sst2 --out quality_base-3m.json
python bench/quality.py --base ../shared/models/base-30m --device cuda --steps 400 --out quality_base-30m.json

The peers are trained and judged by `../shared/tools/peer_quality.py`, each at the better of its learning rates by dev
rows. Ours train with the defaults, the same for all tasks. All are judged on 300 test rows by free greedy generation.
What is already in the results is not run again, so a stopped call goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hardware import describe

import foreword as fw
from foreword.cli.train_command import progress_printer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "twelve_tasks"
SHARED = ROOT.parent / "shared"
METHODS = ("prompt", "prefix", "kv")
PEERS = {"PEFT prompt": "prompt", "PEFT prefix": "prefix", "LoRA r=8": "lora"}
COLUMNS = ("PEFT prompt", "prompt", "PEFT prefix", "prefix", "kv", "LoRA r=8")


def train_and_judge(
    base: fw.FrozenModel, task: str, method: str, seed: int, settings: dict[str, Any], rows: int
) -> dict[str, Any]:
    run = fw.Run.from_toml(EXAMPLES / f"{task}.toml", method=method, seed=seed, **settings)
    with tempfile.TemporaryDirectory() as folder:
        result = fw.fit(base, [run], out=folder, on_progress=progress_printer(60.0))[0]
        assert result.artefact is not None
        engine = fw.Engine(base, kv_memory="1GiB", max_batch=64)
        engine.add_prefix(task, fw.compile(base, fw.load_artefact(result.artefact)))
    report = fw.evaluate(engine, run.task, prefix=task, limit=rows, decoding="free")
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "metric": report.metric,
        "score": report.score,
        "interval": report.interval,
        "kept_step": result.best.get("step"),
        "dev_loss": result.best.get("value"),
        "train": run.resolved()["train"],
    }


def peers(base: str, tasks: list[str], steps: int, seconds: float, lines: Path) -> list[dict[str, Any]]:
    """Run the shared tool on what `lines` lacks; return its rows."""
    known = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    missing = [task for task in tasks if sum(row["task"] == task for row in known) < 2 * len(PEERS)]
    if missing and seconds:
        tool = SHARED / "tools" / "peer_quality.py"
        command = [sys.executable, str(tool), base, str(SHARED / "tasks"), str(lines), str(seconds), "1", str(steps)]
        subprocess.run([*command, ",".join(missing)], check=True)
        known = [json.loads(line) for line in lines.read_text().splitlines()]
    return [row for row in known if row["task"] in tasks and row["steps"] == steps]


def best_peers(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the better of the learning rates by dev rows, by column and task."""
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for title, kind in PEERS.items():
        for row in rows:
            held = best.setdefault(title, {}).get(row["task"])
            if row["method"] == kind and (held is None or row["dev"] > held["dev"]):
                best[title][row["task"]] = row
    return best


def table(result: dict[str, Any]) -> str:
    """Return Markdown: one row per task, ours as mean over the seeds and half their range, and the means below."""
    theirs = best_peers(result["peers"])
    cells: dict[str, dict[str, list[float]]] = {title: {} for title in COLUMNS}
    for row in result["runs"]:
        cells[row["method"]].setdefault(row["task"], []).append(row["score"])
    for title, found in theirs.items():
        for task, row in found.items():
            cells[title][task] = [row["test"]]
    tasks = [task for task in result["tasks"] if any(task in cells[title] for title in METHODS)]
    metrics = {row["task"]: row["metric"] for row in result["runs"]}
    titles = [title for title in COLUMNS if cells[title]]
    lines = ["| task | metric | " + " | ".join(f"`{t}`" if t in METHODS else t for t in titles) + " |"]
    lines.append("| --- " * (len(titles) + 2) + "|")
    for task in tasks:
        lines.append(
            f"| {task} | {metrics[task]} | " + " | ".join(shown(cells[t].get(task, [])) for t in titles) + " |"
        )
    means = []
    for title in titles:
        have = [statistics.mean(cells[title][task]) for task in tasks if task in cells[title]]
        means.append(f"{statistics.mean(have):.3f}" if len(have) == len(tasks) else "-")
    lines.append("| mean | | " + " | ".join(means) + " |")
    return "\n".join(lines)


def shown(scores: list[float]) -> str:
    if not scores:
        return "-"
    spread = f" ± {(max(scores) - min(scores)) / 2:.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--tasks", default=",".join(sorted(path.stem for path in EXAMPLES.glob("*.toml"))))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vectors", type=int, default=20)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=300, help="test rows")
    parser.add_argument("--peer-seconds", type=float, default=math.inf, help="0 leaves the peers out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not (SHARED / "tasks").is_dir():
        sys.exit("skipped: ../shared/tasks is not here")
    torch.set_num_threads(options.threads)
    base = fw.load_base(options.base, dtype=options.dtype, device=options.device)
    settings = {"steps": options.steps, "batch_size": options.batch, "num_vectors": options.vectors}
    result: dict[str, Any] = {
        "what": f"quality on {Path(options.base).name}, all at the same steps, batch and P; one setting for all tasks",
        "hardware": describe("peft"),
        "dtype": str(base.dtype).removeprefix("torch."),
        "settings": {**settings, "test_rows": options.rows},
        "tasks": options.tasks.split(","),
        "runs": [],
        "peers": [],
    }
    if options.out.exists():
        old = json.loads(options.out.read_text())
        if old["settings"] != result["settings"]:
            sys.exit(f"{options.out} has the settings {old['settings']}, asked for are {result['settings']}")
        result |= {"runs": old["runs"], "peers": old["peers"], "tasks": sorted({*old["tasks"], *result["tasks"]})}
    done = {(row["task"], row["method"], row["seed"]) for row in result["runs"]}
    for seed in map(int, options.seeds.split(",")):
        for task in options.tasks.split(","):
            for method in options.methods.split(",") if options.methods else []:
                if (task, method, seed) not in done:
                    row = train_and_judge(base, task, method, seed, settings, options.rows)
                    result["runs"].append(row)
                    print(task, method, seed, row["score"], flush=True)
                    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.peer_seconds:
        lines = options.out.with_suffix(".peers.jsonl")
        result["peers"] = peers(options.base, result["tasks"], options.steps, options.peer_seconds, lines)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
