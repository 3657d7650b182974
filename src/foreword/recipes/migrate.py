"""`migrate`: the base was updated; every task is trained on from its old vectors and stored recipe, in one joint pass.

Each candidate stands beside the old version on the old base, and beside the old vectors on the new base as they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foreword.config import load_task
from foreword.core.artefact import load_artefact
from foreword.core.compile import check_base, compile
from foreword.core.init import from_vectors
from foreword.errors import ConfigError, NotFound, did_you_mean
from foreword.eval.paired import PairedResult, compare_reports
from foreword.eval.read import is_there
from foreword.eval.run import evaluate
from foreword.eval.tasks import Split, rows_sha256, sample_rows
from foreword.recipes.judging import Decoding, engine_with, publish_candidate
from foreword.recipes.origin import (
    Origin,
    check_publishable,
    live_version,
    open_origin,
    read_split,
    restart_lr,
)
from foreword.registry.lookup import PROD
from foreword.train.loop import RESULTS, fit
from foreword.train.run import Run

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.core.prompt import Vectors
    from foreword.core.spec import ModelSpec
    from foreword.eval.report import EvalReport
    from foreword.registry.store import Registry, Version
    from foreword.train.loop import Progress

Outcome = Literal["migrated", "diverged", "on this base already"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated:
    """What became of one task."""

    current: str
    """The old version, for example triage@3."""
    outcome: Outcome
    start: str = ""
    """What training started from, in words."""
    split: str = ""
    num_rows: int = 0
    metric: str = ""
    old_score: float | None = None
    """Of the old version on the old base: judged now where that base was given, else as stored; None: unknown."""
    is_stored: bool = False
    """Whether `old_score` is that of an earlier evaluation on the same rows, so that no paired test is possible."""
    untrained: EvalReport | None = field(default=None, repr=False)
    """The old vectors on the new base as they are; None where they do not fit it."""
    report: EvalReport | None = field(default=None, repr=False)
    """The candidate on the new base."""
    paired: PairedResult | None = None
    """The candidate on the new base against the old version on the old one."""
    version: Version | None = None
    """What was published."""
    artefact: Path | None = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        plain = ("current", "outcome", "start", "split", "num_rows", "metric", "old_score", "is_stored", "error")
        return {name: getattr(self, name) for name in plain} | {
            "untrained": None if self.untrained is None else self.untrained.score,
            "score": None if self.report is None else self.report.score,
            "interval": None if self.report is None else list(self.report.interval),
            "paired": None if self.paired is None else self.paired.to_json(),
            "candidate": None if self.version is None else self.version.reference,
            "artefact": None if self.artefact is None else str(self.artefact),
        }


@dataclass(frozen=True, slots=True)
class Measure:
    """Rows to judge on: those of the stored evaluation where they are still there."""

    split: Split
    limit: int | None
    seed: int
    decoding: Decoding
    stored_score: float | None


def migrate(
    registry: Registry,
    base: FrozenModel | Callable[[], FrozenModel],
    *,
    out: str | Path,
    tasks: Sequence[str] | None = None,
    task_files: Sequence[str | Path] = (),
    old_base: FrozenModel | Callable[[], FrozenModel] | None = None,
    steps: int | None = None,
    lr_factor: float = 0.25,
    eval_rows: int | None = 200,
    publish: bool = True,
    resume: bool = False,
    who: str | None = None,
    why: str = "",
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Migrated]:
    """Train the live versions of `tasks` (all with an alias prod) on for a new base, judge them, publish candidates.

    Each run starts from the old vectors; where the new base has other shapes, from the recipe's own start, and the
    result names the field. The recipe is what the version's header holds; `steps` and `lr_factor` change it for all.
    `task_files` give the rows of tasks whose header does not, by their names. All runs share one pass (`fit`), each
    gets the vectors it would get alone. With `resume`, an interrupted pass in `out` goes on, a finished one is judged.

    Raises NotFound, ConfigError or DataError before any training where a task, its recipe or its rows are not to be
    found, TrainingInterrupted on a signal with the state saved; the registry is as it was then.
    """
    folder = Path(out)
    origins = find_origins(registry, tasks, task_files, publish)
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", hint="Go on with --resume, or give another --out.")
    new = base() if callable(base) else base
    moving = [origin for origin in origins if origin.artefact.header.base.first_difference(new.fingerprint)]
    done = [Migrated(current=o.reference, outcome="on this base already") for o in origins if o not in moving]
    if not moving:
        return done
    old = old_base() if callable(old_base) else old_base
    if old is not None:
        for origin in moving:
            check_base(old, origin.artefact)
    runs = [make_run(new, origin, steps, lr_factor) for origin in moving]
    if resume and (folder / RESULTS).exists():
        statuses = {row["name"]: row for row in json.loads((folder / RESULTS).read_bytes())}
    else:
        results = fit(new, runs, out=folder, resume=resume, on_progress=on_progress)
        statuses = {result.name: result.to_json() for result in results}
    measures = [measure_for(origin, eval_rows) for origin in moving]
    found = [
        judge_migrated(new, old, origin, run, measure, folder / f"{run.name}.safetensors", statuses[run.name])
        for origin, run, measure in zip(moving, runs, measures, strict=True)
    ]
    if publish:
        found = [publish_migrated(registry, each, o, who, why) for each, o in zip(found, moving, strict=True)]
    return done + found


def find_origins(
    registry: Registry, tasks: Sequence[str] | None, task_files: Sequence[str | Path], publish: bool
) -> list[Origin]:
    """Return the live versions of the tasks with recipe and rows, all checked to be there."""
    known = registry.tasks()
    names = list(tasks) if tasks else [task.name for task in known if PROD in task.aliases]
    if not names:
        raise NotFound(
            f"no task of the registry {registry.home} has an alias {PROD}",
            hint="Name the versions that serve: `foreword tag TASK@1 prod`.",
        )
    files = {load_task(path)[0].name: path for path in task_files}
    if foreign := sorted(files.keys() - set(names)):
        raise ConfigError(
            f"{files[foreign[0]]} is of the task {foreign[0]!r}, which is not migrated",
            hint=did_you_mean(foreign[0], names),
        )
    origins = []
    for name in names:
        version = live_version(registry, name)
        if publish:
            check_publishable(registry, version.task)
        origin = open_origin(registry, version, task_file=files.get(name))
        cure = f"Give the task file with --task, or leave {name} out: --tasks names those to migrate."
        read_split(origin.task, "train", origin.reference, cure)
        read_split(origin.task, "dev", origin.reference, cure)
        origins.append(origin)
    return origins


def make_run(base: FrozenModel, origin: Origin, steps: int | None, lr_factor: float) -> Run:
    """Return the run that takes a version to `base`: from its vectors where they fit, else from its recipe's start."""
    recipe = dataclasses.replace(origin.recipe, steps=steps or origin.recipe.steps)
    name = f"{origin.version.task}-{recipe.method}"
    if shape_difference(origin, base.spec) is not None:
        return Run(origin.task, recipe, name, parent=origin.version.sha256)
    lr = restart_lr(recipe) * lr_factor if recipe.encoder == "none" else recipe.lr
    config = dataclasses.replace(recipe, lr=lr, init=None)
    return Run(origin.task, config, name, start=origin.artefact.vectors, parent=origin.version.sha256)


