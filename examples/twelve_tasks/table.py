"""Merge parts that run.py wrote into one result file and print the tables of bench/results/twelve.md.

python examples/twelve_tasks/table.py PART.json ... [--out bench/results/twelve_base-3m.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

METHODS = ("prompt", "prefix", "kv")


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    merged = {key: value for key, value in parts[0].items() if key not in ("methods", "baselines")}
    merged["methods"], merged["baselines"] = {}, {}
    for part in parts:
        merged["methods"] |= {
            name: {**method, "settings": part["settings"], "threads": part["hardware"]["threads"]}
            for name, method in part["methods"].items()
        }
        for task, kinds in part.get("baselines", {}).items():
            merged["baselines"].setdefault(task, {}).update(kinds)
            merged["settings"] = {**merged["settings"], "few_shot_rows": part["settings"]["few_shot_rows"]}
    return merged


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{found['score']:.3f} [{low:.2f}, {high:.2f}]"


def table(result: dict[str, Any], decoding: str) -> str:
    methods = [name for name in METHODS if name in result["methods"]]
    scores = {name: result["methods"][name]["tasks"] for name in methods}
    tasks = [task for task, entry in scores[methods[0]].items() if decoding in entry]
    known = {task: result["baselines"].get(task, {}) for task in tasks}
    kinds = {"hard text": f"hard_text/{decoding}", "8 examples": f"few_shot/{decoding}"}
    kinds = {title: key for title, key in kinds.items() if any(key in found for found in known.values())}
    header = ["task", "metric", *kinds, *(f"`{name}`" for name in methods)]
    rows = [header, ["---"] * len(header)]
    for task in tasks:
        cells = [cell(known[task].get(key)) for key in kinds.values()]
        cells += [cell(scores[name][task][decoding]) for name in methods]
        rows.append([task, scores[methods[0]][task][decoding]["metric"], *cells])
    gaps = [""] * (1 + len(kinds))
    means = [sum(scores[name][task][decoding]["score"] for task in tasks) / len(tasks) for name in methods]
    rows.append(["mean", *gaps, *(f"{mean:.3f}" for mean in means)])
    wins = [sum(is_better(scores[name][task], known[task], decoding) for task in tasks) for name in methods]
    rows.append(["better than the hard text on", *gaps, *(f"{count} of {len(tasks)}" for count in wins)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def is_better(entry: dict[str, Any], known: dict[str, Any], decoding: str) -> bool:
    baseline = known.get(f"hard_text/{decoding}")
    return bool(baseline) and entry[decoding]["score"] > baseline["score"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = merge([json.loads(path.read_text()) for path in options.parts])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result, "free"))
    print("\nScored over the closed set of answers:\n")
    print(table(result, "labels"))


if __name__ == "__main__":
    main()
