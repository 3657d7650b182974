"""Checks of how a training goes: finite numbers, a start at a fair scale, a rate that moves and does not throw, dev."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from foreword.doctor.checks.distillation import tail_finding
from foreword.doctor.finding import Finding
from foreword.doctor.learning_rate import measure_rate
from foreword.doctor.probe_training import ProbeFailed, check, gradients_of, losses_of, skipped
from foreword.doctor.subjects import TrainingRun
from foreword.doctor.training_state import seeded

ENORMOUS = 1000.0
"""Times the 99th percentile of real rows: trained rows of healthy runs were seen at up to 10 times."""
FAR_FROM_REAL = 3.0
"""Times the 99th percentile of real rows (or a third of the 1st): a start beyond is at the wrong scale. N(0, 1) rows
are 50 times as long as the embeddings of a base whose standard deviation is 0.02, and 7 times those of GPT-2."""
SEEDS_APART = 0.3
"""Spread of the last losses over seeds, relative to their median, that a fair start does not show."""
OVERFIT_NATS, OVERFIT_SHARE = 0.05, 0.02
"""What the dev loss must have risen by over its best, both of them, while the training loss fell by `FELL_SHARE`."""
FELL_SHARE = 0.1
GROWN = 30.0
"""Times the norm at step 0, or that of real rows where it is longer: healthy runs were seen at up to 6 times."""
DIVERGED = 1.2
"""Times the first training loss: a history that ends above has diverged."""


@check("finite")
def check_finite(run: TrainingRun) -> Finding:
    """Train on a base in bfloat16 or float32 rather than float16, clip the gradient, and start from the last good step.

    NaN and infinity among vectors, loss and gradients; and rows whose norm is far beyond that of real rows. Where the
    history shows that the loss rose beforehand, the learning rate is named, since that comes first.
    """
    bad = {name: int((~tensor.detach().isfinite()).sum()) for name, tensor in run.vectors.items()}
    numbers: dict[str, Any] = {"not_finite": sum(bad.values())}
    loss: float | None = None
    gradient: float | None = None
    try:
        found = gradients_of(run)
        loss, gradient = found.loss, found.norm
    except ProbeFailed:
        pass  # what was planted in the vectors is told without it
    numbers |= {"loss": _jsonable(loss), "gradient_norm": _jsonable(gradient)}
    ratio = _largest_row(run)
    numbers["largest_row"] = ratio
    finite = not sum(bad.values()) and all(value is None or math.isfinite(value) for value in (loss, gradient))
    huge = finite and ratio is not None and ratio > ENORMOUS
    measured = f"{sum(bad.values())} numbers of the vectors are not finite, loss {loss}, gradient norm {gradient}"
    measured += "" if ratio is None else f"; the longest row is {ratio:.3g} times the 99th percentile of real ones"
    ok = finite and not huge
    fault = "" if ok else "learning-rate" if _has_diverged(run.history) else "not-finite"
    if fault == "learning-rate":
        losses = losses_of(run.history)
        measured += f"; before that the training loss rose from {losses[0]:.3g} to {_highest(losses):.3g}"
    return Finding(
        check="finite",
        ok=ok,
        measured=measured,
        expected=f"finite numbers, rows at most {ENORMOUS:.0f} times as long as real ones",
        fix="Use bfloat16 or float32, clip the gradient, and go back to the last good vectors.",
        fault=fault,
        numbers=numbers,
    )


@check("teacher's tail", "teacher_logprobs", "student_logprobs")
def check_tail(run: TrainingRun) -> Finding:
    """Give the distillation loss a bucket for all tokens that the teacher's top list leaves out.

    Without it the loss is least where the student gives them nothing. The student's mass there beside the teacher's;
    and the run's loss beside the cross-entropy with and without the bucket, which tells before training has done harm.
    """
    assert run.teacher_logprobs is not None and run.student_logprobs is not None
    with torch.no_grad(), seeded(0):
        try:
            student = run.student_logprobs()
            loss: float | None = float(run.loss())
        except Exception as error:
            raise ProbeFailed(f"the student cannot be asked ({type(error).__name__})") from error
    return tail_finding(run.teacher_logprobs, student, loss)


@check("start")
def check_start(run: TrainingRun) -> Finding:
    """Start from real text, sampled vocabulary rows, or random rows of the norm that real ones have.

    The median row norm at step 0 beside the norms of real rows; where only other seeds are known, how far their last
    losses lie apart.
    """
    initial = run.initial if run.initial is not None else (run.vectors if not run.history else None)
    real = _real_rows(run)
    spread = _spread_over_seeds(run)
    numbers: dict[str, Any] = {"spread_over_seeds": spread}
    if initial is None or not real:
        if spread is None:
            return skipped("start", "the vectors of step 0 and real rows to compare them with, or runs of other seeds")
        ok = spread <= SEEDS_APART
        said = f"the last losses of {len(run.seeds or {})} seeds lie {spread:.0%} of their median apart"
        return _start_finding(ok, said, f"at most {SEEDS_APART:.0%}", numbers)
    worst, said = 1.0, ""
    for name, rows in real.items():
        if name not in initial:
            continue
        for layer, (first, other) in enumerate(zip(_layers(run, initial[name]), rows, strict=True)):
            low, high = (float(torch.quantile(other, share)) for share in (0.01, 0.99))
            norm = float(first.median())
            off = max(norm / max(high, 1e-12), max(low, 1e-12) / norm) if norm else 1.0
            if off > worst or not said:
                where = f" of layer {layer}" if run.layered else ""
                said = f"rows of {name}{where} have a median norm of {norm:.3g}, real ones {low:.3g} to {high:.3g}"
                worst = max(worst, off)
    if not said:
        return skipped("start", "real rows by the names of the vectors")
    numbers["times_off"] = worst
    said += "" if spread is None else f"; the last losses of {len(run.seeds or {})} seeds lie {spread:.0%} apart"
    expected = f"within {FAR_FROM_REAL:.0f} times the 1st to 99th percentile of real rows"
    return _start_finding(worst <= FAR_FROM_REAL, said, expected, numbers)


@check("learning rate")
def check_learning_rate(run: TrainingRun) -> Finding:
    """Choose the rate by the relative displacement ‖ΔP‖/‖P‖: 0.1 to 1 % per early step is a good start.

    Steps are taken and put back. Too large: they throw the vectors further than their own norm, or the loss rises while
    they move by a fifth of it, or the history diverged, or the vectors have grown out of proportion since step 0. Too
    small: a step moves less than 0.03 % even at the schedule's peak, and steps of 1 % along the same gradients gain
    twenty times as much. Healthy runs of foreword's defaults (base-3m, every method, warm-up to last step) move by
    0.03 to 18 % at the peak of their schedule.
    """
    if _has_diverged(run.history):
        losses = losses_of(run.history)
        said = f"the training loss went from {losses[0]:.3g} to {mean(losses[-3:]):.3g} over {len(losses)} records"
        return _rate_finding("large", said, {"first_loss": losses[0], "last_loss": _jsonable(losses[-1])})
    if (grown := _grown(run)) is not None and grown > GROWN:
        said = f"the vectors' norm has become {grown:.3g} times what it was at step 0"
        return _rate_finding("large", said, {"grown": grown})
    rate = measure_rate(run, _typical_norm(run))
    if rate is None:
        return skipped("learning rate", "steps at a learning rate above 0: this one is at the end of its schedule")
    return _rate_finding(rate.verdict, str(rate), rate.to_json())


@check("dev loss", "history")
def check_overfit(run: TrainingRun) -> Finding:
    """Keep the vectors of the best dev loss, use fewer vectors or more rows, and stop early.

    The dev loss beside its best so far, and the training loss at the same two steps.
    """
    pairs = _dev_and_train(run.history)
    if len(pairs) < 3:
        return skipped("dev loss", "three or more records with a dev loss")
    best = min(range(len(pairs)), key=lambda place: pairs[place][0])
    rise = pairs[-1][0] - pairs[best][0]
    fell = pairs[best][1] - pairs[-1][1]
    ok = not (rise > max(OVERFIT_NATS, OVERFIT_SHARE * pairs[best][0]) and fell > FELL_SHARE * pairs[best][1])
    measured = f"dev loss {pairs[-1][0]:.4g}, at best {pairs[best][0]:.4g}; training loss {pairs[-1][1]:.4g}, "
    measured += f"there {pairs[best][1]:.4g}"
    return Finding(
        check="dev loss",
        ok=ok,
        measured=measured,
        expected=f"a dev loss within {OVERFIT_NATS} nats or {OVERFIT_SHARE:.0%} of its best while training loss falls",
        fix="Take the vectors of the best dev loss; fewer vectors, more rows, or an early stop.",
        fault="" if ok else "overfit",
        numbers={"rise": rise, "training_fell": fell, "best_record": best},
    )


def _start_finding(ok: bool, measured: str, expected: str, numbers: dict[str, Any]) -> Finding:
    return Finding(
        check="start",
        ok=ok,
        measured=measured,
        expected=expected,
        fix="Start from text or vocabulary rows; for keys and values, from those of a real text.",
        fault="" if ok else "random-init",
        numbers=numbers,
    )


def _rate_finding(verdict: str, measured: str, numbers: dict[str, Any]) -> Finding:
    fix = {"large": "Lower the rate, by 10 to begin with.", "small": "Raise the rate until a step moves 0.1 to 1 %."}
    return Finding(
        check="learning rate",
        ok=verdict == "fair",
        measured=measured,
        expected="early steps of 0.1 to 1 % of the vectors' norm, at most of their whole norm; a falling loss",
        fix=fix.get(verdict, ""),
        fault="" if verdict == "fair" else "learning-rate",
        numbers=numbers,
    )


def _jsonable(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _highest(losses: Sequence[float]) -> float:
    return max(loss for loss in losses if math.isfinite(loss))


def _has_diverged(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether the training loss rose for good: its last finite records lie above the first ones by a fifth."""
    losses = [loss for loss in losses_of(history) if math.isfinite(loss)]
    if len(losses) < 4:
        return False
    start = mean(losses[: max(1, len(losses) // 10)])
    return median(losses[-max(2, len(losses) // 5) :]) > DIVERGED * start + 0.1


def _layers(run: TrainingRun, tensor: Tensor) -> list[Tensor]:
    """Return the row norms of each layer [N], or of the tensor as one layer."""
    parts = tensor.detach().float().unbind() if run.layered else [tensor.detach().float()]
    return [part.flatten(1).norm(dim=1).cpu() for part in parts]


def _real_rows(run: TrainingRun) -> dict[str, list[Tensor]]:
    """Return the norms of real rows by the vectors' names, as far as they are known."""
    if run.reference is not None:
        return {name: _layers(run, tensor) for name, tensor in run.reference.items() if name in run.vectors}
    if run.vocabulary is None or run.layered:
        return {}
    width = run.vocabulary.shape[1]
    norms = run.vocabulary.detach().float().norm(dim=1).cpu()
    rows = {name: t for name, t in run.vectors.items() if t.ndim == 2 and t.shape == (run.num_vectors, width)}
    return {name: [norms] for name in rows}


def _typical_norm(run: TrainingRun) -> float | None:
    """Return the norm that all vectors would have with real rows in their place, or None where it is not known."""
    real = _real_rows(run)
    if real.keys() != run.vectors.keys():
        return None
    squares = [float(norms.square().mean()) * run.num_vectors for layers in real.values() for norms in layers]
    return math.sqrt(sum(squares))


def _grown(run: TrainingRun) -> float | None:
    """Return the vectors' norm over that at step 0 (or of real rows, if longer); None where step 0 is not known."""
    if run.initial is None or run.initial.keys() != run.vectors.keys():
        return None
    now, then = (
        math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors.values()))
        for tensors in (run.vectors, run.initial)
    )
    start = max(then, _typical_norm(run) or 0.0)
    return now / start if start > 0.0 and math.isfinite(now) else None


def _largest_row(run: TrainingRun) -> float | None:
    """Return the longest row's norm over the 99th percentile of real ones, or None where these are not known."""
    ratios = []
    for name, layers in _real_rows(run).items():
        for mine, real in zip(_layers(run, run.vectors[name]), layers, strict=True):
            ratios.append(float(mine.nan_to_num(posinf=0.0).max()) / max(float(torch.quantile(real, 0.99)), 1e-12))
    return max(ratios, default=None)


def _spread_over_seeds(run: TrainingRun) -> float | None:
    """Return (max - min) / median of the seeds' last losses, the mean of their last three records."""
    histories = list((run.seeds or {}).values())
    last = [mean(losses[-3:]) for history in histories if len(losses := losses_of(history)) >= 3]
    if len(last) < 3 or not all(map(math.isfinite, last)):
        return None
    return (max(last) - min(last)) / max(median(last), 1e-9)


def _dev_and_train(history: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """Return (dev loss, training loss) of each evaluation; the training loss is the mean since the one before."""
    pairs: list[tuple[float, float]] = []
    since: list[float] = []
    for row in history:
        since += losses_of([row])
        if row.get("dev_loss") is not None and since:
            pairs.append((float(row["dev_loss"]), mean(since)))
            since = []
    return [pair for pair in pairs if all(map(math.isfinite, pair))]
