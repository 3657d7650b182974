"""`tweak`: a change of behaviour from a few new rows, trained on from the live version, judged, ready to promote.

Warm start from the live vectors, a rehearsal of the old rows, early stop, a paired test against the current version on
old and on new dev rows, and a candidate in the registry. Nothing is published before all of it is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.config import TrainConfig
from foreword.core.artefact import Artefact, load_artefact, save_artefact
from foreword.core.compile import check_base
from foreword.errors import ConfigError, IncompatibleModel
from foreword.eval.paired import PairedResult
from foreword.recipes.judging import Decoding, engine_with, judge_pair, publish_candidate
from foreword.recipes.origin import Origin, check_publishable, continued, live_version, open_origin
from foreword.recipes.tweak_data import Rehearsal, TweakRows, read_tweak_rows, write_task
from foreword.train.loop import TrainingInterrupted, fit
from foreword.train.run import Run

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.eval.report import EvalReport
    from foreword.eval.tasks import Task
    from foreword.registry.store import Registry, Version
    from foreword.train.loop import Progress

OLD, NEW = "old dev rows", "new dev rows"
NOTED_SHARE = 0.5
"""Of the new dev rows: where the current version answers one thing on so many that the new rows call otherwise, the old
rows with that answer are named as contradicting."""

DECIDING_ROWS = 6
"""With fewer rows McNemar's test finds no difference significant, even where all of them turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TweakSettings:
    """How a tweak is trained and judged; defaults as measured by bench/tweak.py, see docs/tweak.md."""

    rehearsal: float = 0.75
    """Share of old rows in a batch."""
    dev_share: float = 0.3
    """Share of the added rows that is held out to judge on, where no dev rows are given with them."""
    drop_targets: tuple[str, ...] = ()
    """Old answers that are no longer right: their rows are neither rehearsed nor judged."""
    steps: int = 60
    """Optimizer steps at most."""
    lr_factor: float = 0.25
    """Of the learning rate that the version was trained with."""
    patience: int = 2
    """Evaluations without gain before training stops; there are six."""
    eval_rows: int | None = 200
    """Old dev rows judged at most, drawn by seed; None judges all."""
    decoding: Decoding = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rehearsal < 1:
            raise ConfigError(
                f"a rehearsal of {self.rehearsal:g}",
                hint="Give the share of old rows in each batch: 0 for none, 0.5 for half, below 1.",
            )
        if not 0 < self.dev_share < 1:
            raise ConfigError(f"a share of {self.dev_share:g} held out", hint="Give a number between 0 and 1.")
        if self.lr_factor <= 0:
            raise ConfigError(f"a learning rate times {self.lr_factor:g}", hint="Give a number above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TweakResult:
    """What came of a tweak."""

    current: str
    """The version that it was measured against, for example triage@3."""
    artefact: Path
    paired: Mapping[str, PairedResult]
    """The candidate against the current version, on old dev rows and, where there are any, on new ones."""
    reports: Mapping[str, tuple[EvalReport, EvalReport]] = field(repr=False)
    """Candidate's and current version's reports, by the same names."""
    version: Version | None
    """What was published; None where publishing was not asked for."""
    notes: tuple[str, ...] = ()
    trained: Mapping[str, Any] = field(default_factory=dict)
    """steps, best, status and rows of a training; empty for an edit of the hard text."""

    @property
    def lost(self) -> list[str]:
        """The row sets on which the candidate lost."""
        return [name for name, test in self.paired.items() if test.verdict == "worse"]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "current": self.current,
            "candidate": None if self.version is None else self.version.reference,
            "artefact": str(self.artefact),
            "paired": {name: test.to_json() for name, test in self.paired.items()},
            "lost": self.lost,
            "trained": dict(self.trained),
            "notes": list(self.notes),
        }


def tweak(
    registry: Registry,
    base: FrozenModel | Callable[[], FrozenModel],
    task: str,
    add: str | Path,
    *,
    out: str | Path,
    settings: TweakSettings | None = None,
    new_dev: str | Path | None = None,
    start: str | None = None,
    task_file: str | Path | None = None,
    old_dev: str | Path | None = None,
    publish: bool = True,
    who: str | None = None,
    why: str = "",
    on_progress: Callable[[Progress], None] | None = None,
) -> TweakResult:
    """Train a task's live version on with the rows of `add`, judge it against that version, publish a candidate.

    `base` may be a function that loads it: all that can be refused without it is refused before. `start` is another
    version to start from, `task_file` or `old_dev` say where old rows are if the version's header does not. `out`
    receives the artefact and the rows, old and new joined; the candidate's header names them, so that it can be tweaked
    in its turn. The alias `candidate` points at what is published.

    Raises NotFound without task or alias, Conflict where a candidate would go live unasked, DataError where the old
    dev rows are gone, IncompatibleModel on another base, TrainingInterrupted on a signal; the registry is as it was
    then.
    """
    settings, folder = settings or TweakSettings(), Path(out)
    version = live_version(registry, task, start)
    if publish:
        check_publishable(registry, version.task)
    origin = open_origin(registry, version, task_file=task_file, dev=old_dev)
    config = tweak_config(origin, settings)
    rows = read_tweak_rows(
        origin,
        add,
        new_dev,
        dev_share=settings.dev_share,
        drop_targets=settings.drop_targets,
        needs_old_train=settings.rehearsal > 0,
        seed=settings.seed,
    )
    check_empty(folder)
    frozen = base() if callable(base) else base
    check_same_base(frozen, origin)
    whole, old, new = write_task(folder, origin, rows)
    candidate, trained = _train(frozen, origin, whole, rows, config, settings, folder, on_progress)
    engine = engine_with(frozen, {"current": origin.artefact, "candidate": candidate})
    reports, paired = judge_rows(engine, {OLD: (old, settings.eval_rows), NEW: (new, None)}, settings.decoding)
    published = None
    if publish:
        said = why or f"tweak of {version.reference} with {len(rows.new_train)} rows"
        published = publish_candidate(registry, candidate, origin, reports[OLD][0], paired, who=who, why=said)
    assert candidate.path is not None
    return TweakResult(
        current=version.reference,
        artefact=candidate.path,
        paired=paired,
        reports=reports,
        version=published,
        notes=(*_about(rows, origin, settings), *_contradiction(reports[NEW][1], settings)),
        trained=trained,
    )


