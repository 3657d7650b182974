"""`prune`: vectors that do harm are taken out, the rest is trained on for a few steps.

Source: XPrompt, Ma et al. 2022, arXiv:2210.04457: some trained vectors have a negative effect, and without them the
others, trained again, do better. Here a vector's worth is its leave-one-out loss, not a gradient's estimate of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foreword.core.artefact import load_artefact
from foreword.core.block import Block
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt, Vectors
from foreword.core.template import SLOT, TaskTemplate
from foreword.doctor.rotation import rotations, turned
from foreword.errors import ConfigError
from foreword.eval.paired import PairedResult, compare_reports
from foreword.eval.read import is_there
from foreword.eval.run import evaluate
from foreword.eval.tasks import Split, Task
from foreword.explain.ablate import answer_losses, count_vectors, form_without
from foreword.explain.effects import OneByOne, leave_one_out
from foreword.explain.estimate import Estimate, Resamples
from foreword.explain.examples import gather
from foreword.recipes.judging import Decoding, engine_with, publish_candidate
from foreword.recipes.origin import (
    Origin,
    check_publishable,
    continued,
    open_origin,
    read_split,
)
from foreword.recipes.tweak import check_empty, check_same_base, with_training
from foreword.train.loop import fit
from foreword.train.run import Run

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.eval.report import EvalReport
    from foreword.registry.store import Registry, Version
    from foreword.train.loop import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSettings:
    """How vectors are chosen, trained on and judged."""

    rows: int = 100
    """Dev rows on which each vector is left out, drawn by seed."""
    only_certain: bool = False
    """Take out only vectors that harm beyond chance (5 % over all vectors, Bonferroni)."""
    steps: int = 60
    lr_factor: float = 0.5
    """Of the learning rate that the version was trained with."""
    patience: int = 2
    eval_rows: int | None = 200
    """Rows judged at most; None judges all."""
    decoding: Decoding = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What came of it."""

    current: str
    num_vectors: int
    one_by_one: OneByOne = field(repr=False)
    removed: tuple[int, ...]
    """Indices of the vectors taken out; empty where none does harm: then nothing was trained."""
    loss: float
    """On the dev rows of the choice, nats per answer token, all vectors in."""
    loss_change: Estimate | None
    """With all of `removed` out, before any training; on the rows that chose them, so it flatters."""
    split: str = ""
    """What candidate, control and current version were judged on."""
    paired: PairedResult | None = None
    """The candidate against the current version."""
    control: PairedResult | None = None
    """All vectors, trained on by the same steps, against the current version: what pruning has no part in."""
    candidate_against_control: PairedResult | None = None
    version: Version | None = None
    artefact: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        tests = {name: getattr(self, name) for name in ("paired", "control", "candidate_against_control")}
        return {
            "current": self.current,
            "num_vectors": self.num_vectors,
            "removed": list(self.removed),
            "effects": [dataclasses.asdict(effect) for effect in self.one_by_one.effects],
            "loss": self.loss,
            "loss_change": None if self.loss_change is None else dataclasses.asdict(self.loss_change),
            "split": self.split,
            **{name: None if test is None else test.to_json() for name, test in tests.items()},
            "candidate": None if self.version is None else self.version.reference,
            "artefact": None if self.artefact is None else str(self.artefact),
        }


def prune(
    registry: Registry,
    base: FrozenModel | Callable[[], FrozenModel],
    reference: str,
    *,
    out: str | Path,
    settings: PruneSettings | None = None,
    task_file: str | Path | None = None,
    publish: bool = True,
    who: str | None = None,
    why: str = "",
    on_progress: Callable[[Progress], None] | None = None,
) -> Pruned:
    """Leave out each vector of a version, take out those that do harm, train the rest on, judge, publish a candidate.

    A control with all vectors takes the same steps in the same pass. Judged is on test rows where the task has some,
    since dev rows have chosen. Raises NotFound, ConfigError, DataError and IncompatibleModel before any work where
    version, rows or base do not fit, TrainingInterrupted on a signal; the registry is as it was then.
    """
    settings, folder = settings or PruneSettings(), Path(out)
    version = registry.resolve(reference)
    if publish:
        check_publishable(registry, version.task)
    origin = open_origin(registry, version, task_file=task_file)
    cure = "Give the task file with --task."
    read_split(origin.task, "train", origin.reference, cure)
    read_split(origin.task, "dev", origin.reference, cure)
    check_empty(folder)
    frozen = base() if callable(base) else base
    check_same_base(frozen, origin)
    chosen = choose(frozen, origin, settings)
    if not chosen.removed:
        return chosen
    runs = make_runs(frozen, origin, chosen.removed, settings)
    results = fit(frozen, runs, out=folder, on_progress=on_progress)
    for result in results:
        if result.error is not None:
            raise result.error
    candidate, control = (load_artefact(result.artefact) for result in results if result.artefact is not None)
    extra = {"recipe": origin.recipe.to_json(), "pruned": {"of": version.sha256, "removed": list(chosen.removed)}}
    candidate = with_training(candidate, extra)
    engine = engine_with(frozen, {"current": origin.artefact, "candidate": candidate, "control": control})
    split, reports = judge_all(engine, origin.task, settings)
    paired = compare_reports(reports["candidate"], reports["current"])
    published = None
    if publish:
        said = why or f"{version.reference} without {len(chosen.removed)} of {chosen.num_vectors} vectors"
        tests = {f"{split} rows": paired}
        published = publish_candidate(registry, candidate, origin, reports["candidate"], tests, who=who, why=said)
    return dataclasses.replace(
        chosen,
        split=split,
        paired=paired,
        control=compare_reports(reports["control"], reports["current"]),
        candidate_against_control=compare_reports(reports["candidate"], reports["control"]),
        version=published,
        artefact=candidate.path,
    )


