"""`compare_methods`: train, judge and time every method, keep each as it is finished, and put the rows together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from foreword.compare.judging import Stage, judge_method, paired_tests, text_bytes
from foreword.compare.machine import describe_machine
from foreword.compare.plan import BASELINES, SOFT, TRAINED, Plan, Settings, digest, make_plan
from foreword.compare.result import Comparison, MeasuredRow
from foreword.compare.timing import CACHED, answer_tokens, measure
from foreword.compare.training import (
    Job,
    Trained,
    describe_error,
    read_trained,
    train_apart,
    train_method,
)
from foreword.config import load_task
from foreword.core.artefact import write_atomically
from foreword.core.model import FrozenModel, load_base
from foreword.errors import ConfigError
from foreword.eval.report import EvalReport
from foreword.eval.run import versions
from foreword.train.loop import TrainingInterrupted

RESULT, TIMING = "comparison.json", "timing.json"
Tell = Callable[[str], None]


def compare_methods(
    task: str | Path,
    base: str | FrozenModel,
    *,
    out: str | Path,
    settings: Settings | None = None,
    overrides: Sequence[str] = (),
    dtype: str = "auto",
    device: str = "cpu",
    apart: bool = True,
    tell: Tell | None = None,
) -> Comparison:
    """Train every method under one budget, judge all on the same test rows, measure what each costs.

    `task` is a task file, its `[train]` table with `overrides` above it is the budget. Each method's files lie in
    `out/<method>`, the result in `out/comparison.json`. What `out` holds already from the same settings is used again,
    so an interrupted comparison goes on by the same call. With `apart`, and a base given by folder or hub id on a CPU,
    methods train in processes of their own, so that their memory can be compared. `tell` gets a line per stage.

    A method that fails is a row with its error. Raises ConfigError and DataError before any training (also for `out`
    that holds a method trained with other settings), ArtefactError where `out` cannot be written,
    TrainingInterrupted on Ctrl-C with all finished methods kept, RuntimeError if a base tensor changed.
    """
    tell, folder = tell or _silent, Path(out)
    settings = settings or Settings()
    load_task(task, overrides)  # its faults are told before a base is loaded
    write_atomically(folder / "settings.json", json.dumps(dataclasses.asdict(settings), indent=1).encode())
    frozen = load_base(base, dtype=dtype, device=device)  # type: ignore[arg-type]
    plan = make_plan(task, frozen, settings, overrides)
    kept = {method: _kept(plan, method, frozen, folder) for method in settings.methods if method in TRAINED}
    before = frozen.checksum()
    try:
        trained = _train_all(plan, frozen, kept, folder, base if apart and isinstance(base, str) else "", tell)
        comparison = _judge_and_time(plan, frozen, trained, folder, _base_name(base), tell)
    except (KeyboardInterrupt, TrainingInterrupted) as error:
        raise TrainingInterrupted(
            f"stopped; what is finished lies in {folder}", hint="Run the same command again to go on."
        ) from error
    if frozen.checksum() != before:
        raise RuntimeError("a tensor of the base changed during the comparison; do not use its results")
    comparison.save(folder / RESULT)
    return comparison


def _kept(plan: Plan, method: str, base: FrozenModel, folder: Path) -> Trained | None:
    """Return what `folder` holds of a method. Raises ConfigError where that was trained with other settings."""
    found = read_trained(folder / method)
    if found is None or found.error is not None or not (folder / method / str(found.file)).is_file():
        return None
    asked = json.loads(json.dumps(plan.identity(method, base)))
    for key, value in asked.items():
        if found.identity.get(key) != value:
            raise ConfigError(
                f"{folder / method} was trained with {key} = {found.identity.get(key)!r}, asked for is {value!r}",
                hint="Compare with the same settings, or into another folder.",
            )
    return found


def _train_all(
    plan: Plan, base: FrozenModel, kept: Mapping[str, Trained | None], folder: Path, path: str, tell: Tell
) -> dict[str, Trained]:
    """Train what is not kept, one method after the other."""
    trained: dict[str, Trained] = {}
    for method, found in kept.items():
        if found is not None:
            tell(f"{method}: trained before, kept")
            trained[method] = found
            continue
        tell(f"{method}: training, {plan.train.steps} steps of {plan.train.batch_size} rows")
        job = Job(
            method=method,
            task=plan.task.config,
            train=plan.run(method).config,
            lora=plan.settings.lora,
            folder=str(folder / method),
            identity=plan.identity(method, base),
            show=tell is not _silent,
            base=path if base.device.type == "cpu" else "",
            dtype=str(base.dtype).removeprefix("torch."),
            device=str(base.device),
            threads=torch.get_num_threads(),
        )
        trained[method] = train_apart(job) if job.base else train_method(base, job)
        if error := trained[method].error:
            tell(f"{method}: failed, {error['message']}")
    return trained


def _judge_and_time(
    plan: Plan, base: FrozenModel, trained: Mapping[str, Trained], folder: Path, name: str, tell: Tell
) -> Comparison:
    stage, reports = Stage(base, plan), dict[str, EvalReport]()
    errors = {method: one.error for method, one in trained.items() if one.error is not None}
    for method in plan.settings.methods:
        if method in errors:
            continue
        tell(f"{method}: judging")
        try:
            one = trained.get(method)
            if one is not None:
                stage.add(one, folder / method)
            reports[method] = judge_method(stage, method, folder / method, one)
        except Exception as error:  # one method's failure is its row
            errors[method] = describe_error(error)
            tell(f"{method}: failed, {errors[method]['message']}")
    tell("timing, by turns")
    times = _timed(stage, list(reports), trained, folder)
    rows = tuple(
        _row(plan, method, reports.get(method), trained.get(method), times, errors.get(method))
        for method in plan.settings.methods
    )
    splits = [split for split in ("train", "dev", "test") if getattr(plan.task.config, split) is not None]
    return Comparison(
        base=name,
        base_sha256=base.fingerprint.weights_sha256,
        dtype=str(base.dtype).removeprefix("torch."),
        task=plan.task.name,
        metric=plan.task.config.metric,
        rows=rows,
        paired=paired_tests(reports, plan.train.seed),
        budget=_budget(plan),
        settings={**dataclasses.asdict(plan.settings), "answer_tokens": answer_tokens(stage)},
        machine=describe_machine(base.device),
        versions=_versions(),
        data={split: plan.task.data_sha256(split) for split in splits},  # type: ignore[arg-type]
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _timed(
    stage: Stage, methods: Sequence[str], trained: Mapping[str, Trained], folder: Path
) -> dict[str, dict[str, Any]]:
    """Return the times of all methods, from `folder` where the same ones were measured before."""
    plan = stage.plan
    identity = digest(
        {
            "methods": list(methods),
            "trained": {method: dict(one.identity) for method, one in trained.items() if method in methods},
            "test": plan.task.data_sha256("test"),
            "rounds": [plan.settings.timing_rounds, plan.settings.mixed_requests, plan.settings.num_shots],
            "machine": describe_machine(stage.base.device),
        }
    )
    path = folder / TIMING
    try:
        known = json.loads(path.read_bytes())
        if known["identity"] == identity:
            times: dict[str, dict[str, Any]] = known["times"]
            return times
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never measured, or not to the end
    try:
        times = measure(stage, methods)
    finally:
        for engine in (stage.engine, *([stage.lora.engine] if stage.lora else [])):
            engine.close()
    write_atomically(path, json.dumps({"identity": identity, "times": times}, indent=1).encode())
    return times


def _row(
    plan: Plan,
    method: str,
    report: EvalReport | None,
    trained: Trained | None,
    times: Mapping[str, Mapping[str, Any]],
    error: Mapping[str, str] | None,
) -> MeasuredRow:
    found: dict[str, Any] = {"method": method, "metric": plan.task.config.metric, "error": error}
    if report is not None:
        found |= {"score": report.score, "interval": report.interval, "decoding": report.decoding}
        found |= {"num_rows": report.num_rows, "num_cut": report.num_cut, "num_shots": report.num_shots}
    if method in BASELINES:
        found |= {"bytes_per_task": text_bytes(plan, method), "tensor_bytes": 0}
        found |= {"training_s": 0.0, "training_peak_bytes": 0, "training_peak_how": "nothing is trained"}
    elif trained is not None:
        for key in ("bytes_per_task", "tensor_bytes", "training_s", "step_ms", "lr", "steps_done", "rows_seen", "kept"):
            found[key] = getattr(trained, key)
        found |= {"training_peak_bytes": trained.peak_bytes, "training_peak_how": trained.peak_how}
    if taken := times.get(method):
        for key in ("first_token_ms", "latency_ms", "throughput_tokens_per_s", "prompt_positions"):
            found[key] = taken[key]
        if taken["error"] and error is None:
            found["error"] = {"type": "timing", "message": taken["error"], "hint": "The score stands."}
    if cached := times.get(method + CACHED):
        found |= {"first_token_cached_ms": cached["first_token_ms"], "latency_cached_ms": cached["latency_ms"]}
    return MeasuredRow(**found)


def _budget(plan: Plan) -> dict[str, Any]:
    """Return what every trained method got alike."""
    own = ("method", "lr", "num_vectors", "eval_every", "checkpoint_every_s")
    shared = {key: value for key, value in plan.train.to_json().items() if key not in own}
    rows = len(plan.task.rows("train"))
    limit = plan.train.max_train_rows
    return {
        **shared,
        "eval_every": plan.run("lora").eval_every,
        "train_rows": rows if limit is None else min(rows, limit),
        "num_vectors": plan.run(SOFT[0]).template.num_left + plan.run(SOFT[0]).template.num_after,
        "lora": dataclasses.asdict(plan.settings.lora),
    }


def _versions() -> dict[str, str]:
    import importlib.metadata

    try:
        return {**versions(), "peft": importlib.metadata.version("peft")}
    except importlib.metadata.PackageNotFoundError:
        return versions()


def _base_name(base: str | FrozenModel) -> str:
    """Return the name of a base, not the place where it lies."""
    if not isinstance(base, str):
        base = str(getattr(base.model, "name_or_path", "") or base.spec.model_type)
    return Path(base).name if Path(base).exists() else base


def _silent(line: str) -> None:
    return None
