"""Runs that share a source: contracts 4 and 5 for a group, what a broken member does, and what is refused."""

import os
import signal

import pytest
import torch

from foreword.core.artefact import load_artefact
from foreword.core.init import initial_vectors
from foreword.errors import ConfigError, IncompatibleModel
from foreword.train import loop
from foreword.train.loop import TrainingInterrupted, fit
from foreword.train.run import Run
from foreword.train.sharing import build_states
from foreword.train.state import RunState
from foreword.train.tuners import Tuner
from tests.bundled import write_task
from tests.tiny import tiny
from tests.train.test_contracts import tokenizer

FAST = {"steps": 4, "batch_size": 4, "warmup_steps": 1, "eval_every": 2}


def small():
    return tiny("qwen3", vocab_size=4096, tokenizer=tokenizer())


def group(folder, method="kv", **settings):
    tomls = write_task(folder), write_task(folder, "shade", rows=36)
    shared = {**FAST, "method": method, "encoder": "low_rank", "share": "colours", "init": "vocab", **settings}
    return [Run.from_toml(toml, **shared) for toml in tomls]


def tensors(folder, name):
    return load_artefact(folder / f"{name}.safetensors").tensors


def apart(a, b, start):
    """How far two results are apart, as part of the way from the start."""
    distance = sum(float((a[key] - b[key]).norm() ** 2) for key in a) ** 0.5
    return distance / sum(float((a[key] - start[key]).norm() ** 2) for key in a) ** 0.5


@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
def test_a_group_beside_another_run_is_the_group_alone(tmp_path, method):
    base, runs = small(), group(tmp_path, method)
    other = Run.from_toml(write_task(tmp_path, "tint"), method="prompt", **FAST)
    fit(base, runs, out=tmp_path / "alone", reports=False)
    fit(base, [runs[0], other, runs[1]], out=tmp_path / "joint", reports=False)
    fit(base, [other], out=tmp_path / "other", reports=False)
    start = RunState(base, runs[0]).snapshot()
    for name in (f"colour-{method}", f"shade-{method}", "colours.shared"):
        assert apart(tensors(tmp_path / "joint", name), tensors(tmp_path / "alone", name), start) < 2e-3
    start = RunState(base, other).snapshot()
    assert apart(tensors(tmp_path / "joint", "tint-prompt"), tensors(tmp_path / "other", "tint-prompt"), start) < 2e-3


def test_members_are_the_source_times_their_own_factors(tmp_path):
    """Away from their start, the two differ from one source by a matrix of rank one each."""
    states, (shared,) = build_states(small(), group(tmp_path))
    assert all(torch.equal(states[0].snapshot()[key], tensor) for key, tensor in states[1].snapshot().items())
    for _ in range(3):
        loop.one_step(small(), states, [shared], 4096)
    one, two = (state.tuner.theta().detach() / shared.source.detach() for state in states)
    assert not torch.allclose(one, two, rtol=1e-3)
    for ratio in (one, two):
        sizes = torch.linalg.svdvals(ratio.double())
        assert sizes[1] < 1e-4 * sizes[0]
    assert torch.equal(states[0].tuner.source, states[1].tuner.source)


def test_the_source_takes_the_mean_of_the_members_gradients(tmp_path):
    states, (shared,) = build_states(small(), group(tmp_path))
    before = shared.source.detach().clone()
    first, second = torch.randn_like(before), torch.randn_like(before)
    for state, gradient in zip(states, (first, second), strict=True):
        state.tuner.source.grad = gradient
        state.step = 1
    seen = []
    shared.optimizer.step = lambda: seen.append(shared.source.grad.clone())
    shared.update(states)
    assert torch.allclose(seen[0], (first + second) / 2)
    assert all(state.tuner.source.grad is None for state in states)


def test_resumed_is_uninterrupted(tmp_path):
    base, runs = small(), group(tmp_path, rank=2)
    fit(base, runs, out=tmp_path / "whole", reports=False)

    def stop(progress):
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        fit(base, runs, out=tmp_path / "cut", on_progress=stop, reports=False)
    fit(base, runs, out=tmp_path / "cut", resume=True, reports=False)
    for name in ("colour-kv", "shade-kv", "colours.shared"):
        whole, cut = tensors(tmp_path / "whole", name), tensors(tmp_path / "cut", name)
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_broken_member_stops_alone_and_leaves_the_source_sane(tmp_path, monkeypatch):
    base, runs = small(), group(tmp_path)
    original, calls = loop.step_gradients, []

    def broken(base, batches, *rest):
        losses = original(base, batches, *rest)
        calls.append(len(batches))
        if len(calls) == 3:  # the second run's third step gives no number
            for parameter in batches[1].tuner.parameters():
                parameter.grad.fill_(float("nan"))
            losses[1] = float("nan")
        return losses

    monkeypatch.setattr(loop, "step_gradients", broken)
    healthy, diverged = fit(base, runs, out=tmp_path / "out", reports=False)
    assert (healthy.status, diverged.status) == ("done", "diverged")
    assert calls == [2, 2, 2, 1]
    for name in ("colour-kv", "shade-kv", "colours.shared"):
        assert all(torch.isfinite(tensor).all() for tensor in tensors(tmp_path / "out", name).values())
    assert load_artefact(diverged.artefact).header.training["steps_done"] == 2


