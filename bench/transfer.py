"""Does a start from another task's vectors beat a start from text, and which measure of likeness tells so?

python bench/transfer.py [--method kv] [--json bench/results/transfer.json]

Sources: five shared tasks of short rows on base-3m, trained from text. Targets: the same tasks, each trained a few
steps from text and from each of the four others, all in one joint pass. The gain of a transfer is the dev loss from
text less the dev loss from the source, after the same few steps. Each measure orders a target's four sources; printed
is Spearman's rank correlation of that order with the order by gain, mean over the targets, and what is gained by taking
the first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import describe

import foreword as fw
from foreword.cli.train_command import progress_printer
from foreword.recipes.similar import cosines, output_divergence, start_loss
from foreword.train.state import RunState

ROOT = Path(__file__).parents[1].resolve()
TASKS = ("trec", "sst2", "banking77", "bitext_support_triage", "restaurant8k_slots")
NUM_ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(ROOT.parent / "shared" / "models" / "base-3m"))
    parser.add_argument("--method", default="kv")
    parser.add_argument("--source-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wall, cpu = time.monotonic(), time.process_time()
    base = fw.load_base(options.base)
    with tempfile.TemporaryDirectory() as folder:
        pairs = measure(base, Path(folder), options)
    result = {
        "what": f"transfer between {len(TASKS)} tasks, {options.method} on {Path(options.base).name}, P = 20, sources "
        f"{options.source_steps} steps, targets {options.steps} steps of batch 16",
        "hardware": describe(),
        "seconds": round(time.monotonic() - wall),
        "cpu_seconds": round(time.process_time() - cpu),
        "agreement": agreement(pairs),
        "pairs": pairs,
    }
    print(page(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(page(result))


def run_of(task: str, method: str, steps: int, name: str, **more: Any) -> fw.Run:
    path = ROOT / "examples" / "twelve_tasks" / f"{task}.toml"
    settings = {"method": method, "steps": steps, "eval_rows": 100, "max_train_rows": 2000, "eval_every": steps}
    return fw.Run.from_toml(path, name=name, **settings | more)


def measure(base: fw.FrozenModel, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one dict per pair of target and source, and one per target with the start from text."""
    method, show = options.method, progress_printer(60)
    runs = [run_of(task, method, options.source_steps, task) for task in TASKS]
    results = fw.fit(base, runs, out=folder / "sources", on_progress=show)
    sources = {run.name: fw.load_artefact(r.artefact) for run, r in zip(runs, results, strict=True)}
    trials = [
        run_of(target, method, options.steps, f"{target}.{source}", **start)
        for target in TASKS
        for source in ("text", *TASKS)
        if source != target
        for start in ([{}] if source == "text" else [{"init": f"from:{sources[source].path}"}])
    ]
    results = fw.fit(base, trials, out=folder / "targets", on_progress=show)
    loss = {run.name: r.history[-1]["dev_loss"] for run, r in zip(trials, results, strict=True)}
    quick = {run.name: fw.load_artefact(r.artefact) for run, r in zip(trials, results, strict=True)}
    found = []
    for target in TASKS:
        run = run_of(target, method, options.steps, target, max_train_rows=NUM_ROWS)
        rows = RunState(base, run).train
        text = quick[f"{target}.text"]
        for source in TASKS:
            if source == target:
                continue
            vectors = sources[source].vectors
            pooled, aligned = cosines(text.vectors, vectors)
            found.append(
                {
                    "target": target,
                    "source": source,
                    "loss from text": loss[f"{target}.text"],
                    "loss from source": loss[f"{target}.{source}"],
                    "gain": loss[f"{target}.text"] - loss[f"{target}.{source}"],
                    "loss at start": start_loss(base, run, vectors, rows),
                    "kl": output_divergence(base, text, sources[source]),
                    "cosine of means": pooled,
                    "cosine by vector": aligned,
                    "source's own dev loss": sources[source].header.training["best"]["value"],
                }
            )
    return found


MEASURES = {"loss at start": -1, "kl": -1, "cosine of means": 1, "cosine by vector": 1}
"""Each measure, and whether more (1) or less (-1) of it should mean more gain."""


def agreement(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, by measure, the mean rank correlation with the gain, and the gain of its first choice."""
    found: dict[str, Any] = {}
    targets = [[pair for pair in pairs if pair["target"] == target] for target in TASKS]
    for name, sign in MEASURES.items():
        rho = [spearman([sign * p[name] for p in group], [p["gain"] for p in group]) for group in targets]
        chosen = [max(group, key=lambda p: sign * p[name]) for group in targets]
        found[name] = {
            "rank correlation": float(np.mean(rho)),
            "by target": dict(zip(TASKS, rho, strict=True)),
            "chosen": {p["target"]: p["source"] for p in chosen},
            "mean gain of its choice": float(np.mean([p["gain"] for p in chosen])),
            "targets where its choice beats text": sum(p["gain"] > 0 for p in chosen),
        }
    best = [max(group, key=lambda p: p["gain"]) for group in targets]
    found["the best source, known afterwards"] = {
        "mean gain of its choice": float(np.mean([p["gain"] for p in best])),
        "targets where its choice beats text": sum(p["gain"] > 0 for p in best),
        "chosen": {p["target"]: p["source"] for p in best},
    }
    found["any source, on average"] = {
        "mean gain of its choice": float(np.mean([p["gain"] for p in pairs])),
        "targets where its choice beats text": sum(np.mean([p["gain"] for p in group]) > 0 for group in targets),
    }
    return json.loads(json.dumps(found, default=int))  # type: ignore[no-any-return]


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def page(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    from foreword.report import Report, Section, Table, Text, render

    hardware = ", ".join(f"{k} {v}" for k, v in result["hardware"].items() if v)
    names = ("rank correlation", "mean gain of its choice", "targets where its choice beats text")
    rows = tuple((measure, *(values.get(name) for name in names)) for measure, values in result["agreement"].items())
    gains = {(p["target"], p["source"]): p["gain"] for p in result["pairs"]}
    losses = {p["target"]: p["loss from text"] for p in result["pairs"]}
    table = Table(
        ("target", "dev loss from text", *(f"gain from {source}" for source in TASKS)),
        tuple((t, losses[t], *(gains.get((t, s)) for s in TASKS)) for t in TASKS),
        "Gain: dev loss from text less dev loss from the source, nats per answer token, after the same steps.",
    )
    took = f"{result['seconds']} s, {result['cpu_seconds']} s of processor time"
    sections = (
        Section("Measured on", (Text(f"{hardware}; {took}."),)),
        Section("Which measure tells the gain", (Table(("measure", *names), rows),)),
        Section("Gains", (table,)),
    )
    return render(Report(result["what"], sections), "markdown")


if __name__ == "__main__":
    main()
