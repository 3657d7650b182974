"""Worked examples of migrate, prune and ensemble on base-3m, scored and timed.

python bench/recipes.py --work .bench/tweak [--only migrate] [--json bench/results/recipes.json]

Takes the versions that bench/tweak.py trained into `--work` (kv and prefix of bitext_support_triage, 240 steps).
migrate: the base's matrices moved by 5 and 20 % of their standard deviation stand for its update. prune: both versions.
ensemble: three prefixes by seeds, trained in one pass, voting.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from hardware import describe
from tweak import SHARED, keep_partial

import foreword as fw
from foreword.cli.train_command import progress_printer
from foreword.recipes import ensemble as ensembles
from foreword.recipes import migrate as moves
from foreword.recipes import prune as prunes
from foreword.registry.store import Registry

METHODS = ("kv", "prefix")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(SHARED / "models" / "base-3m"))
    parser.add_argument("--work", type=Path, default=Path(".bench/tweak"))
    parser.add_argument("--only", default="migrate,prune,ensemble")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = options.work.resolve()
    result: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    result |= {"what": "recipes on bitext_support_triage, base-3m, P = 20", "hardware": describe()}
    base = fw.load_base(options.base)
    for name in options.only.split(","):
        wall, cpu = time.monotonic(), time.process_time()
        found = {"migrate": migrate, "prune": prune, "ensemble": ensemble}[name](base, work)
        result[name] = {
            "found": found,
            "seconds": round(time.monotonic() - wall, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }
        keep_partial(result, options.json, page)
    print(page(result))


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def migrate(base: fw.FrozenModel, work: Path) -> list[dict[str, Any]]:
    found = []
    for noise, factors in ((0.05, (1.0, 0.25)), (0.2, (0.25,))):
        for factor in factors:
            with Registry.open(fresh(work / "home-migrate")) as registry:
                for method in METHODS:
                    artefact = work / "trained" / f"support-{method}.safetensors"
                    registry.publish(artefact, task=f"support-{method}", alias="prod", who="bench")
                moved = moves.migrate(
                    registry,
                    fw.FrozenModel(updated(base, noise), base.tokenizer),
                    out=fresh(work / "out-migrate"),
                    old_base=base,
                    steps=60,
                    lr_factor=factor,
                    eval_rows=100,
                    on_progress=progress_printer(30),
                )
            found += [{"noise": noise, "lr_factor": factor, **each.to_json()} for each in moved]
    return found


def updated(base: fw.FrozenModel, noise: float) -> Any:
    """Return the base's model with every matrix moved by a share of its standard deviation."""
    import copy

    model = copy.deepcopy(base.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return model


def prune(base: fw.FrozenModel, work: Path) -> list[dict[str, Any]]:
    found = []
    for method in METHODS:
        with Registry.open(work / f"home-{method}") as registry:
            pruned = prunes.prune(
                registry,
                base,
                "support@prod",
                out=fresh(work / f"out-prune-{method}"),
                settings=prunes.PruneSettings(rows=60, steps=40),
                publish=False,
                on_progress=progress_printer(30),
            )
        found.append({"method": method, **pruned.to_json()})
    return found


def ensemble(base: fw.FrozenModel, work: Path) -> dict[str, Any]:
    run = fw.Run.from_toml(work / "support.toml", method="prefix", steps=80, eval_rows=100)
    out = fresh(work / "out-ensemble")
    members = ensembles.train_members(base, run.task, run.config, 3, out=out, on_progress=progress_printer(30))
    test = SHARED / "tasks" / "bitext_support_triage" / "test.jsonl"
    task = fw.Task(dataclasses.replace(run.task.config, test=str(test)))
    found = ensembles.ensemble(base, task, members, split="test", limit=200).to_json()
    return {key: value for key, value in found.items() if key not in ("members", "votes")} | {
        kind: {name: report["score"] for name, report in found[kind].items()} for kind in ("members", "votes")
    }


def page(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    from foreword.report import Report, Section, Table, Text, render

    hardware = ", ".join(f"{k} {v}" for k, v in result["hardware"].items() if v)
    sections = [Section("Measured on", (Text(f"{hardware}."),))]
    for name in ("migrate", "prune", "ensemble"):
        if name not in result:
            continue
        found = result[name]["found"]
        took = Text(f"{result[name]['seconds']} s, {result[name]['cpu_seconds']} s of processor time.")
        if name == "migrate":
            columns = (
                "noise",
                "learning rate times",
                "task",
                "old base",
                "new base, untrained",
                "new base, 60 steps",
                "difference, 95 %",
                "it is",
            )
            rows = [
                (r["noise"], r["lr_factor"], r["current"], r["old_score"], r["untrained"], r["score"],
                 change(r["paired"]), r["paired"]["verdict"])
                for r in found
            ]  # fmt: skip
        elif name == "prune":
            columns = ("method", "taken out", "loss change before training", "pruned", "control", "version before")
            rows = [
                (r["method"], f"{len(r['removed'])} of {r['num_vectors']}",
                 r["loss_change"] and f"{r['loss_change']['value']:+.4f}",
                 *((r["paired"]["score_a"], r["control"]["score_a"], r["paired"]["score_b"]) if r["paired"]
                   else (None, None, None)))
                for r in found
            ]  # fmt: skip
        else:
            columns = ("what", "exact match")
            rows = [*found["members"].items(), *((f"vote: {k}", v) for k, v in found["votes"].items())]
            rows += [(f"{k} against the best member", change(v)) for k, v in found["paired"].items()]
        sections.append(Section(name, (Table(columns, tuple(map(tuple, rows))), took)))
    return render(Report(result["what"], tuple(sections)), "markdown")


def change(test: dict[str, Any]) -> str:
    low, high = test["interval"]
    return f"{test['difference']:+.3f} [{low:+.3f}, {high:+.3f}], {test['num_rows']} rows, p {test['p_value']:.2g}"


if __name__ == "__main__":
    main()