def shape_difference(origin: Origin, spec: ModelSpec) -> tuple[str, int, int] | None:
    """Return (field, there, here) of the first shape in which a base cannot take a version's vectors, or None."""
    old, method = origin.artefact.header.spec, origin.version.method
    fields = {"prompt": ("embed_size",), "prefix": ("num_layers", "hidden_size"), "kv": ("num_layers",)}[method]
    for name in fields:
        if getattr(old, name) != getattr(spec, name):
            return name, getattr(old, name), getattr(spec, name)
    if method == "kv":
        for index, (one, other) in enumerate(zip(old.layers, spec.layers, strict=True)):
            for name in ("num_kv_heads", "head_dim", "value_dim"):
                if getattr(one, name) != getattr(other, name):
                    return f"layer {index} {name}", getattr(one, name), getattr(other, name)
    return None


def measure_for(origin: Origin, eval_rows: int | None) -> Measure:
    """Return on which rows a candidate is judged: those of the stored evaluation, else dev rows."""
    stored = origin.version.evaluation
    split, num, score = stored.get("split"), stored.get("num_rows"), stored.get("score")
    path = {"dev": origin.task.config.dev, "test": origin.task.config.test}.get(str(split))
    if path is not None and is_there(path) and isinstance(num, int) and isinstance(score, int | float):
        seed = stored.get("seed") if isinstance(stored.get("seed"), int) else 0
        rows = sample_rows(origin.task.rows(split), num, seed)  # type: ignore[arg-type]
        if rows_sha256(rows) == stored.get("data_sha256"):
            decoding = stored["decoding"] if stored.get("decoding") in ("free", "labels") else "auto"
            return Measure(split, num, seed, decoding, float(score))  # type: ignore[arg-type]
    return Measure("dev", eval_rows, 0, "auto", None)


