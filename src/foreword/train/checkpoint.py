"""Checkpoints: one safetensors file with every run's parameters, optimizer state, best vectors and history.

Written atomically, so that a killed trainer leaves the last whole one. Data order follows from seed and step, so
nothing else is needed to go on exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreword.core.artefact import write_atomically
from foreword.core.model import FrozenModel
from foreword.errors import ArtefactCorrupt, ConfigError
from foreword.train.sharing import Group
from foreword.train.state import RunState

FILE = "checkpoint.safetensors"


def save_checkpoint(folder: Path, base: FrozenModel, states: Sequence[RunState], groups: Sequence[Group] = ()) -> None:
    """Write the state of all runs, and of the groups that share a source, to `folder`.

    Raises ArtefactError when the disk is full.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    runs: list[dict[str, Any]] = []
    for index, state in enumerate(states):
        numbers = _pack(tensors, f"{index}.", state)
        runs.append({"identity": identity(base, state), "optimizer": numbers, **state.to_json()})
    shared = []
    for index, group in enumerate(groups):
        tensors[f"group.{index}.source"] = group.source
        shared.append(_pack_optimizer(tensors, f"group.{index}.", group.optimizer))
    metadata = {"runs": json.dumps(runs), "groups": json.dumps(shared)}
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata=metadata)
    write_atomically(folder / FILE, data)


def load_checkpoint(folder: Path, base: FrozenModel, states: Sequence[RunState], groups: Sequence[Group] = ()) -> bool:
    """Bring fresh states to where the checkpoint in `folder` left them; return whether there was one.

    Raises ConfigError naming the first setting that differs, ArtefactCorrupt for a file that is not whole.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            runs, shared = (json.loads(file.metadata()[key]) for key in ("runs", "groups"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtefactCorrupt(
            f"{path} is not a whole checkpoint: {error}", hint="Train again from the start."
        ) from error
    if len(runs) != len(states):
        raise ConfigError(f"{path} holds {len(runs)} runs, {len(states)} are asked for", hint="Give the same runs.")
    for index, (state, saved) in enumerate(zip(states, runs, strict=True)):
        _check_same(path, saved["identity"], identity(base, state))
        _unpack(tensors, f"{index}.", state, saved)
    for index, (group, numbers) in enumerate(zip(groups, shared, strict=True)):
        mine = _group(tensors, f"group.{index}.")
        group.source.data.copy_(mine["source"])
        _unpack_optimizer(mine, group.optimizer, numbers)
    return True


def identity(base: FrozenModel, state: RunState) -> dict[str, Any]:
    """Return what must be equal for a checkpoint to go on: settings, data and base."""
    settings = state.run.resolved()
    return {
        "name": state.run.name,
        **{f"train.{key}": value for key, value in settings["train"].items() if key != "checkpoint_every_s"},
        "template": settings["template"],
        "training rows": state.rows_sha256,
        "base": base.fingerprint.to_json(),
        "dtype": str(base.dtype),
    }


def _check_same(path: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    for key, value in asked.items():
        if saved.get(key) != value:
            raise ConfigError(
                f"{path} was trained with {key} = {saved.get(key)!r}, asked for is {value!r}",
                hint="Resume with the same settings, or train into another folder.",
            )


def _pack(tensors: dict[str, Tensor], prefix: str, state: RunState) -> dict[str, dict[str, float]]:
    """Put a run's tensors into `tensors`; return the optimizer's plain numbers."""
    for name, tensor in state.tuner.state_dict().items():
        tensors[f"{prefix}tuner.{name}"] = tensor
    for group, kept in (("best", state.best_tensors), ("good", state.good_tensors)):
        for name, tensor in kept.items():
            tensors[f"{prefix}{group}.{name}"] = tensor
    return _pack_optimizer(tensors, prefix, state.optimizer)


def _pack_optimizer(
    tensors: dict[str, Tensor], prefix: str, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, float]]:
    """Put an optimizer's tensors into `tensors`; return its plain numbers."""
    numbers: dict[str, dict[str, float]] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}optimizer.{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    return numbers


def _unpack(tensors: dict[str, Tensor], prefix: str, state: RunState, saved: dict[str, Any]) -> None:
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    state.tuner.load_state_dict(_group(mine, "tuner."))
    _unpack_optimizer(mine, state.optimizer, saved["optimizer"])
    state.best_tensors, state.good_tensors = _group(mine, "best."), _group(mine, "good.")
    state.from_json(saved)


def _unpack_optimizer(
    mine: dict[str, Tensor], optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, Any]]
) -> None:
    slots: dict[int, dict[str, Any]] = {int(index): dict(numbers) for index, numbers in saved.items()}
    for name, tensor in _group(mine, "optimizer.").items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = tensor
    whole = optimizer.state_dict()
    optimizer.load_state_dict({"state": slots, "param_groups": whole["param_groups"]})


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
