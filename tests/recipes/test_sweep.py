"""sweep: what goes on is what a single training gives, a resumed sweep decides alike, and what does not fit is told."""

import json
import os
import signal

import pytest
import torch

from foreword.core.artefact import load_artefact
from foreword.errors import ConfigError
from foreword.recipes import sweep as module
from foreword.recipes.halving import Halving
from foreword.recipes.memory import GB, Meter, activation_bytes, plan_memory, vector_bytes
from foreword.recipes.sweep import make_candidates, read_results, sweep
from foreword.recipes.sweep_report import sweep_report
from foreword.recipes.sweep_result import Options
from foreword.report import render
from foreword.train.loop import TrainingInterrupted, fit
from foreword.train.run import DEFAULTS
from foreword.train.state import RunState
from tests.bundled import write_task
from tests.tiny import tiny
from tests.train.test_contracts import tokenizer

FAST = ["train.steps=8", "train.batch_size=4", "train.warmup_steps=1", "train.method=kv", "train.init=vocab"]
GRID = ["lr=0.02,0.1,0.5,2.0"]


def small():
    return tiny("qwen3", vocab_size=4096, tokenizer=tokenizer())


def candidates(folder, grid=GRID, options=None, settings=(), **task):
    return make_candidates(write_task(folder, **task), grid, options or Options(), [*FAST, *settings])


def tensors(path):
    return load_artefact(path).tensors


def test_what_goes_on_is_what_a_single_training_gives(tmp_path):
    base, tried = small(), candidates(tmp_path)
    result = sweep(base, tried, out=tmp_path / "sweep", options=Options(judge_rows=8))
    statuses = [ranked.status for ranked in result.ranking]
    assert statuses.count("done") == 1 and statuses.count("stopped") == 3
    assert sorted(ranked.steps for ranked in result.ranking) == [2, 2, 4, 8]
    assert result.steps_saved == pytest.approx(0.5)
    winner = next(ranked for ranked in result.ranking if ranked.status == "done")
    (run,) = next(tried_one.runs for tried_one in tried if tried_one.name == winner.name)
    (alone,) = fit(base, [run], out=tmp_path / "alone", reports=False)
    start = RunState(base, run).snapshot()
    together = tensors(winner.results[0].artefact)
    for name, tensor in tensors(alone.artefact).items():
        assert (tensor - together[name]).norm() <= 2e-3 * (tensor - start[name]).norm()
    assert [row["lr"] for row in winner.results[0].history] == [row["lr"] for row in alone.history]
    assert all(ranked.results[0].artefact.exists() for ranked in result.ranking)


def test_the_result_is_written_ranked_and_compared(tmp_path):
    result = sweep(small(), candidates(tmp_path), out=tmp_path / "out", options=Options(judge_rows=8))
    values = [ranked.value for ranked in result.ranking]
    assert values == sorted(values) and result.artefact == result.best.results[0].artefact
    assert [report.prefix for report in result.reports] == [ranked.name for ranked in result.ranking[:2]]
    assert result.paired.num_rows == 8 and result.paired.split == "dev"
    saved = json.loads((tmp_path / "out/sweep.json").read_text())
    assert saved["best"] == result.best.setting and len(saved["ranking"]) == 4
    assert saved["paired"]["verdict"] == result.paired.verdict
    page = (tmp_path / "out/sweep.html").read_text()
    assert "<svg" in page and "colour-04" in page
    text = render(sweep_report(result, curves=False), "text")
    assert f"lr = {result.best.setting['lr']}" in text and "[train]" in text and "stopped" in text


def test_a_resumed_sweep_makes_the_same_decisions(tmp_path):
    base, tried, options = small(), candidates(tmp_path), Options(judge_rows=0)
    whole = sweep(base, tried, out=tmp_path / "whole", options=options)

    def stop(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        sweep(base, tried, out=tmp_path / "cut", options=options, on_progress=stop)
    with pytest.raises(ConfigError, match="holds a sweep"):
        sweep(base, tried, out=tmp_path / "cut", options=options)
    with pytest.raises(ConfigError, match=r"keep = 0\.5, asked for is 0\.25"):
        sweep(base, tried, out=tmp_path / "cut", options=Options(judge_rows=0, keep=0.25), resume=True)
    cut = sweep(base, tried, out=tmp_path / "cut", options=options, resume=True)
    for a, b in zip(whole.ranking, cut.ranking, strict=True):
        assert (a.name, a.value, a.status, a.steps) == (b.name, b.value, b.status, b.steps)
        one, two = tensors(a.results[0].artefact), tensors(b.results[0].artefact)
        assert all(torch.equal(one[name], two[name]) for name in one)
    again = sweep(base, tried, out=tmp_path / "cut", options=options, resume=True)  # finished: read, not trained
    assert [ranked.value for ranked in again.ranking] == [ranked.value for ranked in whole.ranking]


def test_passes_train_everything_once_and_halve_by_themselves(tmp_path, monkeypatch):
    trained = []
    original = fit

    def spy(base, runs, **options):
        trained.append([run.name for run in runs])
        assert isinstance(options["controller"], Halving)
        return original(base, runs, **options)

    monkeypatch.setattr(module, "fit", spy)
    options = Options(passes=2, seeds=2, judge_rows=0)
    result = sweep(small(), candidates(tmp_path, ["lr=0.02,0.5,1.0"], options), out=tmp_path / "out", options=options)
    assert trained == [
        ["colour-01-seed0", "colour-01-seed1", "colour-03-seed0", "colour-03-seed1"],
        ["colour-02-seed0", "colour-02-seed1"],
    ]
    assert {ranked.name for ranked in result.ranking} == {"colour-01", "colour-02", "colour-03"}
    for ranked in result.ranking:
        values = [run.best["value"] for run in ranked.results]
        assert ranked.value == pytest.approx(sum(values) / 2) and ranked.spread == (min(values), max(values))
    assert len(read_results(tmp_path / "out/pass-1")) == 4


def test_rates_in_times_of_the_methods_default(tmp_path):
    tried = make_candidates(write_task(tmp_path), ["method=prompt,kv", "lr=0.5x,2x"], Options(), ["train.steps=8"])
    expected = [factor * DEFAULTS[method].lr for method in ("prompt", "kv") for factor in (0.5, 2.0)]
    assert [one.setting["lr"] for one in tried] == pytest.approx(expected)
    assert [one.runs[0].lr for one in tried] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("grid", "options", "task", "message"),
    [
        (["lr=0.1"], Options(), {}, "has 1 setting, it takes 2 at least"),
        (["lr=0,0.1"], Options(), {}, r"train\.lr = 0 .* above 0"),
        (["lr=-1x,1x"], Options(), {}, r"train\.lr = -1x is not above 0"),
        (["lr=0.1,0.2"], Options(), {"dev": None}, "no dev rows"),
        (["method=kv,lora"], Options(), {}, "'lora'"),
        (["eval_rows=1,2"], Options(), {}, "how runs are judged"),
        (["steps=2,8"], Options(), {}, "the rung at 0.5 of 2 steps falls on the evaluation at step 1, which is an ear"),
    ],
)
def test_what_is_no_sweep_is_refused_before_a_base_is_loaded(tmp_path, grid, options, task, message):
    path = write_task(tmp_path, **{key: value for key, value in task.items() if value is not None})
    if "dev" in task:
        path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("dev")))
    with pytest.raises(ConfigError, match=message):
        make_candidates(path, grid, options, FAST)


