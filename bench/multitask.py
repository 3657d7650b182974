"""One source shared by several tasks against vectors of their own, on few rows; and a new task from the source.

python bench/multitask.py --base ../shared/models/base-3m [--json bench/results/multitask.json]

Four tasks of `--rows` training rows each: plain vectors, and one source with low-rank factors, both in joint passes of
the same steps. Then a fifth task: plain vectors, factors alone on the shared source, and plain vectors that start from
it. Judged by dev loss and by the metric on dev rows. Finished rows of the JSON are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hardware import describe

import foreword as fw
from foreword.cli.train_command import progress_printer
from foreword.recipes.judging import engine_with
from foreword.recipes.multitask import adapt, share_source

EXAMPLES = Path(__file__).parents[1] / "examples" / "twelve_tasks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--tasks", default="sst2,ag_news,rte,banking77")
    parser.add_argument("--new", default="trec")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dev-rows", type=int, default=100)
    parser.add_argument("--methods", default="kv,prompt")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = fw.load_base(options.base, device=options.device)
    rows: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    for seed in map(int, options.seeds.split(",")):
        for method in options.methods.split(","):
            if not any((row["method"], row["seed"]) == (method, seed) for row in rows):
                rows += measure(base, options, method, seed)
            if options.json:
                what = (
                    f"multitask prompts, {Path(options.base).name}, {options.rows} rows a task, {options.steps} steps"
                )
                data = {"what": what, "hardware": describe(), "means": means(rows), "rows": rows}
                options.json.write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(means(rows), indent=1))


def measure(base: fw.FrozenModel, options: argparse.Namespace, method: str, seed: int) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {
        "method": method, "seed": seed, "batch_size": 8, "steps": options.steps, "eval_every": options.steps // 4,
        "eval_rows": 64, "max_train_rows": options.rows,
    }  # fmt: skip

    def runs(names: str) -> list[fw.Run]:
        return [fw.Run.from_toml(EXAMPLES / f"{name}.toml", name=name, **settings) for name in names.split(",")]

    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        plain = fit(base, runs(options.tasks), Path(folder) / "plain")
        shared = fit(base, share_source(runs(options.tasks), "source"), Path(folder) / "shared")
        (new,) = runs(options.new)
        source = Path(folder) / "shared" / "source.shared.safetensors"
        start = dataclasses.replace(new, name="started", start=fw.load_artefact(source).vectors)
        factors = dataclasses.replace(adapt(new, source), name="factors")
        later = fit(base, [dataclasses.replace(new, name="plain"), factors, start], Path(folder) / "new")
        found = [judge(base, options, run, result, "separate") for run, result in plain]
        found += [judge(base, options, run, result, "shared") for run, result in shared]
        kinds = ("new task, separate", "new task, factors on the source", "new task, started at the source")
        found += [judge(base, options, run, result, kind) for (run, result), kind in zip(later, kinds, strict=True)]
    seconds = time.process_time() - started
    for row in found:
        row |= {"method": method, "seed": seed}
    print(f"{method}, seed {seed}: {seconds:.0f} s of processor time", json.dumps(means(found)), flush=True)
    return found


def fit(base: fw.FrozenModel, runs: Sequence[fw.Run], out: Path) -> list[tuple[fw.Run, fw.RunResult]]:
    results = fw.fit(base, runs, out=out, on_progress=progress_printer(30), reports=False)
    return list(zip(runs, results, strict=True))


def judge(
    base: fw.FrozenModel, options: argparse.Namespace, run: fw.Run, result: fw.RunResult, kind: str
) -> dict[str, Any]:
    assert result.artefact is not None
    engine = engine_with(base, {"it": fw.load_artefact(result.artefact)})
    report = fw.evaluate(engine, run.task, prefix="it", split="dev", limit=options.dev_rows)
    return {"task": run.task.name, "kind": kind, "dev_loss": result.best["value"], "score": report.score}


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean over tasks and seeds for each method and kind."""
    kinds = dict.fromkeys((row.get("method"), row["kind"]) for row in rows)
    found = []
    for method, kind in kinds:
        own = [row for row in rows if (row.get("method"), row["kind"]) == (method, kind)]
        values = {key: round(sum(row[key] for row in own) / len(own), 4) for key in ("dev_loss", "score")}
        found.append({"method": method, "kind": kind, **values, "runs": len(own)})
    return found


if __name__ == "__main__":
    main()
