"""Contracts 4, 5 and 6 across architectures and dtypes, on ragged rows: resume, joint = alone, base untouched."""

import os
import signal
from functools import cache

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from foreword.core.artefact import load_artefact
from foreword.train.loop import TrainingInterrupted, fit
from foreword.train.run import Run
from foreword.train.state import RunState
from tests.bundled import BASE, write_task
from tests.tiny import tiny

ARCHITECTURES = ["llama", "qwen3-moe", "gemma3", "gpt2", "bloom", "opt", "mistral-window"]
FAST = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "eval_every": 2}
WITHIN = {"float32": 2e-3, "bfloat16": 0.2}
"""How far joint and alone may be apart, as part of the way from the start; AdamW turns rounding of tiny gradients into
whole steps, and bfloat16 keeps 8 bits."""


@cache
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(BASE)


def base_and_runs(name, dtype, folder):
    base = tiny(name, dtype, vocab_size=4096, tokenizer=tokenizer())
    toml = write_task(folder, template="{soft:4}{input}")
    other = write_task(folder, "shade", rows=30, template="Shade: {soft:3}{input}\nIt is:", chat=False)
    runs = [
        Run.from_toml(toml, method="prompt", lr=0.05, **FAST),
        Run.from_toml(other, method="kv", lr=0.05, seed=1, **FAST),
        Run.from_toml(toml, method="prefix", lr=0.05, **FAST),
    ]
    return base, runs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_joint_is_alone_and_the_base_keeps_every_bit(name, dtype, tmp_path):
    base, runs = base_and_runs(name, dtype, tmp_path)
    before = base.checksum()
    joint = fit(base, runs, out=tmp_path / "joint")
    for run, together in zip(runs, joint, strict=True):
        (alone,) = fit(base, [run], out=tmp_path / f"alone-{run.name}")
        assert together.history[0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=WITHIN[dtype])
        start = RunState(base, run).snapshot()
        a, b = (load_artefact(result.artefact).tensors for result in (together, alone))
        apart = torch.cat([(a[key] - b[key]).flatten() for key in a]).norm()
        way = torch.cat([(a[key] - start[key]).flatten() for key in a]).norm()
        assert way > 0 and apart <= WITHIN[dtype] * way, f"{run.name}: {apart / way}"
    assert base.checksum() == before
    assert all(parameter.grad is None for parameter in base.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_resumed_is_uninterrupted(name, dtype, tmp_path):
    base, runs = base_and_runs(name, dtype, tmp_path)
    whole = fit(base, runs, out=tmp_path / "whole")

    def stop(progress):
        if progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        fit(base, runs, out=tmp_path / "cut", on_progress=stop)
    for a, b in zip(whole, fit(base, runs, out=tmp_path / "cut", resume=True), strict=True):
        first, second = (load_artefact(result.artefact).tensors for result in (a, b))
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert a.history == b.history
