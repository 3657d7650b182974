"""The confusion matrix of doctor: every planted fault and every healthy system of the laboratory in tests/doctor/lab.

    python bench/doctor.py [--only SUBSTRING] [--no-servers] [--jobs N]

Writes bench/results/doctor.json (what was planted, what was named first, all findings with their measurements) and
doctor.md (the matrix, the share named first, false alarms).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hardware import describe

sys.path.insert(0, str(Path(__file__).parent.parent))  # the laboratory is among the tests

RESULTS = Path(__file__).parent / "results"
NOTHING = "nothing"
UNNAMED = "unnamed"


def main() -> None:
    """Run the laboratory and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", help="plants and healthy systems whose name holds this; nothing is written"
    )
    parser.add_argument("--no-servers", action="store_true", help="leave servers out")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work, one thread each")
    arguments = parser.parse_args()
    shelves = load_shelves()
    left_out = shelves.server_names() if arguments.no_servers else set()
    chosen = [
        (shelf, place)
        for shelf in ("PLANTS", "SOUND")
        for place, item in enumerate(getattr(shelves, shelf))
        if arguments.only in item.name and item.name not in left_out
    ]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(examine_at, chosen, range(len(chosen)), [len(chosen)] * len(chosen)))
    planted = [row for row, (shelf, _) in zip(rows, chosen, strict=True) if shelf == "PLANTS"]
    healthy = [row for row, (shelf, _) in zip(rows, chosen, strict=True) if shelf == "SOUND"]
    summary = summarise(planted, healthy)
    print(json.dumps(summary, indent=2))
    if arguments.only:
        return
    result = {**describe("peft", "safetensors"), **summary, "planted": planted, "healthy": healthy}
    (RESULTS / "doctor.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "doctor.md").write_text(matrix(result))


def load_shelves() -> Any:
    """Return the module that holds all plants and healthy systems."""
    warnings.simplefilter("ignore")
    from tests.doctor.lab import shelves

    return shelves


def examine_at(chosen: tuple[str, int], place: int, count: int) -> dict[str, Any]:
    """Diagnose the system at a place of a shelf, in a process of the pool."""
    shelf, index = chosen
    return examine(getattr(load_shelves(), shelf)[index], place, count)


def examine(item: Any, place: int, count: int) -> dict[str, Any]:
    """Diagnose one system; an error of doctor's own is kept as such."""
    started = time.monotonic()
    error, findings = None, []
    try:
        findings = list(item.diagnose())
    except Exception as raised:  # the table must come about, whatever one system does
        error = f"{type(raised).__name__}: {raised}"[:300]
    wrong = [finding for finding in findings if not finding.ok]
    fault = getattr(item, "fault", "")
    named = (wrong[0].fault or UNNAMED) if wrong else NOTHING
    accepted = {fault, *getattr(item, "also", ())} if fault else {NOTHING}
    right = named in accepted and error is None
    print(
        f"{place + 1}/{count} {'ok  ' if right else 'MISS'} {item.name}: {error or named}", file=sys.stderr, flush=True
    )
    return {
        "name": item.name,
        "fault": fault,
        "architecture": getattr(item, "architecture", ""),
        "also_right": sorted(getattr(item, "also", ())),
        "named_first": named,
        "right": right,
        "error": error,
        "seconds": round(time.monotonic() - started, 2),
        "findings": [
            {"check": f.check, "fault": f.fault, "measured": without_folder(f.measured), "expected": f.expected}
            for f in wrong
        ],
        "checks_made": sum(not finding.skipped for finding in findings),
        "checks_skipped": [finding.check for finding in findings if finding.skipped],
    }


def without_folder(text: str) -> str:
    """Return a measurement without the temporary folder that the examined file lay in."""
    return re.sub(re.escape(tempfile.gettempdir()) + r"/[^/\s]+/", "", text)


def summarise(planted: list[dict[str, Any]], healthy: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts and shares."""
    right, alarms = sum(row["right"] for row in planted), [row["name"] for row in healthy if not row["right"]]
    return {
        "num_planted": len(planted),
        "named_first": right,
        "share_named_first": round(right / max(1, len(planted)), 4),
        "found_at_all": sum(
            any(finding["fault"] in (row["fault"], *row["also_right"]) for finding in row["findings"])
            for row in planted
        ),
        "num_faults": len({row["fault"] for row in planted}),
        "num_healthy": len(healthy),
        "false_alarms": len(alarms),
        "misses": [f"{row['name']}: {row['error'] or row['named_first']}" for row in planted if not row["right"]],
        "alarms": alarms,
    }


def matrix(result: dict[str, Any]) -> str:
    """Return the confusion matrix as Markdown: faults planted by row, the name that came first by column."""
    planted = result["planted"]
    faults = list(dict.fromkeys(row["fault"] for row in planted))
    counts = {fault: Counter[str]() for fault in faults}
    for row in planted:  # a second right name counts as the first: it is one system with two
        counts[row["fault"]][row["fault"] if row["right"] else row["named_first"]] += 1
    others = sorted({name for fault in faults for name in counts[fault]} - set(faults))
    columns = [*faults, *others]
    lines = [
        "# Doctor: the confusion matrix",
        "",
        f"Measured {result['date']}, torch {result['torch']}, transformers {result['transformers']}, peft "
        f"{result['peft']}, {result['cpu']}, {result['threads']} thread(s); made by `python bench/doctor.py`.",
        "",
        f"**{result['named_first']} of {result['num_planted']}** planted faults "
        f"({100 * result['share_named_first']:.1f} %) are named by the first finding, "
        f"{result['found_at_all']} by some finding. **{result['false_alarms']} false alarms** in "
        f"{result['num_healthy']} healthy systems.",
        "",
        "Checks and plants were written side by side, so this is a regression suite, not a blind test.",
        "",
        "Rows: what was planted; columns, by number: what the first finding named.",
        "",
        "| # | planted | " + " | ".join(str(place + 1) for place in range(len(faults))) + "".join(
            f" | {name}" for name in others
        ) + " | first |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]  # fmt: skip
    for place, fault in enumerate(faults):
        total = sum(counts[fault].values())
        cells = [str(counts[fault][name] or "") for name in columns]
        share = f"{counts[fault][fault]}/{total}"
        lines.append(f"| {place + 1} | {fault} | " + " | ".join(cells) + f" | {share} |")
    if result["misses"]:
        lines += ["", "Not named first:", "", *(f"- {miss}" for miss in result["misses"])]
    if result["alarms"]:
        lines += ["", "False alarms:", "", *(f"- {name}" for name in result["alarms"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
