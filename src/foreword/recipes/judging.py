"""Versions judged side by side on the same rows, and what of it a registry keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from foreword.core.artefact import Artefact
from foreword.core.compile import compile
from foreword.core.prompt import KVPrefix
from foreword.engine.engine import Engine
from foreword.eval.paired import PairedResult, compare_reports
from foreword.eval.run import evaluate
from foreword.recipes.origin import CANDIDATE, Origin

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.eval.report import EvalReport
    from foreword.eval.tasks import Split, Task
    from foreword.registry.store import Registry, Version

Decoding = Literal["auto", "free", "labels"]


def engine_with(base: FrozenModel, prefixes: Mapping[str, Artefact | KVPrefix]) -> Engine:
    """Return an engine over `base` that holds these artefacts, compiled, by name."""
    engine = Engine(base)
    for name, source in prefixes.items():
        prefix = source if isinstance(source, KVPrefix) else compile(base, source)
        engine.add_prefix(name, dataclasses.replace(prefix, name=name))
    return engine


def judge_pair(
    engine: Engine,
    task: Task,
    *,
    ours: str,
    theirs: str,
    split: Split = "dev",
    limit: int | None = None,
    decoding: Decoding = "auto",
) -> tuple[EvalReport, EvalReport, PairedResult]:
    """Judge two of the engine's prefixes on the same rows; return both reports and `ours` against `theirs`."""
    a, b = (evaluate(engine, task, prefix=name, split=split, limit=limit, decoding=decoding) for name in (ours, theirs))
    return a, b, compare_reports(a, b)


def publish_candidate(
    registry: Registry,
    artefact: Artefact,
    origin: Origin,
    report: EvalReport,
    paired: Mapping[str, PairedResult],
    *,
    who: str | None,
    why: str,
) -> Version:
    """Publish an artefact as its origin's candidate, with its report and the paired tests against that version.

    The gate of `promote` refuses a candidate that lost one of them to the version that it would replace. A file that
    was published before, as by an interrupted recipe that goes on, keeps the evaluation that it has.
    """
    assert artefact.path is not None
    task, tests = origin.version.task, {name: test.to_json() for name, test in paired.items()}
    evaluation = {**report.to_json(), "paired": {"against": origin.version.sha256, "tests": tests}}
    known = artefact.sha256 in {version.sha256 for version in registry.versions(task)}
    return registry.publish(
        artefact.path, task=task, alias=CANDIDATE, who=who, why=why, evaluation=None if known else evaluation
    )
