"""Runs that share one source: multitask prompts (Wang et al. 2023, arXiv:2303.02861).

A run of a group stands for θ_t = θ* ∘ (U_t V_tᵀ): its factors are its own, the source θ* is the group's. Every member
holds a copy of the source, so its gradient comes by itself; the group takes the mean over the members that stepped,
steps the source once (by the optimizer and rate of plain vectors) and hands it out again. A member whose loss is not
finite gives no gradient, and one with a large gradient weighs no more than `train.clip` allows: the source stays sane,
and the neighbours go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foreword.core.model import FrozenModel
from foreword.core.prompt import Vectors
from foreword.errors import ConfigError
from foreword.train.data import Example
from foreword.train.run import Run
from foreword.train.state import RunState, lr_factor, make_optimizer

COMMON = (
    *("method", "init", "optimizer", "lr", "schedule", "warmup_steps", "steps", "clip", "weight_decay"),
    "frozen_vectors",
)
"""Settings of `[train]` that the members of a group must agree on: they are the source's own."""


class Group:
    """The members of one group and the optimizer of their source."""

    def __init__(self, name: str, members: Sequence[RunState]) -> None:
        self.name = name
        self.members = list(members)
        first = self.members[0].tuner.source
        assert first is not None
        self.source = torch.nn.Parameter(first.detach().clone())
        self.run = source_run(self.members[0].run)
        self.optimizer = make_optimizer([self.source], self.run, self.members[0].tuner.widths)

    @property
    def step(self) -> int:
        """Steps that the source has taken."""
        return max(state.step for state in self.members)

    def update(self, stepped: Sequence[RunState]) -> None:
        """Step the source by the mean gradient of the members that stepped; hand it to those that go on."""
        mine = [state for state in stepped if any(state is member for member in self.members)]
        good = [state for state in mine if state.status != "diverged"]
        gradients = [source.grad for state in good if (source := state.tuner.source) is not None]
        known = [gradient for gradient in gradients if gradient is not None]
        if known:
            self.source.grad = torch.stack(known).mean(0)
            for group in self.optimizer.param_groups:
                group["lr"] = self.run.lr * lr_factor(self.run.config, good[0].step - 1)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for state in mine:
            copy = state.tuner.source
            assert copy is not None
            copy.grad = None
            if state.status != "diverged":
                copy.data.copy_(self.source.data)

    def vectors(self) -> Vectors:
        """Return the source as vectors of the members' kind, float32: what a new task can start from."""
        member = self.members[0].tuner
        return member.to_vectors(self.source.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Return the source's vectors as an artefact's tensors, on the CPU."""
        return {name: tensor.float().cpu().clone() for name, tensor in self.vectors().tensors().items()}


def source_run(run: Run) -> Run:
    """Return the run by whose optimizer and rate a source is stepped: as plain vectors are, where nothing is set."""
    return dataclasses.replace(run, config=dataclasses.replace(run.config, encoder="none", rank=1, share=None))


def build_states(base: FrozenModel, runs: Sequence[Run]) -> tuple[list[RunState], list[Group]]:
    """Return the states of runs, and the groups in which they share a source.

    A group's source begins at the start of its first member, so that all members begin at the same vectors. Raises
    ConfigError naming both runs where members of a group differ in shape or in a setting that the source takes over,
    and for a group of one.
    """
    first: dict[str, RunState] = {}
    members: dict[str, list[RunState]] = {}
    encoded: dict[Any, list[Example]] = {}
    states = []
    for run in runs:
        share = run.config.share
        leader = first.get(share) if share is not None else None
        if leader is not None:
            _check_settings(leader.run, run)
        state = RunState(base, run, leader, encoded)
        states.append(state)
        if share is not None:
            first.setdefault(share, state)
            members.setdefault(share, []).append(state)
    for name, group in members.items():
        if len(group) < 2:
            raise ConfigError(
                f"run {group[0].run.name} is alone in group {name!r}",
                hint="Train two tasks or more with the same train.share, or leave it out to train factors alone.",
            )
    return states, [Group(name, group) for name, group in members.items()]


def _check_settings(leader: Run, run: Run) -> None:
    for key in COMMON:
        ours, theirs = (item.lr if key == "lr" else getattr(item.config, key) for item in (leader, run))
        if ours != theirs:
            raise ConfigError(
                f"runs {leader.name} and {run.name} share a source, and differ in train.{key}: {ours!r} and {theirs!r}",
                hint=f"Give both the same train.{key}.",
            )
    if run.start is not None and run.start is not leader.start:
        raise ConfigError(
            f"runs {leader.name} and {run.name} share a source, and start from different vectors",
            hint="Give the start to the group's first run alone.",
        )
