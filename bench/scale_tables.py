"""The tables of docs/scale.md, made from what the bench programs wrote.

python bench/scale_tables.py            # rewrites what stands between <!-- table:NAME --> and <!-- /table -->
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
PAGE = BENCH.parent / "docs/scale.md"
MARKS = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
ROUTING = {"one": "—", "random": "random", "hash": "hash", "bounded": "hash, bounded"}


def size(num_bytes: float) -> str:
    """Return bytes with three digits: 12.6 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.3g} {unit}" if num_bytes < 999.5 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def sheet(results: dict[str, Any]) -> str:
    """Bytes and blocks of a version, by formula."""
    rows = [
        [
            row["shape"],
            *(size(row["artefact"][method]) for method in ("prompt", "prefix", "kv")),
            size(row["compiled"]),
            f"{row['fit_in_host_cache']:,}",
            f"{row['shared_blocks']} + {row['own_blocks']}",
            size(row["block_bytes"]),
        ]
        for row in results["capacity"]["sheet"]
    ]
    head = [
        "shape",
        "artefact: prompt",
        "prefix",
        "kv",
        "compiled",
        "fit in a worker's host cache",
        "blocks: shared + per request",
        "one block",
    ]
    return table(head, rows)


def measured(results: dict[str, Any]) -> str:
    """File sizes on the bundled base."""
    found = results["capacity"]["measured"]
    rows = [
        [method, *(f"{sizes[key]:,}" for key in ("artefact_file", "compiled_file", "kv_bytes"))]
        for method, sizes in found["sizes"].items()
    ]
    head = [f"{found['shape']}, {found['positions']} positions", "artefact, bytes", "compiled file", "keys and values"]
    note = f"\nA version with its alias adds {found['registry_bytes_per_version']:,.0f} bytes to an SQLite registry.\n"
    return table(head, rows) + note


def host_cache(results: dict[str, Any]) -> str:
    """Hit shares and the busiest replica, alpha 1."""
    rows = [row for row in results["cache"]["host_cache"] if row["alpha"] == 1.0]
    tasks = sorted({row["tasks"] for row in rows})
    kinds = list(dict.fromkeys((row["replicas"], row["routing"]) for row in rows))
    found = {(row["replicas"], row["routing"], row["tasks"]): row for row in rows}
    return table(
        ["replicas", "routing", *(f"{count:,} tasks" for count in tasks), "busiest replica, mean = 1"],
        [
            [
                replicas,
                ROUTING[routing],
                *(f"{found[replicas, routing, count]['hit']:.1%}" for count in tasks),
                "—" if replicas == 1 else spread([found[replicas, routing, count]["busiest"] for count in tasks]),
            ]
            for replicas, routing in kinds
        ],
    )


def spread(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def host_alpha(results: dict[str, Any]) -> str:
    """The same for other popularities, four replicas."""
    rows = [row for row in results["cache"]["host_cache"] if row["replicas"] == 4 and row["routing"] != "hash"]
    tasks = sorted({row["tasks"] for row in rows})
    found = {(row["alpha"], row["routing"], row["tasks"]): row["hit"] for row in rows}
    return table(
        ["Zipf exponent", "routing", *(f"{count:,} tasks" for count in tasks)],
        [
            [alpha, ROUTING[routing], *(f"{found[alpha, routing, count]:.1%}" for count in tasks)]
            for alpha, routing in dict.fromkeys((row["alpha"], row["routing"]) for row in rows)
        ],
    )


def block_cache(results: dict[str, Any]) -> str:
    """Shares of prefix blocks that vLLM finds."""
    rows = results["cache"]["block_cache"]
    tasks = sorted({row["tasks"] for row in rows})
    found = {(row["replicas"], row["routing"], row["tasks"]): row["hit"] for row in rows}
    return table(
        ["replicas", "routing", *(f"{count:,} tasks" for count in tasks)],
        [
            [replicas, ROUTING[routing], *(f"{found[replicas, routing, count]:.1%}" for count in tasks)]
            for replicas, routing in dict.fromkeys((row["replicas"], row["routing"]) for row in rows)
        ],
    )


def gateway(results: dict[str, Any]) -> str:
    """What one gateway process needs, measured by bench/gateway.py."""
    if (found := results.get("gateway")) is None:
        return "Not measured yet: `python bench/gateway.py --json bench/results/gateway.json`.\n"
    streams, hardware = found["open_streams"], found["hardware"]
    per_stream = (streams["rss_peak"] - streams["rss_before"]) / streams["streams"]
    added = found["added_first_token_ms"]
    rows = [
        ["memory at rest", size(streams["rss_before"])],
        [f"memory with {streams['streams']:,} open streams", size(streams["rss_peak"])],
        ["memory per open stream", size(per_stream)],
        [f"first token, added at {found['direct']['rate']:.0f} requests/s, median", f"{added['median']:.2f} ms"],
        ["the same, p99", f"{added['p99']:.2f} ms"],
        ["share of one core that it used meanwhile", f"{found['gateway_cpu_share']:.0%}"],
    ]
    return table([f"one gateway process on {hardware['cpu']}, {hardware['date']}", ""], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    made.__name__: made for made in (sheet, measured, host_cache, host_alpha, block_cache, gateway)
}


def replaced(page: str, folder: Path) -> str:
    """Return the page with its tables made anew from the results in `folder`."""
    names = ("capacity", "cache", "gateway")
    results = {name: json.loads(path.read_text()) for name in names if (path := folder / f"{name}.json").exists()}
    return MARKS.sub(lambda found: found[1] + TABLES[found[2]](results) + found[3], page)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(replaced(PAGE.read_text(), BENCH / "results"))


if __name__ == "__main__":
    main()
