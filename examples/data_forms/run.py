"""The same rows as JSONL, Parquet and a saved data set: the same hash, and after training the same vectors to the bit.

    python examples/data_forms/run.py --base ../shared/models/base-3m --out runs/forms

Converts a task of ../shared/tasks under other column names, and trains 20 steps from each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict

from foreword.config import TaskConfig, TrainConfig
from foreword.core.artefact import load_artefact
from foreword.core.model import load_base
from foreword.eval.tasks import Task
from foreword.train.loop import fit
from foreword.train.run import Run


def convert(task: Path, folder: Path) -> None:
    """Write `<split>.parquet` files and the data set `set`, with columns `question` and `answer`."""
    splits = {}
    for split in ("train", "dev"):
        rows = Task(TaskConfig(name=task.name, train=str(task / f"{split}.jsonl"))).rows("train")
        splits[split] = Dataset.from_list([{"question": row.input, "answer": row.target} for row in rows])
        splits[split].to_parquet(str(folder / f"{split}.parquet"))
    DatasetDict(splits).save_to_disk(str(folder / "set"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="../shared/models/base-3m")
    parser.add_argument("--task", type=Path, default=Path("../shared/tasks/trec"))
    parser.add_argument("--out", type=Path, default=Path("runs/forms"))
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    convert(args.task, args.out)
    base = load_base(args.base)
    named = {"input": "question", "target": "answer"}
    forms = {
        "jsonl": (f"{args.task}/train.jsonl", f"{args.task}/dev.jsonl", None),
        "parquet": (f"{args.out}/train.parquet", f"{args.out}/dev.parquet", named),
        "data set": (f"{args.out}/set#train", f"{args.out}/set#dev", named),
    }
    first = None
    for form, (train, dev, columns) in forms.items():
        config = TaskConfig(name=args.task.name, train=train, dev=dev, columns=columns, chat=True, max_new_tokens=8)
        train_config = TrainConfig(method="kv", steps=20, optimizer="adamw", lr=0.1, eval_rows=100)
        run = Run(Task(config), train_config, "run")
        (result,) = fit(base, [run], out=args.out / form.replace(" ", "_"))
        artefact = load_artefact(result.artefact)
        first = first or artefact
        same = all(torch.equal(tensor, first.tensors[name]) for name, tensor in artefact.tensors.items())
        print(
            f"{form:8}  {len(run.task.rows('train'))} rows, sha256 {run.data_sha256()[:12]}, "
            f"dev loss {result.best['value']:.6f}, vectors {'equal' if same else 'OTHER'}"
        )


if __name__ == "__main__":
    main()