def choose(base: FrozenModel, origin: Origin, settings: PruneSettings) -> Pruned:
    """Return which vectors do harm: each left out by itself, then taken out together, the worst first, as long as the
    loss falls."""
    vectors = origin.artefact.vectors
    sample = gather(
        base, origin.artefact.header, task=origin.task, split="dev", limit=settings.rows, seed=settings.seed
    )
    draws = Resamples([example.num_answer for example in sample.examples], settings.seed)
    full = answer_losses(base, form_without(base, vectors), sample.examples).numpy()
    found = leave_one_out(base, vectors, sample.examples, full, draws)
    harmful = [
        effect
        for effect in sorted(found.effects, key=lambda effect: effect.loss_change.value)
        if (effect.verdict == "harms" if settings.only_certain else effect.loss_change.value < 0)
    ]
    removed: list[int] = []
    least = full
    for effect in harmful[: count_vectors(vectors) - 1]:
        tried = [*removed, effect.index]
        losses = answer_losses(base, form_without(base, vectors, tried), sample.examples).numpy()
        if losses.sum() >= least.sum():
            break
        removed, least = tried, losses
    return Pruned(
        current=origin.reference,
        num_vectors=count_vectors(vectors),
        one_by_one=found,
        removed=tuple(sorted(removed)),
        loss=float(np.sum(full) / draws.num_tokens.sum()),
        loss_change=draws.difference(least, full) if removed else None,
    )


def make_runs(base: FrozenModel, origin: Origin, removed: Collection[int], settings: PruneSettings) -> list[Run]:
    """Return the run of the vectors that are left, and the control with all of them."""
    config = continued(
        origin.recipe,
        steps=settings.steps,
        lr_factor=settings.lr_factor,
        patience=settings.patience,
        seed=settings.seed,
    )
    vectors, task, sha256 = origin.artefact.vectors, origin.task, origin.version.sha256
    template = without_slots(task.template, removed)
    left = without(base, vectors, removed, template.block(base.tokenizer))
    pruned = Task(dataclasses.replace(task.config, template=template.text, system=template.system))
    frozen = min(config.frozen_vectors, count_vectors(left) - 1)
    name = f"{origin.version.task}-{config.method}"
    return [
        Run(pruned, dataclasses.replace(config, frozen_vectors=frozen), f"{name}-pruned", start=left, parent=sha256),
        Run(task, config, f"{name}-control", start=vectors, parent=sha256),
    ]


def without_slots(template: TaskTemplate, removed: Collection[int]) -> TaskTemplate:
    """Return the template with the slots shorter by the vectors `removed`; a slot that has none left is gone.

    Vectors are counted as they stand in the block: slots in front of all turns, those of the system turn, those around
    the input.
    """
    left, _, right = template.text.partition("{input}")
    lead = re.match(f"(?:{SLOT.pattern})*", left)
    cut = lead.end() if lead and template.chat else 0
    parts = [left[:cut], template.system or "", left[cut:], right]
    used = 0

    def shorter(match: re.Match[str]) -> str:
        nonlocal used
        first, used = used, used + int(match.group(1))
        kept = sum(index not in removed for index in range(first, used))
        return f"{{soft:{kept}}}" if kept else ""

    front, system, rest, behind = (SLOT.sub(shorter, part) for part in parts)
    text = f"{front}{rest}{{input}}{behind}"
    return dataclasses.replace(template, text=text, system=system if template.system is not None else None)


def without(base: FrozenModel, vectors: Vectors, removed: Collection[int], block: Block) -> Vectors:
    """Return vectors less those `removed` (indices over P are behind the text), in the block that is left for them.

    What stood behind a removed vector moves up. The keys of a `kv` are turned back by as many positions as the text
    moves: each keeps its distance to the text, so the text sees exactly what leaving the vectors out by a mask would
    show it, but for literal tokens in front of them, which stand nearer. Vectors of other methods are computed at
    their new places.
    """
    kept = [index for index in range(vectors.num_vectors) if index not in removed]
    if isinstance(vectors, SoftPrompt):
        after = vectors.after
        if after is not None:
            behind = [index for index in range(len(after)) if vectors.num_vectors + index not in removed]
            after = after[torch.tensor(behind, dtype=torch.long)] if behind else None
        return SoftPrompt(vectors.vectors[torch.tensor(kept, dtype=torch.long)], block, after)
    if not kept:
        raise ConfigError(f"all {vectors.num_vectors} vectors are to be removed", hint="Keep one at least.")
    if isinstance(vectors, SoftPrefix):
        return SoftPrefix(vectors.vectors[:, kept], block)
    left = SoftKV(tuple(key[:, kept] for key in vectors.keys), tuple(v[:, kept] for v in vectors.values), block)
    before = (vectors.block or Block((vectors.num_vectors,))).num_positions
    turns = rotations(base)
    if turns is None:
        return left
    return turned(left, turns, [block.num_positions - before] * len(kept))


def judge_all(engine: Any, task: Task, settings: PruneSettings) -> tuple[Split, dict[str, EvalReport]]:
    """Judge the engine's three prefixes on test rows where the task has some, else on dev rows."""
    test = task.config.test
    split: Split = "test" if test is not None and is_there(test) else "dev"
    names: Sequence[str] = ("current", "candidate", "control")
    limit, decoding = settings.eval_rows, settings.decoding
    return split, {n: evaluate(engine, task, prefix=n, split=split, limit=limit, decoding=decoding) for n in names}
