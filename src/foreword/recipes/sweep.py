"""`sweep`: settings of one task as runs of one joint pass, the worse half stopped at each rung."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from foreword.config import load_task
from foreword.core.artefact import load_artefact, write_atomically
from foreword.core.model import FrozenModel
from foreword.errors import ConfigError, TrainingDiverged
from foreword.eval.paired import PairedResult, compare_reports
from foreword.eval.report import EvalReport
from foreword.eval.run import evaluate
from foreword.eval.tasks import Task
from foreword.recipes.halving import Halving, check_rungs, direction
from foreword.recipes.judging import engine_with
from foreword.recipes.memory import MemoryPlan, plan_memory, show_bytes
from foreword.recipes.space import TIMES, Axis, Setting, check_axes, grid_settings, random_settings
from foreword.recipes.sweep_report import sweep_report
from foreword.recipes.sweep_result import Candidate, Options, Ranked, SweepResult, best_run
from foreword.report import write
from foreword.train.checkpoint import FILE
from foreword.train.loop import RESULTS, Progress, fit
from foreword.train.run import Run, RunResult

PLAN = "sweep.plan.json"
RESULT = "sweep.json"


def make_candidates(
    task: str | Path, grid: Sequence[str], options: Options, overrides: Sequence[str] = ()
) -> list[Candidate]:
    """Return the settings of a sweep over `task`, each with its runs; nothing is loaded but the task file.

    Raises ConfigError for a bad grid or setting, for less than two settings, for a task without dev rows, and for
    rungs that fall on no evaluation.
    """
    axes = [Axis.parse(text) for text in grid]
    check_axes(axes)
    if options.num_random is None:
        settings = grid_settings(axes)
    else:
        settings = random_settings(axes, options.num_random, options.sample_seed)
    if len(settings) < 2:
        raise ConfigError(
            f"the sweep has {len(settings)} setting{'' if len(settings) == 1 else 's'}, it takes 2 at least",
            hint="Give a key two values or more, such as --grid train.lr=0.05,0.1, or use foreword train.",
        )
    candidates = [_candidate(task, setting, number, options, overrides) for number, setting in enumerate(settings, 1)]
    runs = [run for candidate in candidates for run in candidate.runs]
    config = runs[0].task.config
    if config.dev is None:
        raise ConfigError(
            f"task {config.name!r} has no dev rows; a sweep ranks its settings on them, and stops the worse at its "
            "rungs",
            hint="Give [task] a dev file.",
        )
    if runs[0].config.share is not None:
        raise ConfigError("train.share is for several tasks, a sweep has one", hint="Leave it out.")
    check_rungs(runs, options.rungs)
    return candidates


def sweep(
    base: FrozenModel,
    candidates: Sequence[Candidate],
    *,
    out: str | Path,
    options: Options | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> SweepResult:
    """Train the settings jointly, stop the worse part at each rung, and compare the best two on dev rows.

    A setting that runs to the end has the vectors it would get alone. `out` receives what `fit` writes for every run,
    one folder a pass where there are several, `sweep.json` and `sweep.html`; with `resume` an interrupted sweep goes
    on, and makes the same decisions. In several passes each pass halves by itself. Raises ConfigError before any
    training where the runs do not fit the memory, naming the plan that fits.
    """
    options, folder = options or Options(), Path(out)
    runs = [run for candidate in candidates for run in candidate.runs]
    memory = _plan(base, candidates, folder, options, resume)
    if tell is not None:
        tell(
            f"{len(candidates)} settings, {len(runs)} runs in {memory.passes} joint "
            f"{'pass' if memory.passes == 1 else 'passes'}: {show_bytes(memory.need.total)} over the base"
            + ("" if memory.free is None else f", {show_bytes(memory.free)} free")
        )
    results: dict[str, RunResult] = {}
    for number in range(memory.passes):
        where = folder if memory.passes == 1 else folder / f"pass-{number + 1}"
        results |= _train_pass(base, candidates[number :: memory.passes], where, memory, options, on_progress)
    measure = direction(runs[0])[1]
    ranking = _rank(candidates, results, measure)
    reports, paired = _judge(base, ranking, runs[0].task, options.judge_rows, measure)
    steps = max(run.config.steps for run in runs)
    result = SweepResult(runs[0].task.name, measure, ranking, steps, memory, options, reports, paired)
    write_atomically(folder / RESULT, (json.dumps(result.to_json(), indent=1) + "\n").encode())
    write(sweep_report(result), folder / "sweep.html")
    return result


def _candidate(
    task: str | Path, setting: Setting, number: int, options: Options, overrides: Sequence[str]
) -> Candidate:
    """Return a setting with its runs; a rate such as "2x" becomes the number that it stands for."""
    times = TIMES.fullmatch(str(setting.get("lr", "")))
    setting = {key: value for key, value in setting.items() if not (times and key == "lr")}
    own = [f"train.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in setting.items()]
    task_config, config = load_task(task, [*overrides, *own])
    subject, name = Task(task_config), f"{task_config.name}-{number:02d}"
    if times:
        factor = float(times.group(1))
        if factor <= 0:
            raise ConfigError(f"train.lr = {factor:g}x is not above 0", hint="For example 0.5x,1x,2x.")
        setting["lr"] = float(f"{factor * Run(subject, dataclasses.replace(config, lr=None), name).lr:.6g}")
        config = dataclasses.replace(config, lr=setting["lr"])
    seeds = range(config.seed, config.seed + options.seeds)
    return Candidate(
        number,
        setting,
        tuple(
            Run(subject, dataclasses.replace(config, seed=seed), name if len(seeds) == 1 else f"{name}-seed{seed}")
            for seed in seeds
        ),
    )


def _plan(
    base: FrozenModel, candidates: Sequence[Candidate], folder: Path, options: Options, resume: bool
) -> MemoryPlan:
    """Return how the runs are spread over passes: as an interrupted sweep in `folder` had it, else as fits now."""
    path = folder / PLAN
    asked = {
        "settings": [candidate.setting for candidate in candidates],
        "options": json.loads(json.dumps(dataclasses.asdict(options))),
    }
    if resume:
        saved = _read_plan(path)
        for key, theirs in (saved["options"] | {"settings": saved["settings"]}).items():
            ours = asked["settings"] if key == "settings" else asked["options"][key]
            if ours != theirs:
                raise ConfigError(
                    f"{folder} holds a sweep with {key} = {theirs!r}, asked for is {ours!r}",
                    hint="Resume with the same command, or sweep into another folder.",
                )
        return MemoryPlan.from_json(saved["memory"])
    if path.exists() and any((place / name).exists() for place in _folders(folder) for name in (FILE, RESULTS)):
        raise ConfigError(f"{folder} holds a sweep", hint="Go on with --resume, or use another folder.")
    runs = [run for candidate in candidates for run in candidate.runs]
    plan = plan_memory(base, runs, micro_tokens=options.micro_tokens, passes=options.passes, unit=options.seeds)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**asked, "memory": plan.to_json()}, indent=1).encode())
    return plan


def _folders(folder: Path) -> list[Path]:
    """Return where a sweep's runs may lie: its folder, or one for each pass."""
    return [folder, *folder.glob("pass-*")]


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = json.loads(path.read_bytes())
        return saved
    except (OSError, ValueError) as error:
        raise ConfigError(f"there is no sweep to resume in {path.parent}: {error}", hint="Check --out.") from error


