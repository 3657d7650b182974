"""The learning-rate finder: every rate is its own run over the same batches, and what is chosen lowers the loss."""

import math

import pytest

from foreword.errors import ConfigError, TrainingDiverged
from foreword.recipes.finder import LrFinding, RateTrial, default_rates, find_lr, finder_report, join_reports
from foreword.report import render
from foreword.train.run import Run
from tests.bundled import write_task
from tests.tiny import tiny
from tests.train.test_contracts import tokenizer


def small():
    return tiny("qwen3", vocab_size=4096, tokenizer=tokenizer())


def run(folder, **settings):
    return Run.from_toml(write_task(folder), **{"method": "kv", "batch_size": 4, "init": "vocab", **settings})


def test_a_rate_moves_in_proportion_and_the_choice_lowers_the_loss_most(tmp_path):
    finding = find_lr(small(), run(tmp_path), rates=[0.0001, 0.001, 0.03], steps=6)
    low, middle, high = finding.trials
    assert middle.displacement == pytest.approx(10 * low.displacement, rel=0.1)
    assert low.losses[0] == middle.losses[0] == high.losses[0]
    assert [step for step, _ in high.losses] == [0, 1, 2, 3, 4, 5, 6] and len(high.displacements) == 6
    assert finding.lr == 0.03 and finding.best.drop > middle.drop > low.drop > 0


def test_a_rate_is_tried_as_if_alone(tmp_path):
    one = find_lr(small(), run(tmp_path), rates=[0.01, 0.1], steps=4)
    two = find_lr(small(), run(tmp_path), rates=[0.03, 0.1], steps=4)
    assert one.trials[1].losses[-1][1] == pytest.approx(two.trials[1].losses[-1][1], rel=1e-3)


def test_a_rate_that_breaks_the_run_is_unstable_and_is_not_chosen(tmp_path):
    wild = run(tmp_path, optimizer="adamw", clip=0.0)
    finding = find_lr(small(), wild, rates=[0.01, 1e38], steps=4)
    assert finding.lr == 0.01 and not finding.trials[1].is_stable
    report = finder_report(finding)
    assert "**lr = 0.01**" in report.sections[0].blocks[0].text
    assert "<svg" in render(report, "html") and "no" in render(finder_report(finding, figures=False), "text")
    with pytest.raises(TrainingDiverged, match=r"no rate from 1e\+37 to 1e\+38"):
        find_lr(small(), wild, rates=[1e37, 1e38], steps=4)


def test_nothing_is_moved_but_copies(tmp_path):
    base = small()
    before = base.checksum()
    find_lr(base, run(tmp_path), rates=[0.01, 0.1], steps=2)
    assert (
        base.checksum() == before and [path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors"] == []
    )


def test_default_rates_lie_around_the_runs_own(tmp_path):
    one = run(tmp_path, lr=0.2)
    rates = default_rates(one)
    assert rates[0] == pytest.approx(0.002) and rates[-1] == pytest.approx(2.0) and len(rates) == 10
    assert any(rate == pytest.approx(one.lr) for rate in rates)


def test_the_choice_is_the_stable_rate_that_ends_lowest():
    def trial(lr, *losses, stable=True):
        return RateTrial(lr, (0.01,), tuple(enumerate(losses)), stable)

    trials = (trial(0.1, 5.0, 3.0, 2.0), trial(0.2, 5.0, 1.0, 1.2), trial(0.4, 5.0, 0.5, 0.6, stable=False))
    finding = LrFinding("r", "kv", 0.1, trials)
    assert finding.lr == 0.2 and finding.best.end == pytest.approx(1.1)
    assert trial(0.1, 5.0, math.inf).drop == -math.inf


def test_several_findings_make_one_report():
    trials = (RateTrial(0.1, (0.01,), ((0, 5.0), (1, 3.0)), True), RateTrial(0.2, (0.02,), ((0, 5.0), (1, 2.0)), True))
    reports = [finder_report(LrFinding(name, "kv", 0.1, trials)) for name in ("a", "b")]
    joined = join_reports(reports)
    assert [section.title for section in joined.sections][:2] == [
        "Learning rate of a: Recommendation",
        "Learning rate of a: Figures",
    ]
    assert joined.data["findings"][1]["run"] == "b"


@pytest.mark.parametrize(
    ("rates", "steps", "message"),
    [
        ([0.1, 0.0], 4, "rate 0 is not above 0"),
        ([-0.1, 0.1], 4, "rate -0.1 is not above 0"),
        ([math.inf, 0.1], 4, "rate inf is not above 0"),
        ([0.1], 4, "1 different rates over 4 steps"),
        ([0.1, 0.2], 1, "2 different rates over 1 steps"),
    ],
)
def test_bad_rates_are_refused(tmp_path, rates, steps, message):
    with pytest.raises(ConfigError, match=message):
        find_lr(small(), run(tmp_path), rates=rates, steps=steps)
