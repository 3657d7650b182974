"""Who watches a training sees every step once, and can do it no harm."""

import dataclasses
import os
import signal

import pytest
import torch

from foreword.core.artefact import load_artefact
from foreword.train.loop import TrainingInterrupted, fit
from foreword.train.run import Run
from foreword.train.state import RunState
from tests.bundled import bundled, write_task

FAST = {"steps": 4, "batch_size": 4, "warmup_steps": 2, "eval_every": 2}


class Recorder:
    """Writes down what it is told; raises at the events named."""

    name = "recorder"

    def __init__(self, fail_at=()):
        self.told, self.fail_at = [], fail_at

    def start(self, run, history):
        self._tell("start", run.name, [row["step"] for row in history])

    def step(self, run, measures):
        self._tell("step", run.name, dict(measures))

    def finish(self, statuses):
        self._tell("finish", None, dict(statuses))

    def _tell(self, event, name, what):
        self.told.append((event, name, what))
        if event in self.fail_at:
            raise OSError("connection refused\nby the server")

    def of(self, event):
        return [what for told, _, what in self.told if told == event]


def test_every_step_is_told_once_with_its_evaluation(tmp_path):
    toml, seen = write_task(tmp_path), Recorder()
    runs = [Run.from_toml(toml, method="kv", **FAST), Run.from_toml(toml, **{**FAST, "steps": 2})]
    long, short = fit(bundled(), runs, out=tmp_path / "out", observers=[seen])
    assert seen.told[:2] == [("start", "colour-kv", []), ("start", "colour-prompt", [])]
    assert seen.told[-1] == ("finish", None, {"colour-kv": "done", "colour-prompt": "done"})
    for result in (long, short):
        assert [what for event, name, what in seen.told if event == "step" and name == result.name] == result.history
    assert ["dev_loss" in row for row in long.history] == [False, True, False, True]


def test_the_displacement_is_that_of_the_vectors_whose_loss_it_stands_beside(tmp_path):
    base = bundled()
    run = Run.from_toml(write_task(tmp_path), **{**FAST, "schedule": "constant"})
    (whole,) = fit(base, [run], out=tmp_path / "whole")
    once = dataclasses.replace(run, config=dataclasses.replace(run.config, steps=1))
    (first,) = fit(base, [once], out=tmp_path / "first")
    start, moved = RunState(base, run).snapshot()["prompt"], load_artefact(first.artefact).tensors["prompt"]
    assert whole.history[0]["displacement"] == 0.0
    assert whole.history[1]["displacement"] == pytest.approx(float((moved - start).norm() / start.norm()), rel=1e-4)


@pytest.mark.parametrize("event", ["start", "step", "finish"])
def test_a_failing_observer_is_told_of_once_and_changes_nothing(tmp_path, event):
    base, run = bundled(), Run.from_toml(write_task(tmp_path), method="kv", **FAST)
    (alone,) = fit(base, [run], out=tmp_path / "alone")
    broken, whole = Recorder(fail_at=[event]), Recorder()
    with pytest.warns(UserWarning, match="recorder failed and gets no further steps: connection refused") as warned:
        (result,) = fit(base, [run], out=tmp_path / "out", observers=[broken, whole])
    assert len(warned) == 1 and len(broken.of(event)) == 1
    assert [row["step"] for row in whole.of("step")] == [1, 2, 3, 4] and len(whole.of("finish")) == 1
    assert len((tmp_path / "out/colour-kv.history.jsonl").read_text().splitlines()) == 4
    ours, theirs = (load_artefact(made.artefact).tensors for made in (result, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_interruption_is_told_as_a_run_that_still_runs(tmp_path):
    run = Run.from_toml(write_task(tmp_path), **FAST)
    cut, rest = Recorder(), Recorder()

    def stop(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        fit(bundled(), [run], out=tmp_path / "out", on_progress=stop, observers=[cut])
    assert cut.told[-1] == ("finish", None, {"colour-prompt": "running"})
    fit(bundled(), [run], out=tmp_path / "out", resume=True, observers=[rest])
    assert rest.told[0] == ("start", "colour-prompt", [1, 2, 3])
    assert [row["step"] for row in (*cut.of("step"), *rest.of("step"))] == [1, 2, 3, 4]


def test_a_step_that_diverged_is_not_told(tmp_path):
    seen = Recorder()
    run = Run.from_toml(write_task(tmp_path), method="kv", lr=1e38, clip=0.0, **FAST)
    (result,) = fit(bundled(), [run], out=tmp_path / "out", observers=[seen])
    assert result.status == "diverged" and seen.of("step") == result.history
    assert seen.of("finish") == [{"colour-kv": "diverged"}]
