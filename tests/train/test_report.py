"""A run's report: what it says, what it draws, and that it is written for runs that ended in every way."""

import dataclasses
import json

import pytest

from foreword.report import Lines, Table, render
from foreword.report.markdown import figures_of
from foreword.train.curves import MAX_POINTS, curves, points
from foreword.train.loop import fit
from foreword.train.report import Pace, run_report
from foreword.train.run import Run
from foreword.train.state import RunState
from tests.bundled import bundled, write_task

FAST = {"steps": 4, "batch_size": 4, "warmup_steps": 2, "eval_every": 2}
PACE = Pace(seconds=2.0, tokens=500, steps=4, runs=1)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return RunState(bundled(), Run.from_toml(write_task(tmp_path_factory.mktemp("task")), method="kv", **FAST))


def row(step, **more):
    return {
        "step": step,
        "loss": 3.0 / step,
        "lr": 0.1,
        "grad_norm": 1.0,
        "displacement": 0.01 * step,
        "tokens": 9,
        **more,
    }


def ended(state, status="done", history=(), best=None):
    """The state as a run that ended this way leaves it."""
    copied = object.__new__(RunState)
    copied.__dict__.update(state.__dict__)
    copied.status, copied.history, copied.step = status, list(history), len(history)
    copied.best = best or {"step": len(history), "by": "last", "value": None}
    copied.best_tensors = state.good_tensors
    return copied


def test_fit_writes_a_whole_page_with_figures_and_answers(tmp_path):
    run = Run.from_toml(write_task(tmp_path), best_by="metric", **{**FAST, "steps": 2})
    (result,) = fit(bundled(), [run], out=tmp_path / "out")
    page = (tmp_path / "out/colour-prompt.html").read_text()
    assert page.count("<svg") == 5 and "<script" not in page and 'src="' not in page  # nothing beside it is needed
    for text in ("All 2 steps were taken.", "is the highest measured", run.data_sha256(), "the old ", "text tokens/s"):
        assert text in page
    assert f"{result.best['value']:.4g}" in page


def test_the_report_says_what_was_kept_and_why(state):
    history = [row(1), row(2, dev_loss=1.5), row(3), row(4, dev_loss=1.25)]
    cases = [
        (
            ended(state, "done", history, {"step": 4, "by": "dev_loss", "value": 1.25}),
            "**1.25**, is the lowest measured",
        ),
        (ended(state, "early_stopped", history, {"step": 2, "by": "dev_loss", "value": 1.5}), "Stopped early after 4"),
        (ended(state, "stopped", history), "no evaluation was there to choose by"),
        (ended(state, "diverged", history[:1]), "Diverged at step 2"),
    ]
    for made, text in cases:
        assert text in render(run_report(bundled(), made, PACE), "markdown").replace("\\", "")


def test_settings_data_pace_and_versions_are_there(state):
    report = run_report(bundled(), ended(state, "done", [row(step) for step in range(1, 5)]), PACE)
    text = render(report, "text")
    for part in (
        state.run.data_sha256(),
        "250 text tokens/s, 500 ms a step",
        bundled().fingerprint.weights_sha256,
        "torch",
    ):
        assert part in text
    assert "since the last resume" not in text
    tables = [block for section in report.sections for block in section.blocks if isinstance(block, Table)]
    shown = {key: value for table in tables if table.caption == "[train]" for key, value in table.rows}
    wanted = state.run.resolved()["train"]
    assert {key: str(value) for key, value in shown.items()} == {key: str(value) for key, value in wanted.items()}
    resumed = run_report(bundled(), ended(state, "done", [row(step) for step in range(1, 9)]), PACE)
    assert "since the last resume" in render(resumed, "text")
    assert json.loads(render(report, "json"))["data"]["history"][0]["step"] == 1


def test_a_run_that_diverged_at_once_has_a_report_without_curves(state):
    report = run_report(bundled(), ended(state, "diverged"), dataclasses.replace(PACE, steps=0, tokens=0))
    assert figures_of(report) == [] and "Diverged at step 1" in render(report, "text")


def test_curves_are_drawn_for_what_a_history_has():
    plain = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "dev_loss": 0.7}]
    assert [(figure.title, figure.y_log) for figure in curves(plain)] == [("Loss", False)]
    assert curves([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.1}])[0].y_log is True
    assert curves(plain)[0].series == {"training": ((1, 1.0), (2, 0.5)), "dev": ((2, 0.7),)}
    assert curves([{"step": 1, "loss": 0.0}])[0].y_log is False
    assert [figure.title for figure in curves([row(1, dev_metric=0.5)])][1] == "Metric on dev rows"
    assert all(isinstance(figure, Lines) for figure in curves([row(1)]))


def test_long_curves_are_means_of_equally_many_steps():
    history = [{"step": step, "loss": float(step % 2)} for step in range(1, 2 * MAX_POINTS + 1)]
    assert points(history, "loss") == tuple((2 * n, 0.5) for n in range(1, MAX_POINTS + 1))
    assert len(points(history[: MAX_POINTS + 1], "loss")) == MAX_POINTS // 2 + 1
    assert points(history[:MAX_POINTS], "loss") == tuple((item["step"], item["loss"]) for item in history[:MAX_POINTS])
