"""Comparisons made by hand, and a small task that a few steps can run on."""

import dataclasses

from foreword.compare.plan import Settings
from foreword.compare.result import Comparison, MeasuredRow, Paired
from tests.bundled import write_task

FEW = ["train.steps=3", "train.batch_size=4", "train.warmup_steps=1", "train.eval_rows=4"]
QUICK = Settings(timing_rounds=2, mixed_requests=4, rows_limit=6, num_shots=2)
BUDGET = {
    "steps": 3, "batch_size": 4, "accumulate": 1, "train_rows": 32, "schedule": "linear", "warmup_steps": 1,
    "clip": 1.0, "seed": 0, "eval_rows": 4, "best_by": "loss", "eval_every": 1, "num_vectors": 4,
    "lora": {"rank": 8, "targets": "all-linear"},
}  # fmt: skip


def small_task(folder, **task):
    path = write_task(folder, **{"test": "colour.dev.jsonl", "hard_text": "Warm or cold?", **task})
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.endswith("= null")) + "\n")
    return path


def quick(**changes):
    return dataclasses.replace(QUICK, **changes)


def row(method, score, size=100, latency=10.0, **more):
    interval = None if score is None else (max(0.0, score - 0.05), min(1.0, score + 0.05))
    made = {"metric": "exact_match", "num_rows": 100, "training_peak_how": "by hand", "training_peak_bytes": 5} | more
    return MeasuredRow(
        method=method, score=score, interval=interval, bytes_per_task=size, latency_ms=latency, **made
    )  # fmt: skip


def paired(method, against, role, difference, verdict):
    return Paired(
        method=method, against=against, role=role, difference=difference,
        interval=(difference - 0.1, difference + 0.1), p_value=0.5 if verdict == "no difference" else 0.001,
        only_method=3, only_against=4, alpha=0.025, verdict=verdict,
    )  # fmt: skip


def comparison(rows, tests=()):
    return Comparison(
        base="some-base", base_sha256="ab", dtype="float32", task="colour", metric="exact_match", rows=tuple(rows),
        paired=tuple(tests), budget=BUDGET,
        settings={"decoding": "free", "timing_rounds": 3, "mixed_requests": 4, "answer_tokens": 2},
        machine={"cpu": "some processor", "cores": 2, "threads": 1, "gpu": None, "system": "Linux"},
        versions={"torch": "2"}, data={"test": "cd"}, date="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