def _train_pass(
    base: FrozenModel,
    candidates: Sequence[Candidate],
    folder: Path,
    memory: MemoryPlan,
    options: Options,
    on_progress: Callable[[Progress], None] | None,
) -> dict[str, RunResult]:
    """Train one pass, or read what it left; return the results by name."""
    if (folder / RESULTS).exists():
        return {result.name: result for result in read_results(folder)}
    settings = {run.name: candidate.name for candidate in candidates for run in candidate.runs}
    results = fit(
        base,
        [run for candidate in candidates for run in candidate.runs],
        out=folder,
        resume=folder.is_dir(),
        on_progress=on_progress,
        micro_tokens=memory.need.micro_tokens,
        controller=Halving(settings, options.rungs, options.keep),
        reports=False,
    )
    return {result.name: result for result in results}


def read_results(folder: Path) -> list[RunResult]:
    """Return what a finished `fit` left in `folder`: results.json and the histories."""
    results = []
    for row in json.loads((folder / RESULTS).read_bytes()):
        lines = (folder / f"{row['name']}.history.jsonl").read_text().splitlines()
        artefact = None if row["artefact"] is None else folder / Path(row["artefact"]).name
        error = None if row["error"] is None else TrainingDiverged(row["error"])
        history = [json.loads(line) for line in lines]
        results.append(RunResult(row["name"], row["status"], artefact, row["best"], history, error))
    return results


def _rank(candidates: Sequence[Candidate], results: dict[str, RunResult], measure: str) -> tuple[Ranked, ...]:
    ranked = []
    for candidate in candidates:
        own = tuple(results[run.name] for run in candidate.runs)
        known = [result.best["value"] for result in own if result.best.get("value") is not None]
        value = mean(known) if len(known) == len(own) else None
        spread = (min(known), max(known)) if value is not None and len(own) > 1 else None
        steps = max(len(result.history) for result in own)
        ranked.append(Ranked(candidate.name, candidate.setting, value, spread, steps, own))
    sign = -1 if measure == "dev_metric" else 1
    return tuple(sorted(ranked, key=lambda item: math.inf if item.value is None else sign * item.value))


def _judge(
    base: FrozenModel, ranking: Sequence[Ranked], task: Task, rows: int, measure: str
) -> tuple[tuple[EvalReport, ...], PairedResult | None]:
    """Let the best two settings answer the same dev rows, and compare them."""
    best = [run for run in (best_run(ranked, measure) for ranked in ranking[:2]) if run.artefact is not None]
    if not rows or not best:
        return (), None
    artefacts = {run.name: load_artefact(run.artefact) for run in best if run.artefact is not None}
    engine = engine_with(base, artefacts)
    reports = tuple(evaluate(engine, task, prefix=name, split="dev", limit=rows) for name in artefacts)
    return reports, compare_reports(*reports) if len(reports) == 2 else None
