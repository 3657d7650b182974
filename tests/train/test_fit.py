"""fit: contracts 4 (resume), 5 (joint = alone) and 6 (base untouched), and what happens when something goes wrong."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from foreword.core.artefact import load_artefact
from foreword.core.compile import compile
from foreword.core.conformance import replay
from foreword.errors import ConfigError, DataError
from foreword.train import loop
from foreword.train.loop import TrainingInterrupted, fit
from foreword.train.run import Run
from foreword.train.state import RunState
from tests.bundled import BASE, bundled, write_task

FAST = {"steps": 6, "batch_size": 4, "warmup_steps": 2, "eval_every": 3}


def tensors(result):
    return load_artefact(result.artefact).tensors


def assert_same(a, b, within=0.0, start=None):
    """Every tensor equal, or their distance within a part of the way that training went from `start`."""
    for name, tensor in tensors(a).items():
        distance = (tensor - tensors(b)[name]).norm()
        way = (tensor - start[name]).norm() if start else 1.0
        assert distance <= within * way, f"{name}: {distance} apart, {way} from the start"


@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
def test_fit_learns_and_writes_everything(tmp_path, method):
    base = bundled()
    before = base.checksum()
    run = Run.from_toml(write_task(tmp_path), method=method, steps=40, batch_size=8)
    (result,) = fit(base, [run], out=tmp_path / "out")
    assert base.checksum() == before
    assert result.status == "done" and len(result.history) == 40
    assert result.best["value"] < 0.5 * result.history[0]["loss"]
    artefact = load_artefact(result.artefact)
    header = artefact.header
    assert (header.method, header.task, header.num_vectors) == (method, "colour", 4)
    assert header.labels == () or header.labels == ("cold", "warm")
    assert header.training["lr"] == run.lr and header.training["data_sha256"]
    prefix = compile(base, artefact)
    assert replay(base, prefix, header.conformance).ok
    assert "<svg" in (tmp_path / f"out/colour-{method}.html").read_text()
    lines = (tmp_path / f"out/colour-{method}.history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))
    assert not (tmp_path / "out/checkpoint.safetensors").exists()


def test_joint_equals_alone(tmp_path):
    base = bundled()
    toml, other = write_task(tmp_path), write_task(tmp_path, "shade", rows=36, template="{soft:6}{input}")
    runs = [
        Run.from_toml(toml, method="prompt", **FAST),
        Run.from_toml(other, method="kv", seed=3, optimizer="adafactor", **FAST),
        Run.from_toml(toml, method="prefix", encoder="residual", accumulate=2, **FAST),
        Run.from_toml(other, method="prompt", schedule="cosine", name="shade-2", **{**FAST, "steps": 4}),
    ]
    joint = fit(base, runs, out=tmp_path / "joint")
    for run, together in zip(runs, joint, strict=True):
        (alone,) = fit(base, [run], out=tmp_path / f"alone-{run.name}")
        assert_same(together, alone, within=1e-3, start=RunState(base, run).snapshot())
        assert together.history[0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-5)


def test_resume_after_an_interruption_equals_uninterrupted(tmp_path):
    base = bundled()
    toml = write_task(tmp_path)
    runs = [
        Run.from_toml(toml, method="kv", **FAST),
        Run.from_toml(toml, method="prompt", encoder="lstm", optimizer="adafactor", **FAST),
    ]
    whole = fit(base, runs, out=tmp_path / "whole")

    def stop_at(progress):
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match="after step 4"):
        fit(base, runs, out=tmp_path / "cut", on_progress=stop_at)
    with pytest.raises(ConfigError, match="interrupted training"):
        fit(base, runs, out=tmp_path / "cut")
    resumed = fit(base, runs, out=tmp_path / "cut", resume=True)
    for a, b in zip(whole, resumed, strict=True):
        assert_same(a, b)
        assert a.history == b.history and a.best == b.best


def test_resume_refuses_other_settings_and_says_which(tmp_path):
    base = bundled()
    toml = write_task(tmp_path)
    run = Run.from_toml(toml, **FAST)

    def stop(progress):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        fit(base, [run], out=tmp_path / "out", on_progress=stop)
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, lr=0.7))
    with pytest.raises(ConfigError, match=r"train\.lr = 0\.5, asked for is 0\.7"):
        fit(base, [other], out=tmp_path / "out", resume=True)
    (tmp_path / "out/checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(Exception, match="not a whole checkpoint"):
        fit(base, [run], out=tmp_path / "out", resume=True)


CHILD = """
import sys
from foreword.core.model import load_base
from foreword.train.loop import fit
from foreword.train.run import Run
from foreword.train.state import RunState
import torch
torch.set_num_threads(1)
base, toml, out = sys.argv[1:4]
run = Run.from_toml(toml, method="kv", steps=60, batch_size=4, eval_every=20, checkpoint_every_s=1)
def report(progress):
    print(progress.step, flush=True)
