"""Six methods on four shared tasks under one budget: table and Pareto pictures.

python bench/compare.py
python bench/compare.py --tasks trec --steps 6 --batch 4 --rows 20 --work /tmp/try --out /tmp/try/compare

The first writes bench/results/compare_base-3m.json, .md, .svg and .png; the second is a quick try of one task.
Every task and method is kept under --work as it is finished; the same call goes on where it was stopped. Other
settings need another --work.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hardware import describe

from foreword.compare.plan import METHODS, Settings
from foreword.compare.result import Comparison, pareto_front, save_all
from foreword.compare.run import compare_methods
from foreword.compare.table import overview, show
from foreword.report import render

HERE = Path(__file__).parent
TASKS = HERE.parent / "examples/twelve_tasks"
DEFAULT_TASKS = "trec,sst2,restaurant8k_slots,bitext_support_triage"
COLOURS = dict(zip(METHODS, ("0.45", "0.65", "tab:blue", "tab:green", "tab:orange", "tab:red"), strict=True))


def draw(comparisons: list[Comparison], path: Path) -> None:
    """Draw a panel per task: score with its interval against bytes per task, the front as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(comparisons))
    lines = -(-len(comparisons) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for place, comparison in enumerate(comparisons):
        axes = figure.add_subplot(lines, columns, place + 1)
        rows = comparison.judged
        front = pareto_front(rows, lambda row: row.bytes_per_task or 1, lambda row: row.score or 0.0)
        ends = sorted((max(row.bytes_per_task or 1, 1), row.score or 0.0) for row in front)
        axes.plot([x for x, _ in ends], [y for _, y in ends], color="0.8", zorder=0)
        for row in rows:
            low, high = row.interval or (row.score, row.score)
            errors = [[row.score - low], [high - row.score]]
            x, colour = max(row.bytes_per_task or 1, 1), COLOURS[row.method]
            axes.errorbar([x], [row.score], yerr=errors, fmt="o", color=colour, capsize=2, label=show(row.method))
            axes.annotate(show(row.method), (x, row.score), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.margins(x=0.18)
        axes.set_title(comparison.task, fontsize=10)
        axes.set(xlabel="bytes per task", ylabel=comparison.metric)
        axes.grid(alpha=0.25)
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=130, metadata={"Date": None} if suffix == ".svg" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(HERE.parent / "../shared/models/base-3m"))
    parser.add_argument("--tasks", default=DEFAULT_TASKS)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=300, help="test rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="folder for artefacts")
    parser.add_argument("--out", type=Path, help="results without suffix; default bench/results/compare_<base>")
    options = parser.parse_args()
    if not (TASKS / "../../../shared/tasks").is_dir() or not Path(options.base).is_dir():
        sys.exit("skipped: ../shared/tasks or the base is not here")
    torch.set_num_threads(options.threads)
    out = options.out or HERE / f"results/compare_{Path(options.base).name}"
    overrides = [f"train.steps={options.steps}", f"train.batch_size={options.batch}", f"train.seed={options.seed}"]
    settings = Settings(methods=tuple(options.methods.split(",")), rows_limit=options.rows)
    started, comparisons = time.monotonic(), []
    for name in options.tasks.split(","):
        print(f"{name} ({time.monotonic() - started:.0f} s)", flush=True)
        comparison = compare_methods(
            TASKS / f"{name}.toml", options.base, out=options.work / name, settings=settings, overrides=overrides,
            dtype=options.dtype, device=options.device, tell=lambda line: print(f"  {line}", flush=True),
        )  # fmt: skip
        comparisons.append(comparison)
        write(comparisons, out)
    print(f"done in {time.monotonic() - started:.0f} s: {out}.json, .md, .svg, .png")


def write(comparisons: list[Comparison], out: Path) -> None:
    """Write what is there so far: JSON, Markdown, pictures."""
    extra: dict[str, Any] = {"what": "six methods under one budget (docs/compare.md)", "hardware": describe("peft")}
    save_all(comparisons, out.with_suffix(".json"), extra)
    text = render(overview(comparisons), "markdown")
    picture = f"\n![Score against bytes per task]({out.name}.svg)\n"
    out.with_suffix(".md").write_text(text + picture, encoding="utf-8")
    draw(comparisons, out)


if __name__ == "__main__":
    main()
