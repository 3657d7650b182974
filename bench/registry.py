"""The registry with ten thousand versions: milliseconds of a call at the median and at p99, per database.

python bench/registry.py [--json FILE] [--postgres URL] [--tasks 500] [--versions 20] [--calls 1000]

Without --postgres it starts a throw-away server, as the tests do. The database at URL must be empty.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hardware import describe
from sqlalchemy import insert

sys.path.insert(0, str(Path(__file__).parents[1]))

from foreword.registry.access_records import Usage
from foreword.registry.store import Registry
from foreword.registry.tables import AliasRow, KeyRow, TaskRow, TenantRow, VersionRow

GOAL_MS = 5.0
NUM_KEYS = 10_000


def fill(registry: Registry, num_tasks: int, num_versions: int) -> None:
    """Write the rows that publishing would: each task with a prod and a canary alias; and tenants with keys."""
    now = datetime.now(UTC)
    names = [f"task-{index:04d}" for index in range(num_tasks)]
    evaluation = {
        "metric": "exact_match",
        "split": "dev",
        "score": 0.9,
        "interval": [0.88, 0.92],
        "data_sha256": "d" * 64,
    }
    base = {f"base_{field}": "0" * 64 for field in ("shapes_sha256", "weights_sha256", "tokenizer_sha256")}
    rows = [
        {
            "task": name,
            "number": number,
            "sha256": f"{index:032x}{number:032x}",
            "method": "prompt",
            "num_vectors": 20,
            "num_bytes": 10**6,
            "base_model_type": "llama",
            "base_quantisation": "",
            "base_chat_template_sha256": "0" * 64,
            **base,
            "evaluation": evaluation,
            "who": "bench",
            "why": "",
            "created": now,
        }
        for index, name in enumerate(names)
        for number in range(1, num_versions + 1)
    ]
    aliases = [
        {"task": name, "name": alias, "number": num_versions - back}
        for name in names
        for alias, back in (("prod", 1), ("canary", 0))
    ]
    tenants = [{"name": f"tenant-{index}", "disabled": False, "created": now} for index in range(NUM_KEYS // 10)]
    keys = [
        {
            "id": f"fw_{index:010d}",
            "tenant": f"tenant-{index % len(tenants)}",
            "name": "",
            "secret_sha256": "0" * 64,
            "created": now,
        }
        for index in range(NUM_KEYS)
    ]
    with registry._database.writing() as session:
        session.execute(
            insert(TaskRow), [{"name": name, "last_number": num_versions, "created": now} for name in names]
        )
        for table, values in ((VersionRow, rows), (AliasRow, aliases), (TenantRow, tenants), (KeyRow, keys)):
            session.execute(insert(table), values)
        session.connection().exec_driver_sql("ANALYZE")  # as PostgreSQL does by itself within a minute


def calls(registry: Registry, num_tasks: int, num_versions: int) -> Iterator[tuple[str, float, Callable[[], Any]]]:
    """Yield (name, part of --calls, call); what each call asks for is drawn anew."""
    source = random.Random(5)

    def task() -> str:
        return f"task-{source.randrange(num_tasks):04d}"

    def number() -> int:
        return source.randint(1, num_versions)

    yield "resolve task", 1, lambda: registry.resolve(task())
    yield "resolve task@alias", 1, lambda: registry.resolve(f"{task()}@canary")
    yield "resolve task@number", 1, lambda: registry.resolve(f"{task()}@{number()}")
    yield (
        "resolve sha256:digest",
        1,
        lambda: registry.resolve(f"sha256:{source.randrange(num_tasks):032x}{number():032x}"),
    )
    yield "versions(task)", 0.2, lambda: registry.versions(task())
    yield "tasks()", 0.03, registry.tasks
    yield "promote", 0.2, lambda: registry.promote(f"{task()}@{number()}", force=True)
    yield "history(task)", 0.2, lambda: registry.history(task())
    yield "access.revision()", 1, registry.access.revision
    yield f"access.snapshot() of {NUM_KEYS} keys", 0.02, registry.access.snapshot
    used = {f"tenant-{index}": Usage(requests=1, tokens=100, running=1) for index in range(100)}
    yield "access.sync_usage() of 100 tenants", 0.2, lambda: registry.access.sync_usage("bench", used)


def measure(call: Callable[[], Any], count: int) -> dict[str, float]:
    """Return milliseconds of `count` calls, after two that warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begin))
    times.sort()
    p99 = times[min(len(times) - 1, int(len(times) * 0.99))]
    return {"calls": count, "p50_ms": round(statistics.median(times), 3), "p99_ms": round(p99, 3)}


@contextmanager
def databases(postgres: str | None, folder: Path) -> Iterator[dict[str, str]]:
    """Yield the URLs of empty databases by name."""
    sqlite = f"sqlite:///{folder / 'registry.sqlite'}"
    if postgres is not None:
        yield {"sqlite": sqlite, "postgresql": postgres}
        return
    from tests.registry.postgres import postgres_url

    with postgres_url(is_empty=True) as url:
        yield {"sqlite": sqlite, "postgresql": url}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--postgres", metavar="URL")
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--calls", type=int, default=1000)
    options = parser.parse_args()
    measured: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name, databases(options.postgres, Path(name)) as urls:
        for database, url in urls.items():
            with Registry.open(Path(name) / database, database_url=url) as registry:
                fill(registry, options.tasks, options.versions)
                measured[database] = {}
                for what, part, call in calls(registry, options.tasks, options.versions):
                    result = measured[database][what] = measure(call, max(1, round(part * options.calls)))
                    print(f"{database:<12}{what:<40}{result['p50_ms']:>9.3f} ms{result['p99_ms']:>9.3f} ms", flush=True)
    worst = max(result["p99_ms"] for what, result in measured["postgresql"].items() if what.startswith("resolve"))
    summary = {
        "what": f"registry of {options.tasks} tasks with {options.versions} versions each, milliseconds of a call",
        "hardware": describe("sqlalchemy", "psycopg"),
        "databases": measured,
        "resolve_p99_ms": worst,
        "goal_ms": GOAL_MS,
        "met": worst < GOAL_MS,
    }
    print(f"resolve at p99 on PostgreSQL: {worst} ms, goal {GOAL_MS} ms")
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