def test_a_part_to_keep_is_between_none_and_all():
    for keep in (0.0, 1.0):
        with pytest.raises(ConfigError, match=f"keep = {keep:g}"):
            Options(keep=keep)


def runs_of(folder, count=8, **settings):
    grid = ["lr=" + ",".join(str(0.01 * (place + 1)) for place in range(count))]
    overrides = [f"train.{key}={value}" for key, value in settings.items()]
    return [one.runs[0] for one in candidates(folder, grid, settings=overrides)]


def test_what_does_not_fit_is_told_with_the_plan_that_fits(tmp_path):
    base, runs = small(), runs_of(tmp_path, num_vectors=64)
    meter = Meter(base, runs)
    four = meter.need(4, 4096).total
    free = int(four / 0.9) + 1024
    with pytest.raises(ConfigError, match=r"8 runs together need .* are free") as caught:
        plan_memory(base, runs, micro_tokens=4096, free=free)
    assert "--passes 2 (4 runs each) with --micro-tokens" in caught.value.hint
    plan = plan_memory(base, runs, micro_tokens=4096, free=free, passes=None)
    assert plan.passes == 2 and plan.need.num_runs == 4 and plan.need.total <= free
    assert plan_memory(base, runs, micro_tokens=4096, free=free, passes=2).passes == 2
    with pytest.raises(ConfigError, match="8 runs") as caught:
        plan_memory(base, runs, micro_tokens=4096, free=1000)
    assert "Not even 1 run" in caught.value.hint
    assert plan_memory(base, runs, micro_tokens=4096, free=1 * GB).passes == 1


def test_a_sweep_that_does_not_fit_stops_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("foreword.recipes.memory.free_memory", lambda device: 1000)
    monkeypatch.setattr(module, "fit", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="4 runs together need"):
        sweep(small(), candidates(tmp_path), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sweep_refused_before_training_may_use_its_folder_again(tmp_path):
    bad = candidates(tmp_path, ["init=vocab,labels"], settings=["train.num_vectors=1"])
    with pytest.raises(ConfigError, match="2 labels, 1 vectors"):
        sweep(small(), bad, out=tmp_path / "out")
    good = candidates(tmp_path, ["lr=0.1,0.2"], settings=["train.steps=4"])
    result = sweep(small(), good, out=tmp_path / "out", options=Options(judge_rows=0, rungs=()))
    assert [ranked.status for ranked in result.ranking] == ["done", "done"]


def test_vectors_are_counted_from_their_shapes(tmp_path):
    base = small()
    tried = {"method": "kv", "optimizer": "adamw"}, {"encoder": "residual"}, {"encoder": "low_rank", "rank": 2}
    for settings in tried:
        (run, *_) = runs_of(tmp_path, count=2, **settings)
        state = RunState(base, run)
        parameters = sum(parameter.numel() for parameter in state.tuner.parameters())
        copies = 5 * sum(tensor.numel() for tensor in state.snapshot().values())
        assert vector_bytes(base, run) == 4 * (4 * parameters + copies)


def test_longer_rows_keep_more_and_micro_batches_bound_it(tmp_path):
    base, runs = small(), runs_of(tmp_path)
    per_token, longest = activation_bytes(base, runs[0])
    assert per_token > 4 * base.spec.hidden_size * base.spec.num_layers and longest > 4
    meter = Meter(base, runs)
    assert meter.need(8, 64).activations < meter.need(8, 256).activations
    assert meter.need(8, 10**9).activations == meter.need(8, 10**8).activations  # no more than a step has
    assert meter.need(8, 64).vectors == 2 * meter.need(4, 64).vectors
