"""Multitask prompts: one source shared by several tasks, low-rank factors for each; then a new task by its factors.

Source: Wang et al. 2023, arXiv:2303.02861, without its distillation from single-task prompts: the source is trained on
all tasks in one joint pass. How the parts learn is in train/sharing.py and train/tuners.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from foreword.config import TrainConfig
from foreword.errors import ConfigError
from foreword.train.run import Run


def share_source(runs: Sequence[Run], group: str, *, rank: int | None = None) -> list[Run]:
    """Return the runs with one source under their low-rank factors; runs of different methods make a group each.

    `rank` None keeps each run's own. Raises ConfigError where a run has another encoder, is of another group, or is
    the only one of its method.
    """
    methods = [run.config.method for run in runs]
    several = len(set(methods)) > 1
    shared = []
    for run in runs:
        config = run.config
        if config.encoder not in ("none", "low_rank"):
            raise ConfigError(
                f"run {run.name} has train.encoder = {config.encoder!r}, and sharing needs 'low_rank'",
                hint="Leave train.encoder out.",
            )
        name = f"{group}-{config.method}" if several else group
        if config.share not in (None, name):
            raise ConfigError(f"run {run.name} has train.share = {config.share!r}, asked for is {name!r}")
        if methods.count(config.method) < 2:
            raise ConfigError(
                f"run {run.name} is the only one of method {config.method!r}, and shares its source with no other",
                hint="Give two tasks or more.",
            )
        shared.append(_with(run, encoder="low_rank", share=name, rank=rank or config.rank))
    return shared


def adapt(run: Run, source: str | Path, *, rank: int | None = None) -> Run:
    """Return the run so that it starts at a shared source and trains its low-rank factors alone.

    `source` is the file that the group's training left (`<group>.shared.safetensors`), or a version of it. As a task
    file: `encoder = "low_rank"` and `init = "from:<source>"`.
    """
    return _with(run, encoder="low_rank", init=f"from:{source}", share=None, rank=rank or run.config.rank)


def _with(run: Run, **changes: object) -> Run:
    values = {field.name: getattr(run.config, field.name) for field in dataclasses.fields(run.config)}
    return dataclasses.replace(run, config=TrainConfig(**{**values, **changes}))
