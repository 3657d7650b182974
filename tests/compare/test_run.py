import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import foreword.compare.run as run_module
import foreword.compare.training as training
import foreword.train.loop as loop
from foreword.compare.plan import METHODS, TRAINED, Lora, make_plan
from foreword.compare.result import load_comparisons
from foreword.compare.run import compare_methods
from foreword.compare.training import Job, read_trained, train_apart
from foreword.core.artefact import load_artefact
from foreword.errors import ArtefactError, BackendFailed, ConfigError
from foreword.eval.report import EvalReport
from foreword.eval.tasks import sample_rows
from foreword.train.loop import TrainingInterrupted
from tests.bundled import BASE, bundled
from tests.compare.cases import FEW, quick, small_task
from tests.tiny import tiny


def small():
    return tiny("llama", vocab_size=4096, tokenizer=bundled().tokenizer)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Drawing curves takes longer than three steps of a tiny base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foreword.train.loop.write", lambda *args: None)
        yield


def go(folder, out="out", overrides=FEW, base=None, **changes):
    lines = []
    task = folder / "colour.toml"
    found = compare_methods(
        task if task.exists() else small_task(folder), base or small(), out=folder / out,
        settings=quick(**changes), overrides=overrides, tell=lines.append,
    )  # fmt: skip
    return found, lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All six methods on a tiny base."""
    folder = tmp_path_factory.mktemp("whole")
    before = small().checksum()
    found, lines = go(folder)
    return found, lines, folder, before


def copied(whole, out, without=()):
    """Return the folder, with a copy of the results as `out`, less those of the methods `without`."""
    folder = whole[2]
    shutil.copytree(folder / "out", folder / out)
    for method in without:
        shutil.rmtree(folder / out / method)
    return folder


def test_every_method_has_a_row_with_all_figures(whole):
    found, _, _, _ = whole
    assert [row.method for row in found.rows] == list(METHODS)
    for row in found.rows:
        assert row.error is None
        assert row.score is not None and row.interval is not None and row.interval[0] <= row.score <= row.interval[1]
        assert row.num_rows == 6 and row.decoding == "free"
        assert row.bytes_per_task > 0 and row.first_token_ms > 0 and row.throughput_tokens_per_s > 0
        assert row.latency_ms > row.first_token_ms  # more than one token is made
        assert (row.training_s > 0) is (row.method in TRAINED)
        assert row.step_ms is None  # all three steps are measured on dev or the first
        assert (row.latency_cached_ms is not None) is (row.method in ("hard_text", "few_shot"))
    assert torch.get_num_threads() == found.machine["threads"]


def test_the_budget_is_one(whole):
    found, _, _, _ = whole
    trained = [row for row in found.rows if row.method in TRAINED]
    assert {(row.steps_done, row.rows_seen) for row in trained} == {(3, 12)}
    assert found.budget["steps"] == 3 and found.budget["train_rows"] == 32
    assert {row.kept["by"] for row in trained} == {"dev_loss"}


def test_all_were_judged_on_the_same_rows(whole):
    found, _, folder, _ = whole
    reports = [EvalReport.load(folder / "out" / method / "report.json") for method in METHODS]
    assert len({report.data_sha256 for report in reports}) == 1
    assert len({tuple(row.input for row in report.rows) for report in reports}) == 1
    assert len(found.paired) in (5, 9, 10)  # against the best, and against the text unless that is the best
    assert all(test.alpha == pytest.approx(0.05 / 5) for test in found.paired)


def test_bytes_are_those_on_disk(whole):
    found, _, folder, _ = whole
    for row in found.rows:
        if row.method in ("prompt", "prefix", "kv"):
            path = folder / "out" / row.method / f"{row.method}.safetensors"
            assert (row.bytes_per_task, row.tensor_bytes) == (path.stat().st_size, load_artefact(path).num_bytes)
    by = {row.method: row for row in found.rows}
    adapter = folder / "out" / "lora" / "adapter_model.safetensors"
    assert by["lora"].bytes_per_task == adapter.stat().st_size
    spec = small().spec
    assert by["kv"].tensor_bytes == spec.kv_bytes(4, 4)
    assert by["prompt"].tensor_bytes == 4 * spec.hidden_size * 4
    assert by["hard_text"].bytes_per_task == len(b"Warm or cold?\n")
    assert by["few_shot"].bytes_per_task > by["hard_text"].bytes_per_task


def test_positions_are_those_of_the_prompt(whole):
    found, _, _, _ = whole
    by = {row.method: row.prompt_positions for row in found.rows}
    assert by["prompt"] == by["prefix"] == by["kv"] == by["lora"] + 4  # the vectors
    assert by["few_shot"] > by["hard_text"] > by["lora"]


def test_the_base_is_bit_identical(whole):
    assert small().checksum() == whole[3]
    assert not any("lora" in name for name, _ in small().model.named_modules())


def test_the_result_is_saved_and_names_no_place(whole):
    found, _, folder, _ = whole
    assert load_comparisons(folder / "out" / "comparison.json") == [json_round(found)]
    assert str(folder) not in (folder / "out" / "comparison.json").read_text()
    assert found.base == "llama"


def json_round(found):
    return type(found).from_json(json.loads(json.dumps(found.to_json())))


def test_a_rerun_uses_everything_again(whole, monkeypatch):
    found, _, folder, _ = whole

    def never(*args, **kwargs):
        raise AssertionError("done before")

    monkeypatch.setattr(run_module, "train_method", never)
    monkeypatch.setattr(run_module, "measure", never)
    monkeypatch.setattr("foreword.compare.judging.evaluate", never)
    monkeypatch.setattr("foreword.compare.judging.evaluate_baseline", never)
    again, lines = go(folder)
    assert json_round(again).rows == json_round(found).rows and again.paired == found.paired
    assert lines[:4] == [f"{method}: trained before, kept" for method in TRAINED]


def test_other_settings_are_refused_with_both_values(whole):
    folder = whole[2]
    with pytest.raises(ConfigError, match=r"prompt was trained with train\.steps = 3, asked for is 4") as caught:
        go(folder, overrides=[*FEW, "train.steps=4"])
    assert "another folder" in caught.value.hint
    with pytest.raises(ConfigError, match=r"lora was trained with lora\.rank = 8, asked for is 2"):
        go(folder, lora=Lora(rank=2))
    with pytest.raises(ConfigError, match="trained with base"):
        go(folder, base=bundled())


def test_more_test_rows_are_judged_anew_without_training(whole, monkeypatch):
    folder = copied(whole, "more")
    monkeypatch.setattr(run_module, "train_method", None)
    found, _ = go(folder, out="more", methods=("hard_text", "kv"), rows_limit=9)
    assert [(row.method, row.num_rows) for row in found.rows] == [("hard_text", 9), ("kv", 9)]


def test_labels_are_decoded_for_all_alike(whole):
    folder = copied(whole, "labels")
    found, _ = go(folder, out="labels", decoding="labels")
    assert {row.decoding for row in found.rows} == {"labels"} and not any(row.error for row in found.rows)
    report = EvalReport.load(folder / "labels" / "lora" / "report.json")
    assert all(sum(row.probabilities.values()) == pytest.approx(1, abs=1e-4) for row in report.rows)


def test_a_failing_method_is_a_row_and_the_others_go_on(whole, monkeypatch):
    folder, methods = copied(whole, "nan", ("kv", "lora")), ("hard_text", "prompt", "kv", "lora")
    original = loop.step_gradients

    def without_number(*args):
        return [math.nan for _ in original(*args)]

    monkeypatch.setattr(loop, "step_gradients", without_number)  # of vectors only kv is left to train
    found, lines = go(folder, out="nan", methods=methods, lr={"lora": 1e37})
    by = {row.method: row for row in found.rows}
    for method in ("kv", "lora"):
        assert by[method].score is None and by[method].error["type"] == "TrainingDiverged"
        assert by[method].latency_ms is None and by[method].training_s is None
    assert by["prompt"].error is None and by["prompt"].score is not None
    assert {test.method for test in found.paired} <= {"hard_text", "prompt"}
    assert any(line.startswith("kv: failed") for line in lines)
    json.loads(json.dumps(found.to_json(), allow_nan=False))


def test_a_failed_method_is_tried_again_by_a_rerun(whole, monkeypatch):
    folder = copied(whole, "retry", ("lora",))
    original = training.train_lora

    def out_of_memory(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore lines")

    monkeypatch.setattr(training, "train_lora", out_of_memory)
    found, _ = go(folder, out="retry", methods=("hard_text", "lora"))
    error = {"type": "RuntimeError", "message": "DefaultCPUAllocator: can't allocate memory", "hint": ""}
    assert found.rows[1].error == error
    monkeypatch.setattr(training, "train_lora", original)
    found, _ = go(folder, out="retry", methods=("hard_text", "lora"))
    assert found.rows[1].error is None and found.rows[1].score is not None


@pytest.mark.slow
def test_an_incompatible_template_fails_where_it_must(tmp_path):
    small_task(tmp_path, template="{soft:3}{input}{soft:2}")
    found, _ = go(tmp_path, methods=("hard_text", "prompt", "prefix", "lora"))
    errors = {row.method: row.error and row.error["message"] for row in found.rows}
    assert "behind the input, which method 'prefix' cannot fill" in errors.pop("prefix")
    assert set(errors.values()) == {None}


@pytest.mark.slow
def test_a_window_too_small_for_the_block_is_the_soft_methods_failure(tmp_path):
    small_task(tmp_path, template="{soft:30}{input}")
    base = tiny("mistral-window", vocab_size=4096, tokenizer=bundled().tokenizer)
    found, _ = go(tmp_path, base=base, methods=("hard_text", "kv", "lora"))
    errors = {row.method: row.error for row in found.rows}
    assert "sliding window" in errors["kv"]["message"]
    assert errors["hard_text"] is None and errors["lora"] is None


def test_one_that_cannot_be_timed_keeps_its_score(whole, monkeypatch):
    folder = copied(whole, "untimed")
    import foreword.compare.timing as timing

    original = timing.time_request

    def broken(engine, request):
        if request.prefix == "kv":
            raise BackendFailed("gone")
        return original(engine, request)

    monkeypatch.setattr(timing, "time_request", broken)
    found, _ = go(folder, out="untimed", methods=("hard_text", "kv"))
    assert found.rows[1].score is not None and found.rows[1].latency_ms is None
    assert found.rows[1].error["type"] == "timing" and "gone" in found.rows[1].error["message"]
    assert found.rows[0].error is None and found.rows[0].latency_ms > 0


def test_an_interrupt_keeps_what_is_finished(whole, monkeypatch):
    folder = copied(whole, "stopped", ("kv",))
    original = training.fit

    def interrupted(base, runs, **options):
        if runs[0].name == "kv":
            raise TrainingInterrupted("stopped after step 1")
        return original(base, runs, **options)

    monkeypatch.setattr(training, "fit", interrupted)
    with pytest.raises(TrainingInterrupted, match="what is finished lies in") as caught:
        go(folder, out="stopped", methods=("prompt", "kv"))
    assert caught.value.exit_code == 130
    monkeypatch.setattr(training, "fit", original)
    found, lines = go(folder, out="stopped", methods=("prompt", "kv"))
    assert lines[0] == "prompt: trained before, kept" and lines[1].startswith("kv: training")
    assert all(row.error is None for row in found.rows)


def test_an_interrupted_fit_begins_anew(tmp_path):
    """Its checkpoint would go on, but then the time measured would be that of a part."""
    job = job_for(tmp_path, base="")
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / "checkpoint.safetensors").write_bytes(b"half")
    trained = training.train_method(small(), job)
    assert trained.error is None and trained.steps_done == 3


def test_an_out_that_cannot_be_written_is_said_first(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr(run_module, "load_base", None)  # nothing is loaded before
    with pytest.raises(ArtefactError, match="cannot write"):
        go(tmp_path)


def test_no_test_data_is_said_before_training(tmp_path, monkeypatch):
    small_task(tmp_path, test=None)
    monkeypatch.setattr(run_module, "train_method", None)
    with pytest.raises(ConfigError, match="no test data"):
        go(tmp_path)


def test_the_judged_rows_are_the_evaluations_own(whole):
    _, _, folder, _ = whole
    task = make_plan(folder / "colour.toml", small(), quick(), FEW).task
    expected = [row.input for row in sample_rows(task.rows("test"), 6, 0)]
    report = EvalReport.load(folder / "out" / "kv" / "report.json")
    assert [row.input for row in report.rows] == expected


def job_for(folder, method="kv", overrides=FEW, base=str(BASE)):
    own = bundled() if base else small()
    plan = make_plan(small_task(folder), own, quick(methods=(method,)), overrides)
    return Job(
        method=method, task=plan.task.config, train=plan.run(method).config, lora=Lora(),
        folder=str(folder / method), identity=plan.identity(method, own), base=base, dtype="float32",
    )  # fmt: skip


def test_a_job_survives_json(tmp_path):
    job = job_for(tmp_path)
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == dataclasses.replace(
        job, identity=json.loads(json.dumps(job.identity))
    )


def test_a_process_that_dies_is_a_failed_method(tmp_path, monkeypatch):
    monkeypatch.setattr(training.sys, "executable", "/bin/false")
    trained = train_apart(job_for(tmp_path))
    assert trained.error["message"] == "the training process ended with exit code 1"
    assert read_trained(tmp_path / "kv") is None
    killer = tmp_path / "killer"
    killer.write_text("#!/bin/sh\nkill -9 $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(training.sys, "executable", str(killer))
    assert "SIGKILL (out of memory?)" in train_apart(job_for(tmp_path)).error["message"]


@pytest.mark.slow
def test_apart_gives_the_same_vectors_and_measures_memory(tmp_path):
    found = compare_methods(
        small_task(tmp_path), str(BASE), out=tmp_path / "out", dtype="float32", overrides=FEW,
        settings=quick(methods=("kv", "lora")),
    )  # fmt: skip
    assert found.base == "base-3m"
    here, _ = go(tmp_path, out="here", base=bundled(), methods=("kv", "lora"))
    for apart, own in zip(found.rows, here.rows, strict=True):
        assert apart.error is None
        assert (apart.kept, apart.score) == (own.kept, own.score)
        assert "process of its own" in apart.training_peak_how and "process" not in own.training_peak_how
        if Path("/proc/self/clear_refs").exists():
            assert 2**20 < apart.training_peak_bytes < 2**30
    ours, theirs = (load_artefact(tmp_path / out / "kv" / "kv.safetensors") for out in ("out", "here"))
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)


@pytest.mark.slow
def test_a_terminated_worker_interrupts_and_an_orphan_stops(tmp_path):
    overrides = ["train.steps=100000", "train.batch_size=2", "train.checkpoint_every_s=1"]
    job = dataclasses.replace(job_for(tmp_path, overrides=overrides), parent=os.getpid())
    folder = tmp_path / "kv"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job.to_json()))
    command = [sys.executable, "-m", "foreword.compare.worker", str(folder / "job.json")]
    worker = subprocess.Popen(command)
    until = time.monotonic() + 120
    while not (folder / "checkpoint.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.2)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 130
    assert read_trained(folder) is None
    (folder / "job.json").write_text(json.dumps(dataclasses.replace(job, parent=1).to_json()))
    assert subprocess.run(command, timeout=120).returncode == 130
