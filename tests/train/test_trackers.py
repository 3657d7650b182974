"""Curves in TensorBoard, MLflow and W&B: each step once, also over a resume; one that is down costs nothing."""

import json
import os
import signal
import threading

import pytest

from foreword.errors import ConfigError
from foreword.train import trackers
from foreword.train.loop import TrainingInterrupted, fit
from foreword.train.run import Run
from foreword.train.trackers import Sink, Tracker, flat_settings
from tests.bundled import bundled, write_task

FAST = {"steps": 5, "batch_size": 4, "warmup_steps": 2, "eval_every": 2}
foreign = [  # the trackers' own code
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def marked(test):
    for mark in foreign:
        test = mark(test)
    return test


def runs_of(folder):
    toml = write_task(folder)
    return [Run.from_toml(toml, method="kv", **FAST), Run.from_toml(toml, **{**FAST, "steps": 3})]


def train_in_two_parts(folder, name):
    """Stop after step 2 and resume; return both runs' results."""
    runs, out = runs_of(folder), folder / "out"

    def stop(progress):
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        fit(bundled(), runs, out=out, on_progress=stop, observers=[Tracker(name, out)])
    return fit(bundled(), runs, out=out, resume=True, observers=[Tracker(name, out)])


def numbers(history, key):
    return [(row["step"], row[key]) for row in history if key in row]


@marked
def test_tensorboard_has_every_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for result in train_in_two_parts(tmp_path, "tensorboard"):
        events = EventAccumulator(str(tmp_path / "out/tensorboard" / result.name)).Reload()
        for key in ("loss", "lr", "dev_loss", "displacement"):
            found = [(event.step, event.value) for event in events.Scalars(key)]
            assert found == [(step, pytest.approx(value)) for step, value in numbers(result.history, key)]
        assert "settings/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
@marked
def test_mlflow_has_a_run_for_each_with_every_step_once(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    try:
        results = train_in_two_parts(tmp_path, "mlflow")
        assert mlflow.get_tracking_uri() == f"sqlite:///{tmp_path / 'out/mlflow.db'}"
        client = mlflow.MlflowClient()
        found = {
            run.info.run_name: run
            for run in client.search_runs([client.get_experiment_by_name("foreword").experiment_id])
        }
        assert found.keys() == {"colour-kv", "colour-prompt"}
        for result in results:
            run = found[result.name]
            assert run.info.status == "FINISHED" and run.data.params["train.method"] == result.name.removeprefix(
                "colour-"
            )
            for key in ("loss", "dev_loss"):
                history = client.get_metric_history(run.info.run_id, key)
                assert [(item.step, item.value) for item in history] == numbers(result.history, key)
        assert mlflow.active_run() is None
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.slow
@marked
def test_wandb_offline_keeps_one_run_over_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    results = train_in_two_parts(tmp_path, "wandb")
    sent = json.loads((tmp_path / "out/wandb.sent.json").read_text())
    assert {name: item["step"] for name, item in sent.items()} == {"colour-kv": 5, "colour-prompt": 3}
    for result in results:
        parts = sorted((tmp_path / "out/wandb").glob(f"offline-run-*-{sent[result.name]['id']}"))
        assert len(parts) == 2  # before the stop and after it, of one run: `wandb sync` joins them


class Notebook:
    """A tracker in place of one of accelerate's."""

    def __init__(self, monkeypatch, open_fails=False, fail_at=None, gate=None):
        self.opened, self.sent, self.closed = [], [], {}
        self.open_fails, self.fail_at, self.gate = open_fails, fail_at, gate
        monkeypatch.setattr(trackers, "OPEN", {"tensorboard": self.open})
        monkeypatch.setattr(trackers, "check_tracker", lambda name: None)

    def open(self, folder, name, known, settings):
        if self.open_fails:
            raise ConnectionError("no route to host")
        self.opened.append((name, known))

        def log(values, step):
            if self.gate is not None:
                self.gate.wait()
            if step == self.fail_at:
                raise ConnectionError("gone away")
            self.sent.append((name, step))

        return Sink(f"id of {name}", log, lambda status: self.closed.update({name: status}))


@pytest.mark.parametrize(("fault", "what"), [({"open_fails": True}, "no route to host"), ({"fail_at": 2}, "gone away")])
def test_a_tracker_that_is_down_is_told_of_once(tmp_path, monkeypatch, fault, what):
    book, out = Notebook(monkeypatch, **fault), tmp_path / "out"
    with pytest.warns(UserWarning, match=f"tensorboard failed .*{what}") as warned:
        results = fit(bundled(), runs_of(tmp_path), out=out, observers=[Tracker("tensorboard", out)])
    assert len(warned) == 1 and not book.closed
    assert [result.status for result in results] == ["done", "done"]
    assert len((out / "colour-kv.history.jsonl").read_text().splitlines()) == 5


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path, monkeypatch):
    gate = threading.Event()
    book, out = Notebook(monkeypatch, gate=gate), tmp_path / "out"
    with pytest.warns(UserWarning, match=r"did not take up everything within 0\.2 s") as warned:
        results = fit(bundled(), runs_of(tmp_path), out=out, observers=[Tracker("tensorboard", out, wait_s=0.2)])
    gate.set()
    assert len(warned) == 1 and [result.status for result in results] == ["done", "done"]
    assert len(book.sent) <= 1


ROWS = [{"step": step, "loss": 1.0 / step} for step in range(1, 8)]


def test_a_killed_training_sends_no_step_twice_and_fills_no_gap_twice(tmp_path, monkeypatch):
    run = runs_of(tmp_path)[0]
    first = Notebook(monkeypatch)
    tracker = Tracker("tensorboard", tmp_path)
    tracker.start(run, [])
    for row in ROWS[:5]:
        tracker.step(run, row)
    tracker.finish({run.name: "running"})
    assert first.opened == [(run.name, "")] and first.closed == {run.name: "running"}
    again = Notebook(monkeypatch)  # the last checkpoint was after step 3: 4 and 5 are trained again
    tracker = Tracker("tensorboard", tmp_path)
    tracker.start(run, ROWS[:3])
    for row in ROWS[3:]:
        tracker.step(run, row)
    tracker.finish({run.name: "done"})
    assert again.opened == [(run.name, f"id of {run.name}")]
    assert [step for _, step in (*first.sent, *again.sent)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_resumed_training_sends_what_the_tracker_lacks(tmp_path, monkeypatch):
    run, book = runs_of(tmp_path)[0], Notebook(monkeypatch)
    tracker = Tracker("tensorboard", tmp_path)
    tracker.start(run, ROWS[:4])
    tracker.step(run, ROWS[4])
    tracker.finish({run.name: "done"})
    assert [step for _, step in book.sent] == [1, 2, 3, 4, 5]


def test_another_training_in_the_folder_begins_anew(tmp_path, monkeypatch):
    run = runs_of(tmp_path)[0]
    for _ in range(2):
        book = Notebook(monkeypatch)
        tracker = Tracker("tensorboard", tmp_path)
        tracker.start(run, [])
        tracker.step(run, ROWS[0])
        tracker.finish({run.name: "done"})
        assert book.opened == [(run.name, "")] and book.sent == [(run.name, 1)]


def test_unknown_and_missing_trackers_are_refused_before_training(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'\nDid you mean tensorboard"):
        Tracker("tensorbord", tmp_path)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"'mlflow' needs accelerate and mlflow, .*not installed\npip install accelerate"
    ):
        Tracker("mlflow", tmp_path)


def test_settings_are_flat_and_plain(tmp_path):
    run = runs_of(tmp_path)[0]
    settings = flat_settings(run)
    assert settings["train.method"] == "kv" and settings["train.lr"] == run.lr and settings["task.name"] == "colour"
    assert len(settings["data_sha256"]) == 64
    assert all(isinstance(value, str | int | float) for value in settings.values())
