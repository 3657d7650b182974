"""Merge parts that run.py wrote into one result file and print the README's table.

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
    return merged


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{found['score']:.3f} [{low:.2f}, {high:.2f}]"


def table(result: dict[str, Any], decoding: str) -> str:
    methods = [name for name in METHODS if name in result["methods"]]
    tasks = result["methods"][methods[0]]["tasks"]
    lines = [
        "| task | metric | hard text | 8 examples | " + " | ".join(f"`{name}`" for name in methods) + " |",
        "|---|---|---|---|" + "---|" * len(methods),
    ]
    wins = dict.fromkeys(methods, 0)
    count = 0
    for task in tasks:
        scores = {name: result["methods"][name]["tasks"][task].get(decoding) for name in methods}
        if scores[methods[0]] is None:
            continue
        count += 1
        known = result["baselines"].get(task, {})
        baseline = known.get(f"hard_text/{decoding}")
        for name, found in scores.items():
            wins[name] += bool(baseline and found["score"] > baseline["score"])
        cells = [cell(baseline), cell(known.get(f"few_shot/{decoding}")), *(cell(scores[name]) for name in methods)]
        lines.append(f"| {task} | {scores[methods[0]]['metric']} | " + " | ".join(cells) + " |")
    means = [
        sum(result["methods"][name]["tasks"][task][decoding]["score"] for task in tasks if decoding in
            result["methods"][name]["tasks"][task]) / count
        for name in methods
    ]  # fmt: skip
    lines.append("| mean | | | | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    lines.append(
        "| better than the hard text on | | | | " + " | ".join(f"{wins[n]} of {count}" for n in methods) + " |"
    )
    return "\n".join(lines)


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
