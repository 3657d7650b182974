"""Twelve real tasks on one base: trained in one joint pass per method, served from one engine, judged beside baselines.

python examples/twelve_tasks/run.py --base ../shared/models/base-3m --out bench/results/twelve_base-3m.json

Each method's twelve runs are one `fit`. All its prefixes then sit in one engine, and every task is judged by free
greedy generation on test rows drawn by seed 0, tasks with a closed set of answers also over their labels, beside the
untrained base with the hard text alone and with eight examples. Results are written after each method.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "bench"))

from hardware import describe  # noqa: E402

import foreword as fw  # noqa: E402
from foreword.cli.train_command import progress_printer  # noqa: E402
from foreword.eval.baselines import evaluate_baseline  # noqa: E402

TASKS = sorted(path.stem for path in HERE.glob("*.toml"))
LONG = ("cuad_clause_extract", "policyqa")
"""Tasks with rows of several hundred tokens train on half the rows per step."""


def judged(report: fw.EvalReport) -> dict[str, Any]:
    kept = ("metric", "score", "interval", "num_rows", "decoding", "others", "num_shots", "data_sha256", "seconds")
    return {key: report.to_json()[key] for key in kept}


def decodings(task: fw.Task) -> list[str]:
    return ["free", "labels"] if task.labels() else ["free"]


def baselines(engine: fw.Engine, tasks: list[fw.Task], rows: int, shot_rows: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task in tasks:
        for kind, limit in (("hard_text", rows), ("few_shot", shot_rows)):
            if not limit:
                continue
            for decoding in decodings(task) if kind == "hard_text" else ["free"]:
                report = evaluate_baseline(engine, task, kind, limit=limit, decoding=decoding)
                found.setdefault(task.name, {})[f"{kind}/{decoding}"] = judged(report)
                print(report.summary().splitlines()[1], task.name, kind, decoding, flush=True)
    return found


def train_method(
    base: fw.FrozenModel, method: str, names: list[str], settings: dict[str, Any], out: Path
) -> tuple[list[fw.Run], list[fw.RunResult], float]:
    runs = []
    for name in names:
        size = settings["batch_size"] // 2 if name in LONG else settings["batch_size"]
        runs.append(fw.Run.from_toml(HERE / f"{name}.toml", method=method, **{**settings, "batch_size": size}))
    started = time.monotonic()
    results = fw.fit(base, runs, out=out / method, on_progress=progress_printer(30.0))
    return runs, results, time.monotonic() - started


def judge_method(
    base: fw.FrozenModel, runs: list[fw.Run], results: list[fw.RunResult], rows: int
) -> dict[str, dict[str, Any]]:
    engine = fw.Engine(base, kv_memory="2GiB", max_batch=96, chunk_tokens=2048)
    for run, result in zip(runs, results, strict=True):
        engine.add_prefix(run.task.name, fw.compile(base, fw.load_artefact(result.artefact)))
    found = {}
    for run, result in zip(runs, results, strict=True):
        name = run.task.name
        artefact = fw.load_artefact(result.artefact)
        entry = {"bytes": artefact.num_bytes, "lr": run.lr, "kept": result.best, "status": result.status}
        for decoding in decodings(run.task):
            entry[decoding] = judged(fw.evaluate(engine, run.task, prefix=name, limit=rows, decoding=decoding))
            print(name, run.config.method, decoding, entry[decoding]["score"], flush=True)
        found[name] = entry
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON of results")
    parser.add_argument("--work", type=Path, default=Path("runs/twelve"), help="folder for artefacts")
    parser.add_argument("--methods", default="kv,prefix,prompt")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=300, help="test rows")
    parser.add_argument(
        "--shot-rows", type=int, default=100, help="test rows of the few-shot baseline; 0 leaves it out"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-baselines", action="store_true", help="another process judges them")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    names = options.tasks.split(",")
    if not (HERE / "../../../shared/tasks").is_dir():
        sys.exit("skipped: ../shared/tasks is not here")
    torch.set_num_threads(options.threads)
    base = fw.load_base(options.base, dtype=options.dtype, device=options.device)
    settings = {"steps": options.steps, "batch_size": options.batch}
    result: dict[str, Any] = {
        "what": f"twelve tasks on {Path(options.base).name}: one joint pass per method, one engine",
        "hardware": describe(),
        "dtype": str(base.dtype),
        "settings": {**settings, "P": 20, "test_rows": options.rows, "few_shot_rows": options.shot_rows, "seed": 0},
        "methods": {},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for method in options.methods.split(",") if options.methods else []:
        runs, results, seconds = train_method(base, method, names, settings, options.work)
        tokens = sum(row["tokens"] for one in results for row in one.history)
        result["methods"][method] = {
            "train_seconds": seconds,
            "text_tokens_per_s": tokens / seconds,
            "tasks": judge_method(base, runs, results, options.rows),
        }
        options.out.write_text(json.dumps(result, indent=1))
    if options.no_baselines:
        return
    engine = fw.Engine(base, kv_memory="2GiB", max_batch=32, chunk_tokens=2048)
    tasks = [fw.Task.from_toml(HERE / f"{name}.toml") for name in names]
    result["baselines"] = baselines(engine, tasks, options.rows, options.shot_rows)
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
