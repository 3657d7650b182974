"""Measuring a trainer that somebody else wrote: losses, gradients and steps, with everything put back afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreword.doctor.finding import Finding
from foreword.doctor.subjects import TrainingRun
from foreword.doctor.training_state import all_tensors, seeded

Check = Callable[[TrainingRun], Finding]


class ProbeFailed(Exception):
    """The trainer's own code raised while it was examined; the message says where and what."""


def check(name: str, *needs: str) -> Callable[[Check], Check]:
    """Make a check of `function`: skipped where the run lacks one of the fields `needs`, or cannot be probed.

    The finding's `check` is `name`.
    """

    def decorate(function: Check) -> Check:
        @functools.wraps(function)
        def run_check(run: TrainingRun) -> Finding:
            missing = [field for field in needs if is_missing(getattr(run, field))]
            if missing:
                return skipped(name, f"the subject brings no {', '.join(missing)}")
            try:
                return function(run)
            except ProbeFailed as error:
                return skipped(name, str(error))

        return run_check

    return decorate


def skipped(name: str, why: str) -> Finding:
    """Return the finding of a check that could not be made; `why` says what it would have needed."""
    return Finding(check=name, ok=True, skipped=True, measured=f"not measured: {why}")


def is_missing(value: object) -> bool:
    """Whether an optional field was left out; an empty container counts as left out, a tensor never does."""
    return value is None or (isinstance(value, Sequence | Mapping) and not value)


def loss_of(run: TrainingRun, *, seed: int = 0) -> Tensor:
    """Return the run's loss on its fixed batch, dropout drawn from `seed`. Raises ProbeFailed where it cannot be."""
    with seeded(seed):
        try:
            loss = run.loss()
        except Exception as error:
            raise ProbeFailed(f"the loss cannot be computed ({type(error).__name__}: {_first_line(error)})") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ProbeFailed(f"the loss is no scalar tensor but {shape}")
    return loss.reshape(())


@dataclass(frozen=True)
class Gradients:
    """What one backward pass left."""

    loss: float
    vectors: dict[str, Tensor]
    """By name, zeros where none arrived."""
    leaked: tuple[str, ...]
    """Names of the parameters of the base that received one."""

    @property
    def norm(self) -> float:
        """Norm over all vectors."""
        return float(sum(float(gradient.double().square().sum()) for gradient in self.vectors.values()) ** 0.5)


def gradients_of(run: TrainingRun) -> Gradients:
    """Run the loss backwards and return the gradients; those that lay on the parameters before lie there again.

    Raises ProbeFailed where the trainer's code raises.
    """
    loss = loss_of(run)
    base = base_parameters(run)
    tensors = all_tensors(run)
    before = [(tensor, tensor.grad) for tensor in tensors if tensor.is_leaf]
    try:
        for tensor, _ in before:
            tensor.grad = None
        if loss.requires_grad:
            with seeded(0):  # checkpointed layers run forward once more
                torch.autograd.backward(loss)
        found = {
            name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.detach().clone()
            for name, tensor in run.vectors.items()
        }
        leaked = tuple(name for name, parameter in base.items() if parameter.grad is not None)
    except Exception as error:
        raise ProbeFailed(f"the backward pass fails ({type(error).__name__}: {_first_line(error)})") from error
    finally:
        for tensor, gradient in before:
            tensor.grad = gradient
    return Gradients(float(loss.detach()), found, leaked)


@dataclass(frozen=True)
class Step:
    """One step of a run: the vectors before and after it, as copies."""

    loss: float
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    @property
    def distance(self) -> float:
        """‖ΔP‖ over all vectors."""
        return _norm(self.after[name].double() - old.double() for name, old in self.before.items())

    @property
    def norm(self) -> float:
        """‖P‖ before the step, over all vectors."""
        return _norm(self.before.values())

    @property
    def displacement(self) -> float:
        """‖ΔP‖ / ‖P‖."""
        return self.distance / self.norm if self.norm else 0.0


def take_step(run: TrainingRun) -> Step:
    """Take one of the run's own steps; only to be called inside `put_back`. Raises ProbeFailed."""
    before = copies(run.vectors)
    try:
        found: float | Tensor = run.step()
    except Exception as error:
        raise ProbeFailed(f"a step cannot be taken ({type(error).__name__}: {_first_line(error)})") from error
    loss = float(found.detach() if isinstance(found, Tensor) else found)
    return Step(loss, before, copies(run.vectors))


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of named tensors, cut from any graph."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def rows_of(run: TrainingRun, tensor: Tensor) -> Tensor | None:
    """Return a vector tensor as [P, everything else], or None where it has no P rows at the declared place."""
    place = 1 if run.layered else 0
    if tensor.ndim <= place or tensor.shape[place] != run.num_vectors:
        return None
    return tensor.detach().movedim(place, 0).flatten(1) if tensor.ndim > 1 else tensor.detach()[:, None]


def base_parameters(run: TrainingRun) -> dict[str, nn.Parameter]:
    """Return what should stay frozen: the parameters of `run.base`, or all of the model's that are no vectors."""
    vectors = {id(tensor) for tensor in run.vectors.values()}
    module = run.model if run.base is None else run.base
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) not in vectors}


def optimizer_ids(run: TrainingRun) -> set[int]:
    """Return the identities of the tensors that the optimizer moves."""
    return {id(tensor) for group in run.optimizer.param_groups for tensor in group["params"]}


def current_lr(run: TrainingRun) -> float:
    """Return the optimizer's learning rate now, the largest of its groups'."""
    return max(float(group.get("lr") or 0.0) for group in run.optimizer.param_groups)


def losses_of(history: Sequence[Mapping[str, float]], key: str = "train_loss") -> list[float]:
    """Return the values of a history under `key`, in order; "train_loss" also finds what is written as "loss"."""
    names = ("train_loss", "loss") if key == "train_loss" else (key,)
    found = [next((row[name] for name in names if row.get(name) is not None), None) for row in history]
    return [float(value) for value in found if value is not None]


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")[:200]