fit(load_base(base, dtype="float32"), [run], out=out, resume="--resume" in sys.argv, on_progress=report)
"""


def test_a_killed_trainer_resumes_to_the_same_vectors(tmp_path):
    toml = write_task(tmp_path)

    def start(out, *flags):
        command = [sys.executable, "-c", CHILD, str(BASE), str(toml), str(tmp_path / out), *flags]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    whole = start("whole")
    cut = start("cut")
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut/checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    cut.kill()
    cut.communicate()
    assert (tmp_path / "cut/checkpoint.safetensors").exists() and not (tmp_path / "cut/results.json").exists()
    resumed = start("cut", "--resume")
    steps = [int(line) for line in resumed.communicate()[0].split()]
    assert resumed.returncode == 0 and steps[0] > 1 and steps[-1] == 60
    whole.communicate()
    assert whole.returncode == 0
    a, b = (load_artefact(tmp_path / out / "colour-kv.safetensors").tensors for out in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_nan_stops_the_run_and_not_its_neighbour(tmp_path):
    base = bundled()
    toml = write_task(tmp_path)
    good, bad = Run.from_toml(toml, **FAST), Run.from_toml(toml, name="bad", method="kv", lr=1e38, clip=0.0, **FAST)
    healthy, diverged = fit(base, [good, bad], out=tmp_path / "out")
    (alone,) = fit(base, [good], out=tmp_path / "alone")
    assert diverged.status == "diverged" and "learning rate" in diverged.error.message
    assert all(torch.isfinite(tensor).all() for tensor in tensors(diverged).values())
    assert healthy.status == "done"
    assert_same(healthy, alone, within=1e-3, start=RunState(base, good).snapshot())


def test_early_stop_and_best_so_far(tmp_path):
    base = bundled()
    toml = write_task(tmp_path)
    run = Run.from_toml(toml, lr=5.0, clip=0.0, steps=40, batch_size=4, eval_every=2, patience=2, schedule="constant")
    (result,) = fit(base, [run], out=tmp_path / "out")
    assert result.status == "early_stopped" and len(result.history) < 40
    values = {row["step"]: row["dev_loss"] for row in result.history if "dev_loss" in row}
    assert result.best["value"] == min(values.values()) == values[result.best["step"]]


def test_best_by_metric_uses_generation(tmp_path):
    run = Run.from_toml(write_task(tmp_path), best_by="metric", method="kv", **{**FAST, "steps": 3})
    (result,) = fit(bundled(), [run], out=tmp_path / "out")
    assert 0.0 <= result.best["value"] <= 1.0 and result.best["by"] == "dev_metric"


def test_a_changed_base_is_reported(tmp_path, monkeypatch):
    base = bundled()
    counts = iter(range(100))
    monkeypatch.setattr(type(base), "checksum", lambda self: str(next(counts)))
    with pytest.raises(RuntimeError, match="base changed"):
        fit(base, [Run.from_toml(write_task(tmp_path), **{**FAST, "steps": 1})], out=tmp_path / "out")


def test_a_full_disk_is_survived_between_checkpoints(tmp_path, monkeypatch):
    def full(*args):
        raise loop.ArtefactError("cannot write: No space left on device")

    monkeypatch.setattr(loop, "save_checkpoint", full)
    run = Run.from_toml(write_task(tmp_path), **FAST, checkpoint_every_s=1)
    slow = lambda progress: time.sleep(0.3)  # noqa: E731
    with pytest.warns(UserWarning, match="no checkpoint was written"):
        (result,) = fit(bundled(), [run], out=tmp_path / "out", on_progress=slow)
    assert result.status == "done"


@pytest.mark.parametrize(
    ("task", "train", "error", "message"),
    [
        ({"max_new_tokens": 1}, {}, DataError, r"row 1: the target takes \d+ tokens .* max_new_tokens is 1"),
        ({"max_input_tokens": 3}, {}, DataError, r"row 1: the input has \d+ tokens, the limit is 3"),
        ({"template": "{input}"}, {}, ConfigError, "no soft slot"),
        ({"template": "{soft:4}{input}{soft:2}"}, {"method": "kv"}, ConfigError, "behind the input"),
        ({}, {"init": "labels", "num_vectors": 1}, ConfigError, "2 labels"),
        ({}, {"init": "from:/nowhere.safetensors"}, Exception, "nowhere"),
    ],
)
def test_bad_settings_are_refused_before_training(tmp_path, task, train, error, message):
    toml = write_task(tmp_path, **task)
    with pytest.raises(error, match=message):
        fit(bundled(), [Run.from_toml(toml, **FAST, **train)], out=tmp_path / "out")


def test_training_goes_on_from_a_version(tmp_path):
    base, toml = bundled(), write_task(tmp_path)
    (first,) = fit(base, [Run.from_toml(toml, method="kv", **FAST)], out=tmp_path / "a")
    again = Run.from_toml(toml, method="kv", init=f"from:{first.artefact}", **{**FAST, "steps": 1, "lr": 1e-9})
    (second,) = fit(base, [again], out=tmp_path / "b")
    assert_same(first, second, within=1e-4)
    assert load_artefact(second.artefact).header.parent == load_artefact(first.artefact).sha256
