"""Two processes with a sharded base against one process: the same vectors, artefacts from the first alone, resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foreword.core.artefact import load_artefact
from foreword.core.model import load_base
from foreword.errors import ConfigError
from foreword.train.distributed import World, load_for_training, was_launched, world
from foreword.train.loop import fit
from foreword.train.run import Run
from foreword.train.state import RunState
from tests.bundled import BASE, bundled, write_task

METHODS = ["prompt", "prefix", "kv"]
SETTINGS = ["steps=4", "batch_size=6", "warmup_steps=1", "eval_every=2"]
ACCELERATE = Path(sys.executable).with_name("accelerate")
CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from foreword.train.distributed import load_for_training, world
from foreword.train.loop import TrainingInterrupted, fit
from foreword.train.run import Run
base, toml, out, stop = sys.argv[1:5]
runs = [Run.from_toml(toml, method=m, steps=4, batch_size=6, warmup_steps=1, eval_every=2) for m in ("prompt", "kv")]
def on_progress(progress):  # called in the first process only: the other must hear of it
    if stop == "stop" and progress.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
try:
    fit(load_for_training(base, dtype="float32"), runs, out=out, resume=stop == "resume", on_progress=on_progress)
except TrainingInterrupted as error:
    print("interrupted", world().rank, error, flush=True)
"""


def launch(*arguments, port):
    """Run a command line as two processes through `accelerate launch`."""
    options = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    command = [str(ACCELERATE), "launch", *options, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


def apart(path, other, start):
    """Distance of two artefacts' vectors, as a part of the way from the start."""
    a, b = load_artefact(path).tensors, load_artefact(other).tensors
    flat = lambda one, two: torch.cat([(one[key] - two[key]).flatten() for key in one]).norm()  # noqa: E731
    return float(flat(a, b) / flat(a, start))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_train_under_accelerate_launch_gives_the_vectors_of_one_process(tmp_path):
    toml = write_task(tmp_path)
    sets = [part for setting in SETTINGS for part in ("--set", f"train.{setting}")]
    command = ["-m", "foreword", "train", toml, "--base", BASE, "--methods", ",".join(METHODS), "--dtype", "float32"]
    done = launch(*command, "--out", tmp_path / "two", "--json", *sets, port=29751)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout[done.stdout.index("{") :])
    assert [result["status"] for result in printed["results"]] == ["done"] * 3, "the first process prints, once"
    numbers = {key: int(value) for key, value in (setting.split("=") for setting in SETTINGS)}
    runs = [Run.from_toml(toml, method=method, **numbers) for method in METHODS]
    results = fit(bundled(), runs, out=tmp_path / "one")
    for run, result in zip(runs, results, strict=True):
        start = RunState(bundled(), run).snapshot()
        assert apart(tmp_path / f"two/{run.name}.safetensors", result.artefact, start) < 1e-3
        lines = (tmp_path / f"two/{run.name}.history.jsonl").read_text().splitlines()
        for line, row in zip(lines, result.history, strict=True):
            found = json.loads(line)
            assert found["loss"] == pytest.approx(row["loss"], rel=1e-5)
            assert found.get("dev_loss", 0.0) == pytest.approx(row.get("dev_loss", 0.0), rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_stop_together_and_resume_to_the_same_bits(tmp_path):
    toml = write_task(tmp_path)
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    whole = launch(child, BASE, toml, tmp_path / "whole", "whole", port=29752)
    assert whole.returncode == 0, whole.stderr[-3000:]
    cut = launch(child, BASE, toml, tmp_path / "cut", "stop", port=29753)
    said = sorted(line.split(maxsplit=2)[1] for line in cut.stdout.splitlines() if line.startswith("interrupted"))
    assert said == ["0", "1"], cut.stderr[-3000:]
    assert (tmp_path / "cut/checkpoint.safetensors").exists()
    again = launch(child, BASE, toml, tmp_path / "cut", "resume", port=29754)
    assert again.returncode == 0, again.stderr[-3000:]
    for method in ("prompt", "kv"):
        a, b = (load_artefact(tmp_path / out / f"colour-{method}.safetensors").tensors for out in ("whole", "cut"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_process_is_a_world_of_its_own():
    assert world() == World(0, 1) and world().is_main and not was_launched()
    tensor = torch.ones(2)
    world().sum([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert world().any(True) and not world().any(False) and world().agreed("x") == "x"


def test_rows_are_shared_out_without_loss_or_repeat():
    rows = list(range(7))
    parts = [World(rank, 3).part(rows) for rank in range(3)]
    assert sorted(row for part in parts for row in part) == rows and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_quantised_base_is_refused_among_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"quantise = '4bit' among 2 processes"):
        load_for_training(str(BASE), quantise="4bit")


def test_fewer_bits_need_a_gpu_and_a_package():
    with pytest.raises(ConfigError, match=r"8bit needs a CUDA device \(asked for: cpu, found: \d\)"):
        load_base(str(BASE), quantise="8bit")
    with pytest.raises(ConfigError, match=r"quantise '3bit' is not one of 8bit, 4bit"):
        load_base(str(BASE), quantise="3bit")