def test_a_new_task_starts_at_the_source_and_moves_its_factors_alone(tmp_path):
    base, runs = small(), group(tmp_path)
    fit(base, runs, out=tmp_path / "group", reports=False)
    source = tmp_path / "group/colours.shared.safetensors"
    header = load_artefact(source).header
    assert header.task == "colours" and header.training["shared_by"] == ["colour-kv", "shade-kv"]
    new = Run.from_toml(
        write_task(tmp_path, "tint"), **FAST, method="kv", encoder="low_rank", init=f"from:{source}", name="new"
    )
    state = RunState(base, new)
    assert state.parent == load_artefact(source).sha256
    assert sum(p.numel() for p in state.tuner.parameters()) == sum(state.tuner.theta().shape)
    fit(base, [new], out=tmp_path / "new", reports=False)
    scale, start = state.tuner.scale, state.tuner.theta().detach()
    kept = tensors(tmp_path / "new", "new")
    layers = range(base.spec.num_layers)
    flat = [kept[f"{part}.{layer}"].transpose(0, 1).flatten(1) for layer in layers for part in ("key", "value")]
    ratio = (torch.cat(flat, dim=1) / scale / start).double()
    ratio = ratio[:, (start.abs() > 0.05).all(0)]
    sizes = torch.linalg.svdvals(ratio)
    assert sizes[1] < 1e-3 * sizes[0] and (ratio - 1).abs().max() > 1e-3


def test_a_higher_rank_begins_at_the_start_too():
    base = tiny("qwen3")
    states = [initial_vectors(base, "kv", block(), "random")]
    whole = Tuner(states[0], block(), "low_rank", rank=3)
    for name, tensor in whole.vectors().tensors().items():
        torch.testing.assert_close(tensor, states[0].tensors()[name], rtol=1e-5, atol=1e-6)
    assert whole.encoder.rows.shape == (4, 3)


def block():
    from foreword.core.block import Block

    return Block((4,))


@pytest.mark.parametrize(
    ("one", "two", "error", "message"),
    [
        ({}, {"num_vectors": 6}, ConfigError, r"colour-kv and shade-kv .* in shape: \[4, 384\] and \[6, 384\]"),
        ({}, {"lr": 0.5}, ConfigError, r"differ in train\.lr: 0\.1 and 0\.5"),
        ({}, {"method": "prompt"}, ConfigError, r"train\.method: 'kv' and 'prompt'"),
        ({}, {"init": "random"}, ConfigError, r"train\.init: 'vocab' and 'random'"),
        ({"share": "one"}, {"share": "two"}, ConfigError, r"colour-kv is alone in group 'one'"),
    ],
)
def test_groups_that_do_not_fit_are_refused_with_both_values(tmp_path, one, two, error, message):
    shared = {**FAST, "method": "kv", "encoder": "low_rank", "share": "colours", "init": "vocab", "lr": 0.1}
    runs = [
        Run.from_toml(write_task(tmp_path), **{**shared, **one}, name="colour-kv"),
        Run.from_toml(write_task(tmp_path, "shade"), **{**shared, **two}, name="shade-kv"),
    ]
    with pytest.raises(error, match=message):
        fit(small(), runs, out=tmp_path / "out", reports=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": "group"}, r"train\.share = 'group' is for low-rank factors, and train\.encoder = 'none'"),
        ({"rank": 2, "encoder": "mlp"}, r"train\.rank = 2 .* 'mlp'"),
        ({"rank": 0, "encoder": "low_rank"}, r"train\.rank = 0"),
        ({"share": "No Name", "encoder": "low_rank"}, r"train\.share = 'No Name'"),
    ],
)
def test_bad_settings_of_sharing(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        Run.from_toml(write_task(tmp_path), **settings)


def test_a_source_of_another_method_is_refused(tmp_path):
    base, runs = small(), group(tmp_path, steps=1)
    fit(base, runs, out=tmp_path / "group", reports=False)
    source = tmp_path / "group/colours.shared.safetensors"
    new = Run.from_toml(write_task(tmp_path, "tint"), method="prompt", encoder="low_rank", init=f"from:{source}")
    with pytest.raises(IncompatibleModel, match=r"'kv'.*'prompt'"):
        RunState(base, new)