def _train(
    base: FrozenModel,
    origin: Origin,
    task: Task,
    rows: TweakRows,
    config: TrainConfig,
    settings: TweakSettings,
    folder: Path,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[Artefact, dict[str, Any]]:
    """Train the version's vectors on; return the artefact, and steps, status and rows of the training."""
    version, vectors = origin.version, origin.artefact.vectors
    num_rows = config.steps * config.batch_size * config.accumulate
    material = Rehearsal(task=task, rows=rows, share=settings.rehearsal, num_rows=num_rows, seed=settings.seed)
    run = Run(task, config, f"{version.task}-{config.method}", material, vectors, version.sha256)
    try:
        result = fit(base, [run], out=folder, on_progress=on_progress)[0]
    except TrainingInterrupted as error:
        raise TrainingInterrupted(
            f"{error.message.partition(';')[0]}; nothing was published", hint="Run the same command with another --out."
        ) from error
    if result.error is not None:
        raise result.error
    assert result.artefact is not None
    said = {"of": version.sha256, "added": len(rows.new_train), **dataclasses.asdict(settings)}
    artefact = with_training(load_artefact(result.artefact), {"recipe": origin.recipe.to_json(), "tweak": said})
    counts = {name: len(getattr(rows, name)) for name in ("old_train", "old_dev", "new_train", "new_dev")}
    return artefact, {"steps": len(result.history), "best": result.best, "status": result.status, "rows": counts}


def tweak_config(origin: Origin, settings: TweakSettings) -> TrainConfig:
    """Return the training settings of a tweak: the recipe's, continued."""
    config = continued(
        origin.recipe,
        steps=settings.steps,
        lr_factor=settings.lr_factor,
        patience=settings.patience,
        seed=settings.seed,
    )
    return dataclasses.replace(config, max_train_rows=None)


def check_same_base(base: FrozenModel, origin: Origin) -> None:
    """Raise IncompatibleModel with the way to another base where the version belongs to one."""
    try:
        check_base(base, origin.artefact)
    except IncompatibleModel as error:
        raise IncompatibleModel(
            error.message, hint="Give the base of this version; `foreword migrate` takes tasks to another one."
        ) from error


def check_empty(folder: Path) -> None:
    """Raise ConfigError where `folder` holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty", hint="Give another --out: results do not overwrite results.")


def with_training(artefact: Artefact, extra: Mapping[str, Any]) -> Artefact:
    """Write an artefact again, in its place, with more said about its training."""
    assert artefact.path is not None
    header = dataclasses.replace(artefact.header, training={**artefact.header.training, **extra})
    return dataclasses.replace(save_artefact(artefact.path, header, artefact.tensors), path=artefact.path)


def judge_rows(
    engine: Any, sets: Mapping[str, tuple[Task, int | None]], decoding: Decoding
) -> tuple[dict[str, tuple[EvalReport, EvalReport]], dict[str, PairedResult]]:
    """Judge the engine's `candidate` against its `current` on the dev rows of several tasks, each up to a limit."""
    reports: dict[str, tuple[EvalReport, EvalReport]] = {}
    paired: dict[str, PairedResult] = {}
    for name, (task, limit) in sets.items():
        ours, theirs, paired[name] = judge_pair(
            engine, task, ours="candidate", theirs="current", limit=limit, decoding=decoding
        )
        reports[name] = ours, theirs
    return reports, paired


def _about(rows: TweakRows, origin: Origin, settings: TweakSettings) -> list[str]:
    notes = []
    if rows.num_replaced:
        notes.append(f"{rows.num_replaced} old rows have the input of an added row; the added one stands in its place.")
    if rows.num_dropped:
        notes.append(f"{rows.num_dropped} old rows were dropped with their answers {', '.join(settings.drop_targets)}.")
    if len(rows.new_dev) < DECIDING_ROWS:
        notes.append(f"{len(rows.new_dev)} new dev rows decide nothing at 5 %, whatever comes; --new-dev gives more.")
    stored = origin.artefact.header.training.get("data_sha256")
    changed = rows.old_train and stored and stored != origin.task.data_sha256("train")
    if changed and "tweak" not in origin.artefact.header.training:
        notes.append(f"The training rows are no longer those that {origin.reference} was trained on.")
    return notes


def _contradiction(current: EvalReport, settings: TweakSettings) -> list[str]:
    """Name the answer that the current version gives on most new rows, where these call it wrong."""
    wrong = [row.output for row in current.rows if row.output != row.target]
    if not wrong:
        return []
    answer = max(set(wrong), key=lambda text: (wrong.count(text), text))
    count = wrong.count(answer)
    if count < NOTED_SHARE * current.num_rows or answer in settings.drop_targets:
        return []
    return [
        f"On {count} of {current.num_rows} new dev rows {answer!r} was the answer and is no more. If it is wrong for"
        f" the old rows too, they pull back: leave them out with --drop-target {answer!r}."
    ]
