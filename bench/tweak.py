"""A behaviour tweak, timed by phase and scored: 50 rows that give one label's texts a new answer.

python bench/tweak.py --work .bench/tweak [--grid] [--json bench/results/tweak.json]

The version: kv and prefix vectors of bitext_support_triage on base-3m, 240 steps, trained once into `--work` and used
again from there. The tweak: customers who want a refund ("refund: get refund") are now to be answered "refund: pass to
finance". 50 such texts that the version has not seen are added; 50 others and those of the test split judge. Everything
that `foreword tweak` does is timed, loading of the base included. `--grid` trains shares of rehearsal and learning
rates in one joint pass: the defaults come from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hardware import describe

import foreword as fw
from foreword.cli.train_command import progress_printer
from foreword.recipes import tweak as tweaks
from foreword.recipes.judging import engine_with
from foreword.recipes.origin import live_version, open_origin
from foreword.recipes.tweak_data import Rehearsal, read_tweak_rows, write_task
from foreword.registry.store import Registry

SHARED = Path(__file__).parents[1].resolve().parent / "shared"
OLD, NEW = "refund: get refund", "refund: pass to finance"
ADDED, JUDGED = 50, 50
TASK = """[task]
name = "support"
train = "train.jsonl"
dev = "dev.jsonl"
template = "{soft:20}{input}"
chat = true
max_new_tokens = 24
max_input_tokens = 352
truncate = "right"
hard_text = "Name the topic and the intent of the customer's message as topic: intent."
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(SHARED / "models" / "base-3m"))
    parser.add_argument("--work", type=Path, default=Path(".bench/tweak"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--methods", default="kv,prefix")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--shares", default="0,0.25,0.5,0.75", help="with --grid: of old rows in a batch")
    parser.add_argument("--factors", default="0.25,0.5,1", help="with --grid: of the learning rate")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    methods = options.methods.split(",")
    work = options.work.resolve()
    prepare(work)
    train_once(work, options.base, options.steps, methods)
    stored = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    result: dict[str, Any] = stored | {
        "what": f"tweak of bitext_support_triage on {Path(options.base).name}: {ADDED} rows, {OLD!r} is now {NEW!r}",
        "hardware": describe(),
        "load_average": Path("/proc/loadavg").read_text().split()[:3],
    }
    if options.grid:
        lists = [[float(n) for n in text.split(",")] for text in (options.shares, options.factors)]
        for method in methods:
            result.setdefault("grid", []).extend(grid(work, options.base, method, *lists))
            keep_partial(result, options.json, page)
        return
    for method in methods:
        for label, drop in (("dropped", (OLD,)), ("kept", ())):
            result.setdefault("tweaks", []).append(measure(work, options.base, method, label, drop))
            keep_partial(result, options.json, page)


def keep_partial(result: dict[str, Any], path: Path | None, page: Callable[[dict[str, Any]], str]) -> None:
    """Write what there is so far, as JSON and as a page."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(result))


def prepare(work: Path) -> None:
    """Write the version's rows, the rows to add, and those to judge the new behaviour on."""
    if (work / "support.toml").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    folder = SHARED / "tasks" / "bitext_support_triage"
    train, dev, test = (
        [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "dev", "test")
    )
    texts = list(dict.fromkeys(row["input"] for row in train if row["target"] == OLD))[: ADDED + JUDGED]
    unseen = set(texts)
    write(work / "train.jsonl", [row for row in train if row["input"] not in unseen])
    write(work / "dev.jsonl", dev)
    write(work / "added.jsonl", [{"input": text, "target": NEW} for text in texts[:ADDED]])
    others = [*texts[ADDED:], *(row["input"] for row in test if row["target"] == OLD)]
    write(work / "judged.jsonl", [{"input": text, "target": NEW} for text in others])
    (work / "support.toml").write_text(TASK)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_once(work: Path, base: str, steps: int, methods: list[str]) -> None:
    """Train the versions that are tweaked and publish each in a registry of its own."""
    missing = [method for method in methods if not (work / f"home-{method}").exists()]
    if not missing:
        return
    shutil.rmtree(work / "trained", ignore_errors=True)
    runs = [fw.Run.from_toml(work / "support.toml", method=m, steps=steps, eval_rows=100) for m in missing]
    for run, result in zip(
        runs, fw.fit(fw.load_base(base), runs, out=work / "trained", on_progress=progress_printer(30)), strict=True
    ):
        with Registry.open(work / f"home-{run.config.method}") as registry:
            registry.publish(result.artefact, alias="prod", who="bench")


def measure(work: Path, base: str, method: str, label: str, drop: tuple[str, ...]) -> dict[str, Any]:
    """Run one tweak as the command does; time its phases, then judge on rows that it never saw."""
    out = work / f"out-{method}-{label}"
    shutil.rmtree(out, ignore_errors=True)
    laps: dict[str, list[float]] = {}
    with timed(laps):
        with Registry.open(work / f"home-{method}") as registry:
            result = tweaks.tweak(
                registry,
                lambda: fw.load_base(base),
                "support",
                work / "added.jsonl",
                out=out,
                settings=tweaks.TweakSettings(drop_targets=drop),
                on_progress=progress_printer(30),
                publish=False,
            )
            current = open_origin(registry, live_version(registry, "support")).artefact
    engine = engine_with(fw.load_base(base), {"current": current, "candidate": fw.load_artefact(result.artefact)})
    labels = fw.load_artefact(result.artefact).header.labels
    task = fw.Task.from_toml(work / "support.toml", dev=str(work / "judged.jsonl"), labels=labels)
    unseen = {n: fw.evaluate(engine, task, prefix=n, split="dev").score for n in ("current", "candidate")}
    return {
        "method": method,
        "old rows of the label": label,
        "seconds": {name: round(wall, 1) for name, (wall, _) in laps.items()},
        "cpu_seconds": {name: round(cpu, 1) for name, (_, cpu) in laps.items()},
        "steps": result.trained["steps"],
        "rows": result.trained["rows"],
        "paired": {name: test.to_json() for name, test in result.paired.items()},
        "unseen": unseen | {"rows": len(task.rows("dev"))},
    }


class timed:
    """While active, the parts of a tweak note their wall clock and processor seconds."""

    def __init__(self, laps: dict[str, list[float]]) -> None:
        self.laps = laps

    def __enter__(self) -> None:
        self.before = tweaks.fit, tweaks.judge_rows, time.monotonic(), time.process_time()
        tweaks.fit, tweaks.judge_rows = self.wrap("training", tweaks.fit), self.wrap("judging", tweaks.judge_rows)

    def __exit__(self, *error: object) -> None:
        tweaks.fit, tweaks.judge_rows, wall, cpu = self.before
        whole = [time.monotonic() - wall, time.process_time() - cpu]
        rest = [whole[i] - sum(lap[i] for lap in self.laps.values()) for i in range(2)]
        self.laps |= {"loading and rows": rest, "all": whole}

    def wrap(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.monotonic(), time.process_time()
            found = function(*args, **kwargs)
            self.laps[name] = [time.monotonic() - wall, time.process_time() - cpu]
            return found

        return call


def grid(work: Path, base: str, method: str, shares: list[float], factors: list[float]) -> list[dict[str, Any]]:
    """Train shares of rehearsal and learning rates in one joint pass; judge on unseen new rows and on old dev rows."""
    out = work / f"grid-{method}"
    shutil.rmtree(out, ignore_errors=True)
    frozen = fw.load_base(base)
    with Registry.open(work / f"home-{method}") as registry:
        origin = open_origin(registry, live_version(registry, "support"))
    found = []
    for label, drop in (("dropped", (OLD,)), ("kept", ())):
        rows = read_tweak_rows(origin, work / "added.jsonl", None, dev_share=0.3, drop_targets=drop)
        whole, old, _ = write_task(out / label, origin, rows)
        runs, settings = [], []
        for share in shares:
            for factor in factors if drop else [0.5]:
                chosen = tweaks.TweakSettings(rehearsal=share, lr_factor=factor, patience=99)
                config = tweaks.tweak_config(origin, chosen)
                material = Rehearsal(task=whole, rows=rows, share=share, num_rows=config.steps * config.batch_size)
                vectors, sha256 = origin.artefact.vectors, origin.artefact.sha256
                runs.append(fw.Run(whole, config, f"{share}-{factor}", material, vectors, sha256))
                settings.append((share, factor))
        results = fw.fit(frozen, runs, out=out / label / "runs", on_progress=progress_printer(30))
        unseen = fw.Task(dataclasses.replace(whole.config, dev=str(work / "judged.jsonl")))
        engine = engine_with(
            frozen, {r.name: fw.load_artefact(r.artefact) for r in results} | {"as it was": origin.artefact}
        )
        for name, (share, factor) in [
            ("as it was", (None, None)),
            *zip((r.name for r in results), settings, strict=True),
        ]:
            scores = {
                "unseen new rows": fw.evaluate(engine, unseen, prefix=name, split="dev", decoding="free").score,
                "old dev rows": fw.evaluate(engine, old, prefix=name, split="dev", limit=200, decoding="free").score,
            }
            found.append(
                {"method": method, "old rows of the label": label, "rehearsal": share, "lr_factor": factor, **scores}
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def page(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    from foreword.report import Report, Section, Table, Text, render

    hardware = ", ".join(f"{k} {v}" for k, v in result["hardware"].items() if v)
    sections = [Section("Measured on", (Text(f"{hardware}; load average {' '.join(result['load_average'])}."),))]
    if rows := result.get("tweaks"):
        names = list(rows[0]["seconds"])
        table = Table(
            ("method", "old rows of the label", *(f"{n}, s (processor s)" for n in names), "steps"),
            tuple(
                (r["method"], r["old rows of the label"],
                 *(f"{r['seconds'][n]} ({r['cpu_seconds'][n]})" for n in names), r["steps"])
                for r in rows
            ),
        )  # fmt: skip
        scores = Table(
            ("method", "old rows of the label", "judged on", "rows", "before", "after", "difference, 95 %", "after is"),
            tuple(line for r in rows for line in score_lines(r)),
        )
        sections.append(Section("The tweak", (table, scores)))
    if rows := result.get("grid"):
        columns = tuple(rows[0])
        table = Table(columns, tuple(tuple(r[c] for c in columns) for r in rows))
        sections.append(Section("Rehearsal and learning rate (free decoding, 60 steps)", (table,)))
    return render(Report(result["what"], tuple(sections)), "markdown")


def score_lines(row: dict[str, Any]) -> list[tuple[Any, ...]]:
    head = row["method"], row["old rows of the label"]
    lines: list[tuple[Any, ...]] = []
    for name, test in row["paired"].items():
        low, high = test["interval"]
        change = f"{test['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append((*head, name, test["num_rows"], test["score_b"], test["score_a"], change, test["verdict"]))
    unseen = row["unseen"]
    change = f"{unseen['candidate'] - unseen['current']:+.3f}"
    return [*lines, (*head, "unseen new rows", unseen["rows"], unseen["current"], unseen["candidate"], change, None)]


if __name__ == "__main__":
    main()
