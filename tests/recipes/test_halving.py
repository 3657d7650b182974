"""Which settings stop at which rung: a function of the histories alone."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from foreword.config import TrainConfig
from foreword.errors import ConfigError
from foreword.recipes.halving import Halving, check_rungs, parse_rungs, rung_step
from foreword.train.run import Run, Standing


def run(name, **settings):
    return Run(SimpleNamespace(name="t"), TrainConfig(**{"steps": 100, "eval_every": 25, **settings}), name)


def standing(one, losses, step=None, status="running", key="dev_loss"):
    history = [{"step": 25 * (place + 1), key: loss} for place, loss in enumerate(losses)]
    return Standing(one, 25 * len(losses) if step is None else step, status, history)


RUNS = [run(name) for name in "abcd"]
HALVING = Halving({name: name for name in "abcd"})


def stopped(losses, **options):
    return HALVING([standing(one, values, **options) for one, values in zip(RUNS, losses, strict=True)])


def test_nothing_stops_before_all_are_judged_at_the_rung():
    assert stopped([[], [], [], []]) == set()
    standings = [standing(one, [0.5]) for one in RUNS[:3]] + [standing(RUNS[3], [], step=24)]
    assert HALVING(standings) == set()


def test_the_worse_half_stops_at_each_rung():
    assert stopped([[1.0], [2.0], [3.0], [0.5]]) == {"b", "c"}
    assert stopped([[1.0, 0.2], [2.0], [3.0], [0.5, 0.4]]) == {"b", "c", "d"}


def test_the_same_histories_give_the_same_decision_later():
    """A resumed sweep sees ended runs: the first rung is judged by what was known at the first rung."""
    standings = [
        standing(RUNS[0], [1.0, 0.9], step=60),
        standing(RUNS[1], [2.0], status="stopped"),
        standing(RUNS[2], [3.0], status="stopped"),
        standing(RUNS[3], [0.5, 1.5], status="running"),
    ]
    assert HALVING(standings) == {"a", "b", "c"}  # d's best so far is 0.5


def test_a_diverged_run_counts_with_what_it_has_and_does_not_block():
    standings = [standing(RUNS[0], [1.0]), standing(RUNS[1], [], status="diverged"), standing(RUNS[2], [2.0])]
    standings.append(standing(RUNS[3], [3.0]))
    assert HALVING(standings) == {"b", "d"}
    nan = [standing(one, [value]) for one, value in zip(RUNS, [1.0, math.nan, 2.0, 3.0], strict=True)]
    assert HALVING(nan) == {"b", "d"}


def test_seeds_of_a_setting_stop_together_by_their_mean():
    halving = Halving({"a": "one", "b": "one", "c": "two", "d": "two"})
    standings = [standing(one, [value]) for one, value in zip(RUNS, [0.1, 4.0, 1.0, 1.2], strict=True)]
    assert halving(standings) == {"a", "b"}


def test_a_metric_is_better_when_higher():
    runs = [run(name, best_by="metric") for name in "abcd"]
    standings = [standing(one, [v], key="dev_metric") for one, v in zip(runs, [0.9, 0.1, 0.2, 0.8], strict=True)]
    assert HALVING(standings) == {"b", "c"}


def test_runs_of_other_lengths_meet_at_the_same_part_of_their_steps():
    long = run("d", steps=400, eval_every=100)
    halving = Halving({name: name for name in "ad"}, rungs=(0.25,))
    assert halving([standing(RUNS[0], [2.0, 0.1]), Standing(long, 50, "running", [])]) == set()
    judged = Standing(long, 100, "running", [{"step": 100, "dev_loss": 1.0}])
    assert halving([standing(RUNS[0], [2.0, 0.1]), judged]) == {"a"}


def test_keep_rounds_up_and_leaves_one():
    assert len(Halving({n: n for n in "abcd"}, (0.25,), 0.3)([standing(r, [1.0]) for r in RUNS])) == 2
    assert len(Halving({n: n for n in "abcd"}, (0.25,), 0.01)([standing(r, [1.0]) for r in RUNS])) == 3


def test_a_rung_is_the_first_evaluation_at_or_behind_it():
    assert rung_step(RUNS[0], 0.25) == 25
    assert rung_step(run("a", eval_every=30), 0.25) == 30
    assert rung_step(run("a", steps=6, eval_every=None), 0.5) == 4
    assert rung_step(dataclasses.replace(run("a", steps=300, eval_every=100)), 1 / 3) == 100


@pytest.mark.parametrize(
    ("settings", "rungs", "message"),
    [
        ({"eval_every": 100}, (0.25, 0.5), "step 100, which is the end"),
        ({"eval_every": 50}, (0.25, 0.5), "step 50, which is an earlier rung"),
    ],
)
def test_rungs_without_an_evaluation_are_refused(settings, rungs, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_rungs([run("a", **settings)], rungs)
    assert "train.eval_every" in caught.value.hint


def test_rungs_are_read():
    assert parse_rungs("1/4,1/2") == parse_rungs("0.25, 0.5") == (0.25, 0.5)
    assert parse_rungs("none") == ()
    for text in ("1/2,1/4", "0,0.5", "1/2,1", "1/2,1/2"):
        with pytest.raises(ConfigError, match="do not rise"):
            parse_rungs(text)
    for text in ("half", "1/0", ""):
        with pytest.raises(ConfigError, match="no parts"):
            parse_rungs(text)