def judge_migrated(
    new: FrozenModel,
    old: FrozenModel | None,
    origin: Origin,
    run: Run,
    measure: Measure,
    path: Path,
    status: Mapping[str, Any],
) -> Migrated:
    """Judge one candidate, the old vectors on the new base, and the old version on the old base where that is there."""
    if status["status"] == "diverged":
        error = status["error"] or ""
        return Migrated(current=origin.reference, outcome="diverged", artefact=path, error=error)
    prefixes: dict[str, Any] = {"candidate": load_artefact(path)}
    if run.start is not None:
        prefixes["untrained"] = untrained_prefix(new, run, run.start)
    engine = engine_with(new, prefixes)
    reports = {name: judge_on(engine, origin, measure, name) for name in prefixes}
    before = None if old is None else judge_on(engine_with(old, {"old": origin.artefact}), origin, measure, "old")
    report = reports["candidate"]
    difference = shape_difference(origin, new.spec)
    return Migrated(
        current=origin.reference,
        outcome="migrated",
        start="its vectors" if difference is None else "its recipe's init: {} {} there, {} here".format(*difference),
        split=measure.split,
        num_rows=report.num_rows,
        metric=report.metric,
        old_score=measure.stored_score if before is None else before.score,
        is_stored=before is None and measure.stored_score is not None,
        untrained=reports.get("untrained"),
        report=report,
        paired=None if before is None else compare_reports(report, before),
        artefact=path,
    )


def untrained_prefix(base: FrozenModel, run: Run, start: Vectors) -> Any:
    """Return old vectors compiled on the new base as training found them, with the run's template."""
    template = run.template
    vectors = from_vectors(start, template.block(base.tokenizer), after=template.num_after)
    return dataclasses.replace(compile(base, vectors), template=template, max_new_tokens=run.task.config.max_new_tokens)


def judge_on(engine: Any, origin: Origin, measure: Measure, name: str) -> EvalReport:
    """Judge one of an engine's prefixes on the rows of `measure`."""
    return evaluate(
        engine,
        origin.task,
        prefix=name,
        split=measure.split,
        limit=measure.limit,
        seed=measure.seed,
        decoding=measure.decoding,
    )


def publish_migrated(registry: Registry, found: Migrated, origin: Origin, who: str | None, why: str) -> Migrated:
    """Publish a candidate with its evaluation; what diverged stays unpublished."""
    if found.report is None or found.artefact is None:
        return found
    tests = {} if found.paired is None else {f"{found.split} rows": found.paired}
    said = why or f"{origin.reference} on a new base"
    artefact = load_artefact(found.artefact)
    version = publish_candidate(registry, artefact, origin, found.report, tests, who=who, why=said)
    return dataclasses.replace(found, version=version)
