"""A run's state, copied before a check takes a step and put back afterwards, bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foreword.doctor.subjects import TrainingRun


class Saved:
    """A copy of every bit of a run that a step may change; the tensors' values are kept in main memory."""

    def __init__(self, run: TrainingRun) -> None:
        self._tensors = {
            id(tensor): (tensor, _copy(tensor), gradient := _gradient(tensor), _copy(gradient), tensor.requires_grad)
            for tensor in all_tensors(run)
        }
        self._modes = [(module, module.training) for module in modules_of(run)]
        self._optimizer = _OptimizerState(run.optimizer)
        self._generators = _generators()

    def is_changed(self, tensor: Tensor) -> bool:
        """Whether any bit of a tensor of the run differs now from when this was made."""
        return not _same_bits(_copy(tensor), self._tensors[id(tensor)][1])

    def restore(self, run: TrainingRun) -> None:
        """Put everything back."""
        for tensor, value, gradient, gradient_value, requires_grad in self._tensors.values():
            _restore(tensor, value)
            if gradient is not None:
                _restore(gradient, gradient_value)
            if tensor.is_leaf:
                tensor.grad = gradient
                tensor.requires_grad_(requires_grad)
        for module, training in self._modes:
            module.training = training
        self._optimizer.restore(run.optimizer)
        _restore_generators(self._generators)


@contextmanager
def put_back(run: TrainingRun) -> Iterator[Saved]:
    """While active the run may be stepped; on leaving, also by an error, all of it is as it was, bit by bit.

    Restored are every parameter and buffer of the model, the vectors, their gradients and requires_grad, the
    optimizer's state and hyperparameters, module modes, and the random generators of Python, numpy and torch; then
    `run.rewind` is called. The model's size is needed once more in main memory meanwhile.
    """
    saved = Saved(run)
    try:
        yield saved
    finally:
        saved.restore(run)
        if run.rewind is not None:
            run.rewind()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """While active the random generators go on from `seed`; they are put back afterwards."""
    states = _generators()
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        _restore_generators(states)


class _OptimizerState:
    """An optimizer's state and hyperparameters, copied."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.state = {key: (value, _copy_nested(value)) for key, value in optimizer.state.items()}
        self.groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.state.clear()
        for key, (value, saved) in self.state.items():
            optimizer.state[key] = _restore_nested(value, saved)
        optimizer.param_groups[:] = [group for group, _, _ in self.groups]
        for group, values, parameters in self.groups:
            group.clear()
            group.update(values)
            group["params"][:] = parameters


def all_tensors(run: TrainingRun) -> list[Tensor]:
    """Return every tensor of a run, each once: parameters, buffers, vectors, and what the optimizer moves."""
    modules = [run.model, *([] if run.base is None else [run.base])]
    found = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    found += list(run.vectors.values())
    found += [tensor for group in run.optimizer.param_groups for tensor in group["params"]]
    return list({id(tensor): tensor for tensor in found}.values())


def modules_of(run: TrainingRun) -> list[nn.Module]:
    """Return every module of a run, each once."""
    modules = [*run.model.modules(), *(run.base.modules() if run.base is not None else ())]
    return list({id(module): module for module in modules}.values())


def _gradient(tensor: Tensor) -> Tensor | None:
    return tensor.grad if tensor.is_leaf else None


def _copy(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().to("cpu", copy=True)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _restore(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape == value.shape and tensor.dtype == value.dtype:
        tensor.data.copy_(value)
    else:
        tensor.data = value.to(tensor.device)


def _copy_nested(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _copy(value)
    if isinstance(value, dict):
        return {key: _copy_nested(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copy_nested, value))
    return value


def _restore_nested(value: Any, saved: Any) -> Any:
    """Return `saved`, in the very tensors and dicts of `value` where they are still there to be written to."""
    if isinstance(value, Tensor):
        _restore(value, saved)
        return value
    if isinstance(value, dict):
        kept = {key: _restore_nested(value.get(key, part), part) for key, part in saved.items()}
        value.clear()
        value.update(kept)
        return value
    if isinstance(value, list | tuple) and len(value) == len(saved):
        return type(saved)(_restore_nested(was, part) for was, part in zip(value, saved, strict=True))
    return saved


def _generators() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state()}
    states["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore_generators(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
