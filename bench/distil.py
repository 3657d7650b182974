"""Compression: notes of 24 facts into vectors, graded by generation in wordings that were not learned.

python bench/distil.py --base ../shared/models/base-3m --seeds 0,1,2
python bench/distil.py --base ../shared/models/base-30m --seeds 0,1 --no-ablation
python bench/distil.py --table

The first two measure and write bench/results/distil.json as each part is finished; the same call goes on where it was
stopped. The last writes bench/results/distil.md from it, as every call does at its end.

Each seed is other notes (`foreword.demo.make_notes`): six projects, four facts each. Learned are four wordings of every
question with the teacher's answers, judged are two others, one of them without a verb ("Alder city?"). Steps are fewer
than by default, for time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hardware import describe

import foreword as fw
from foreword.core.artefact import write_atomically
from foreword.demo.make_notes import HELD_OUT, NUM_FACTS, TAUGHT, write_notes
from foreword.distil.run import distil
from foreword.distil.settings import DistilConfig, Job, train_config

RESULT = Path(__file__).parent / "results" / "distil.json"
GOALS = {4: 0.90, 10: 0.60}
ABLATION: dict[str, dict[str, Any]] = {
    "default: kv, match, KL of answers, Muon with lr 0.05, first vector frozen": {},
    "start first": {"init": "first"},
    "start spread": {"init": "spread"},
    "objective likelihood": {"objective": "likelihood"},
    "learn questions too": {"learn": "all"},
    "one wording per fact": {"wordings": 1},
    "self-study of type question alone, 200": {"self_study": 200, "seed_types": ("question",)},
    "self-study of all types alone, 200": {"self_study": 200},
    "no vector frozen": {"frozen_vectors": 0},
    "AdamW, lr 0.2": {"optimizer": "adamw", "lr": 0.2},
    "Muon, lr 0.1 (as for tasks)": {"lr": 0.1},
    "method prefix": {"method": "prefix"},
    "method prompt": {"method": "prompt"},
}
ABLATION_RATIO = 10
TRAINING = ("optimizer", "lr", "steps", "batch_size", "frozen_vectors", "schedule")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--no-ablation", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"figures": {}, "ablation": {}}
    if options.base is not None:
        base = fw.load_base(str(options.base), dtype="float32")
        for seed in map(int, options.seeds.split(",")):
            for ratio in GOALS:
                measure(base, options.base.name, data, "figures", f"1/{ratio}", seed, options.steps, {"ratio": ratio})
        for name, settings in {} if options.no_ablation else ABLATION.items():
            given = {"ratio": ABLATION_RATIO, **settings}
            measure(base, options.base.name, data, "ablation", name, 0, options.steps, given)
    write_atomically(RESULT.with_suffix(".md"), table(data).encode())


def measure(
    base: fw.FrozenModel, base_name: str, data: dict[str, Any], part: str, name: str, seed: int, steps: int, given: Any
) -> None:
    """Distil one setting and keep its numbers, unless they are there."""
    key = f"{base_name}/{seed}/{name}"
    if key in data[part]:
        return
    started, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as work:
        notes = Path(work) / "notes"
        write_notes(notes, seed)
        found = distil(base, [job(notes, steps, dict(given))], out=Path(work) / "out")[0]
        numbers = found.to_json()
    data[part][key] = {
        "base": base_name,
        "seed": seed,
        "name": name,
        "steps": steps,
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "training": {key: found.artefact.header.training.get(key) for key in TRAINING},
        "hardware": describe(),
        **{k: v for k, v in numbers.items() if k not in ("name", "artefact", "seconds")},
    }
    write_atomically(RESULT, (json.dumps(data, indent=1) + "\n").encode())
    print(f"{key}: closed {found.judged['student'].gap_closed:.3f}, retained {found.judged.retained}", flush=True)


def job(notes: Path, steps: int, given: dict[str, Any]) -> Job:
    """Return the job of a setting: keys of [distil], of [train], and `wordings`, how many of them are learned."""
    train = {key: given.pop(key) for key in ("lr", "optimizer", "frozen_vectors", "method") if key in given}
    questions = notes / "questions.jsonl"
    if wordings := given.pop("wordings", None):
        lines = questions.read_text().splitlines(keepends=True)
        questions.write_text("".join(lines[: NUM_FACTS * wordings]))
    if "self_study" not in given:
        given["questions"] = str(questions)
    config = DistilConfig(
        context=str(notes / "notes.txt"), name="notes", test=str(notes / "test.jsonl"), max_new_tokens=16, **given
    )
    return Job(config, train_config({"steps": steps, **train}))


def table(data: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["# Compression of notes", ""]
    lines += [
        f"Notes of {NUM_FACTS} facts (`foreword.demo.make_notes`, one set a seed). Learned: {len(TAUGHT)} wordings of",
        f"every question with the teacher's answers. Judged: {len(HELD_OUT)} wordings that were not learned, by",
        "generation, exact match. float32.",
        "",
    ]
    lines += ["| base | ratio | notes | tokens → P | full | none | truncated | summary | start | student | of full | "
              "goal | KL gap closed | elsewhere: student, full | CPU s |",
              "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for base, ratio in sorted({(row["base"], row["name"]) for row in data["figures"].values()}, key=_order):
        rows = [row for row in data["figures"].values() if (row["base"], row["name"]) == (base, ratio)]
        lines += [_figure(row, "") for row in rows]
        mean = sum(row["retained"] for row in rows) / len(rows)
        closed = sum(row["gap_closed"] for row in rows) / len(rows)
        goal = GOALS[int(ratio[2:])]
        lines.append(
            f"| **{base}** | **{ratio}** | mean of {len(rows)} | | | | | | | | **{mean:.1%}** | {goal:.0%} | "
            f"**{closed:.3f}** | | |"
        )
    if data["ablation"]:
        lines += ["", f"## What moved it (1/{ABLATION_RATIO}, one set of notes)", ""]
        lines += [
            "| setting | base | score | of full | KL gap closed | elsewhere | CPU s |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in data["ablation"].values():
            lines.append(
                f"| {row['name']} | {row['base']} | {_standing(row, 'student')} | {row['retained']:.1%} | "
                f"{row['gap_closed']:.3f} | {row['elsewhere'][0]['divergence']:.2f} | {_cpu(row)} |"
            )
    every = [*data["figures"].values(), *data["ablation"].values()]
    lines += ["", "Measured on:", ""]
    for shown in sorted({json.dumps({"base": row["base"], **row["hardware"], "steps": row["steps"]}) for row in every}):
        lines.append(f"- {', '.join(f'{key} {value}' for key, value in json.loads(shown).items())}")
    return "\n".join(lines) + "\n"


def _figure(row: dict[str, Any], note: str) -> str:
    cells = [row["base"], row["name"], row["seed"], f"{row['num_context_tokens']} → {row['num_vectors']}"]
    cells += [_standing(row, name) for name in ("full", "none", "truncated", "summary", "start", "student")]
    elsewhere = f"{row['elsewhere'][0]['divergence']:.2f}, {row['elsewhere'][1]['divergence']:.2f}"
    cells += [f"{row['retained']:.1%}", note, f"{row['gap_closed']:.3f}", elsewhere, _cpu(row)]
    return "| " + " | ".join(map(str, cells)) + " |"


def _cpu(row: dict[str, Any]) -> str:
    return f"{row['cpu_s']:.0f}" if "cpu_s" in row else "-"


def _standing(row: dict[str, Any], name: str) -> str:
    found = next((standing for standing in row["standings"] if standing["name"] == name), None)
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{found['score']:.3f} [{low:.2f}, {high:.2f}]"


def _order(pair: tuple[str, str]) -> tuple[int, int]:
    return len(pair[0]), int(pair[1][2:])


if __name__ == "__main__":
    main()
