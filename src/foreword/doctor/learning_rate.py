"""Is a learning rate fair? Measured by the run's own steps, and by the finder: the same gradients at other rates."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, Literal

from foreword.doctor.probe_training import ProbeFailed, copies, current_lr, loss_of, losses_of, take_step
from foreword.doctor.subjects import TrainingRun
from foreword.doctor.training_state import put_back, seeded

NUM_STEPS = 8
LEAST = 3e-4
"""Displacement per step at the schedule's peak; the recommended window begins at 1e-3."""
MOST = 1.5
"""Displacement of a single step; healthy runs were seen at up to 0.18, without warm-up at 1."""
RISING_ABOVE = 0.2
"""Median displacement above which a rising loss is the rate's doing."""
FINDER = 1e-2
"""Displacement per step of the finder's other rate."""
GAIN = 20.0
"""Times as much that the finder must gain over the run's own rate."""
WORTH = 0.02
"""Share of the loss that the finder must gain at least."""
LEARNED = 0.8
"""A history whose last losses are below this share of the first ones is no standstill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What some steps at the run's own rate did, and what others would have done."""

    verdict: Literal["fair", "large", "small"]
    lr: float
    """The optimizer's, at the last step taken."""
    peak_lr: float
    """The largest known of the schedule."""
    displacements: tuple[float, ...]
    """‖ΔP‖ / ‖P‖ of each step, the norm being that of real rows where these are known and longer."""
    at_peak: float
    """The median displacement, scaled from the rate now to the schedule's peak."""
    loss_before: float
    loss_after: float
    """On the fixed batch, the mean after the last three steps."""
    growth: float
    """Norm of the vectors after the steps over that before (or of real rows)."""
    finder_gain: float | None = None
    """What as many steps of `FINDER` take off the loss of the fixed batch."""
    own_gain: float | None = None
    """What as many steps at the run's peak rate do, in the same way."""

    def __str__(self) -> str:
        low, high = min(self.displacements), max(self.displacements)
        text = (
            f"{len(self.displacements)} steps move the vectors by {low:.2g} to {high:.2g} of their norm each "
            f"(lr {self.lr:.3g}, {self.at_peak:.2g} at the peak of {self.peak_lr:.3g}), their norm becomes "
            f"{self.growth:.3g} times itself, the loss goes from {self.loss_before:.4g} to {self.loss_after:.4g}"
        )
        if self.finder_gain is not None:
            text += f"; steps of {FINDER:.0%} gain {self.finder_gain:.2g} nats, this rate {self.own_gain:.2g}"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; what is not finite is named as text."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def measure_rate(run: TrainingRun, typical_norm: float | None = None) -> Rate | None:
    """Take the run's own steps and judge them; None where the rate is 0 throughout.

    `typical_norm` is that of the vectors with real rows in their place: a start near zero is no large step. Everything
    is put back. Raises ProbeFailed where no step can be taken.
    """
    before = float(loss_of(run).detach())
    start = max(_norm(run), typical_norm or 0.0)
    moved, losses = [], []
    lr = 0.0
    with put_back(run):
        for _ in range(NUM_STEPS):
            step = take_step(run)
            lr = current_lr(run)
            moved.append(step.distance / max(step.norm, typical_norm or 0.0, 1e-30))
            losses.append(float(loss_of(run).detach()))
            if not math.isfinite(losses[-1]):
                break
        growth = _norm(run) / max(start, 1e-30)
    if not any(moved):
        return None if lr == 0.0 else _standstill(run, before, lr, tuple(moved))
    peak = _peak_lr(run, lr)
    at_peak = median(moved) * (peak / lr if lr else 1.0)
    rate = Rate(
        verdict="fair",
        lr=lr,
        peak_lr=peak,
        displacements=tuple(moved),
        at_peak=at_peak,
        loss_before=before,
        loss_after=mean(losses[-3:]),
        growth=growth,
    )
    if _is_large(rate, start):
        return dataclasses.replace(rate, verdict="large")
    return _judge_small(run, rate) if at_peak < LEAST else rate


def _is_large(rate: Rate, start: float) -> bool:
    if not math.isfinite(rate.loss_after) or not math.isfinite(rate.growth):
        return math.isfinite(rate.loss_before)
    thrown = start > 0.0 and max(rate.displacements) > MOST
    rising = rate.loss_after > rate.loss_before + max(0.1, 0.1 * rate.loss_before)
    return thrown or (rising and median(rate.displacements) > RISING_ABOVE)


def _judge_small(run: TrainingRun, rate: Rate) -> Rate:
    """Compare with the finder: as many steps of 1 % along the run's own gradients, and as many at its own rate."""
    losses = [loss for loss in losses_of(run.history) if math.isfinite(loss)]
    part = max(1, len(losses) // 10)
    if len(losses) >= 10 and mean(losses[-part:]) < LEARNED * mean(losses[:part]):
        return rate
    scale = FINDER / rate.at_peak if rate.at_peak else math.inf
    own = _gain(run, rate.peak_lr)
    found = max(_gain(run, rate.peak_lr * scale), _gain(run, rate.peak_lr * scale / 10))
    small = found > GAIN * max(own, 0.0) and found > WORTH * abs(rate.loss_before)
    verdict: Literal["small", "fair"] = "small" if small else "fair"
    return dataclasses.replace(rate, verdict=verdict, finder_gain=found, own_gain=own)


def _standstill(run: TrainingRun, before: float, lr: float, moved: tuple[float, ...]) -> Rate | None:
    """Judge steps that move nothing at a rate above 0: too small for the dtype, or no gradient, which others tell."""
    own = _gain(run, lr)
    found = max(_gain(run, lr * 10.0**power) for power in (3, 5, 7))
    rate = Rate(
        verdict="fair",
        lr=lr,
        peak_lr=_peak_lr(run, lr),
        displacements=moved,
        at_peak=0.0,
        loss_before=before,
        loss_after=before,
        growth=1.0,
        finder_gain=found,
        own_gain=own,
    )
    small = found > GAIN * max(own, 0.0) and found > WORTH * abs(before) and _peak_lr(run, lr) <= lr
    return dataclasses.replace(rate, verdict="small") if small else rate


def _gain(run: TrainingRun, lr: float) -> float:
    """Return what some steps of the optimizer at a rate take off the loss of the fixed batch; all is put back.

    0 where the loss rises or is not finite.
    """
    before = float(loss_of(run).detach())
    with put_back(run):
        try:
            for number in range(NUM_STEPS):
                run.optimizer.zero_grad()
                loss = loss_of(run, seed=number)
                with seeded(number):
                    loss.backward()  # type: ignore[no-untyped-call]
                for group in run.optimizer.param_groups:
                    group["lr"] = lr
                run.optimizer.step()
        except RuntimeError as error:
            raise ProbeFailed(f"the optimizer cannot be stepped by itself ({error})") from error
        after = float(loss_of(run).detach())
    return max(0.0, before - after) if math.isfinite(after) else 0.0


def _peak_lr(run: TrainingRun, lr: float) -> float:
    """Return the largest rate known: of the history, of a scheduler's groups, now."""
    known = losses_of(run.history, "lr")
    known += [float(group["initial_lr"]) for group in run.optimizer.param_groups if "initial_lr" in group]
    return max([lr, *known])


def _norm(run: TrainingRun) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in copies(run.vectors).values()) ** 0.5)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(map(_plain, value)) if isinstance(value, tuple) else value
