"""Who is told of a training's steps: the `Observer` protocol, and the watch that no observer's fault leaves."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from foreword.train.run import Run, Status
    from foreword.train.state import RunState

Measures = Mapping[str, Any]
"""A row of a run's history: step, loss, lr, grad_norm, displacement, tokens; where evaluated dev_loss, dev_metric."""


class Observer(Protocol):
    """Told of every run while `fit` trains, on the training thread. An observer that raises is left out from then on.

    Waiting is its own affair: one that talks to a server should do so on a thread of its own, as `Tracker` does.
    """

    def start(self, run: Run, history: Sequence[Measures]) -> None:
        """A run begins, or goes on after the steps of `history`."""
        ...

    def step(self, run: Run, measures: Measures) -> None:
        """A step is done, and evaluated where that was due."""
        ...

    def finish(self, statuses: Mapping[str, Status]) -> None:
        """Training is over; a run whose status is still "running" was interrupted. Called once, also on an error."""
        ...


class Watch:
    """The observers of one `fit`. A fault of theirs is told once, by a warning, and training goes on."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = list(observers)
        self._told: dict[str, int] = {}

    def start(self, states: Iterable[RunState]) -> None:
        """Tell of the runs that are to be trained."""
        for state in states:
            self._told[state.run.name] = state.step
            self._tell("start", state.run, state.history)

    def step(self, states: Iterable[RunState]) -> None:
        """Tell of the steps that were finished since the last call."""
        for state in states:
            if state.step > self._told[state.run.name]:
                self._told[state.run.name] = state.step
                self._tell("step", state.run, state.history[-1])

    def finish(self, states: Iterable[RunState]) -> None:
        """Tell of the end."""
        self._tell("finish", {state.run.name: state.status for state in states})

    def _tell(self, event: Literal["start", "step", "finish"], *what: Any) -> None:
        for observer in tuple(self._observers):
            try:
                getattr(observer, event)(*what)
            except Exception as error:  # a stranger's code or server: no reason to lose a training
                self._observers.remove(observer)
                name = getattr(observer, "name", type(observer).__name__)
                reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
                warnings.warn(
                    f"{name} failed and gets no further steps: {reason}. Training goes on; every step is written to "
                    "<run>.history.jsonl",
                    stacklevel=3,
                )
