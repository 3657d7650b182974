"""Checkpoints: one safetensors file with every run's parameters, optimizer state, best vectors and history.

Written atomically, so that a killed trainer leaves the last whole one. Data order follows from seed and step, so
nothing else is needed to go on exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from foreword.core.artefact import write_atomically
from foreword.core.model import FrozenModel
from foreword.errors import ArtefactCorrupt, ConfigError
from foreword.train.state import RunState

FILE = "checkpoint.safetensors"


def save_checkpoint(folder: Path, base: FrozenModel, states: Sequence[RunState]) -> None:
    """Write the state of all runs to `folder`. Raises ArtefactError when the disk is full."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    runs: list[dict[str, Any]] = []
    for index, state in enumerate(states):
        numbers = _pack(tensors, f"{index}.", state)
        runs.append({"identity": identity(base, state), "optimizer": numbers, **state.to_json()})
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata={"runs": json.dumps(runs)})
    write_atomically(folder / FILE, data)


def load_checkpoint(folder: Path, base: FrozenModel, states: Sequence[RunState]) -> bool:
    """Bring fresh states to where the checkpoint in `folder` left them; return whether there was one.

    Raises ConfigError naming the first setting that differs, ArtefactCorrupt for a file that is not whole.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            runs = json.loads(file.metadata()["runs"])
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
    return True


def identity(base: FrozenModel, state: RunState) -> dict[str, Any]:
    """Return what must be equal for a checkpoint to go on: settings, data and base."""
    taught = [
        (row.ids, row.learned, [] if row.teacher is None else row.teacher.log_probs.tolist()) for row in state.train
    ]
    rows = hashlib.sha256(repr(taught).encode()).hexdigest()
    settings = state.run.resolved()
    return {
        "name": state.run.name,
        **{f"train.{key}": value for key, value in settings["train"].items() if key != "checkpoint_every_s"},
        "template": settings["template"],
        "training rows": rows,
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
    numbers: dict[str, dict[str, float]] = {}
    for name, tensor in state.tuner.state_dict().items():
        tensors[f"{prefix}tuner.{name}"] = tensor
    for index, slots in state.optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}optimizer.{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    for group, kept in (("best", state.best_tensors), ("good", state.good_tensors)):
        for name, tensor in kept.items():
            tensors[f"{prefix}{group}.{name}"] = tensor
    return numbers


def _unpack(tensors: dict[str, Tensor], prefix: str, state: RunState, saved: dict[str, Any]) -> None:
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    state.tuner.load_state_dict(_group(mine, "tuner."))
    slots: dict[int, dict[str, Any]] = {int(index): dict(numbers) for index, numbers in saved["optimizer"].items()}
    for name, tensor in _group(mine, "optimizer.").items():
        index, _, slot = name.partition(".")
        slots.setdefault(int(index), {})[slot] = tensor
    whole = state.optimizer.state_dict()
    state.optimizer.load_state_dict({"state": slots, "param_groups": whole["param_groups"]})
    state.best_tensors, state.good_tensors = _group(mine, "best."), _group(mine, "good.")
    state.from_json(saved)


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
