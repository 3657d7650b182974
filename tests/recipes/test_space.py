"""What a sweep varies: grids, ranges, and what is refused with both values and the nearest name."""

import math

import pytest

from foreword.errors import ConfigError
from foreword.recipes.space import Axis, Range, check_axes, grid_settings, random_settings, setting_toml


def test_a_grid_is_every_combination_in_order():
    axes = [Axis.parse("train.method=prompt,kv"), Axis.parse("lr=0.05, 0.1")]
    assert grid_settings(axes) == [
        {"method": "prompt", "lr": 0.05},
        {"method": "prompt", "lr": 0.1},
        {"method": "kv", "lr": 0.05},
        {"method": "kv", "lr": 0.1},
    ]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("train.num_vectors=8,16", (8, 16)),
        ("train.lr=1,2x", (1, "2x")),
        ("train.init=vocab,text:Answer shortly", ("vocab", "text:Answer shortly")),
        ('train.init=["text:a, b", "vocab"]', ("text:a, b", "vocab")),
        ("train.lr=0.01:1.0:log", Range(0.01, 1.0, True)),
        ("train.num_vectors=8:64", Range(8, 64)),
    ],
)
def test_values_and_ranges(text, values):
    assert Axis.parse(text).values == values


def test_random_settings_follow_their_seed_and_stay_in_their_ranges():
    axes = [Axis.parse("lr=0.01:1.0:log"), Axis.parse("num_vectors=4:32"), Axis.parse("method=prompt,kv")]
    drawn = random_settings(axes, 200, seed=3)
    assert drawn == random_settings(axes, 200, seed=3) and drawn != random_settings(axes, 200, seed=4)
    assert all(0.01 <= one["lr"] <= 1.0 and 4 <= one["num_vectors"] <= 32 for one in drawn)
    assert all(isinstance(one["num_vectors"], int) for one in drawn)
    assert {one["method"] for one in drawn} == {"prompt", "kv"}
    below = sum(one["lr"] < 0.1 for one in drawn) / len(drawn)  # evenly in the logarithm: half lie below the middle
    assert math.isclose(below, 0.5, abs_tol=0.12)


def test_a_small_space_gives_what_it_has_once():
    axes = [Axis.parse("method=prompt,kv"), Axis.parse("num_vectors=4:5")]
    assert len(random_settings(axes, 10)) == 4


def test_a_setting_can_be_pasted():
    assert setting_toml({"lr": 0.1, "init": "text:a"}) == '[train]\nlr = 0.1\ninit = "text:a"'


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("train.lrr=1,2", r"unknown key train\.lrr", "lr"),
        ("task.metric=f1,bleu", r"keys of \[train\], not of \[task\]", ""),
        ("train.lr", "not of the form", "train.lr=0.05"),
        ("train.lr=", "not of the form", ""),
        ("train.lr=0.1,,0.2", "empty value", ""),
        ("train.lr=0.1,0.1", "holds a value twice", ""),
        ("train.seed=1,2", "does not choose the seed", "--seeds"),
        ("train.best_by=loss,metric", "how runs are judged", "--set train.best_by"),
        ("train.lr=1.0:0.1", r"from 1\.0 to 0\.1", "smaller end first"),
        ("train.lr=0:1:log", "begins at 0", "above 0"),
        ("train.init=[vocab", "no TOML list", "quotes"),
    ],
)
def test_what_is_no_axis_is_refused(text, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        Axis.parse(text)
    assert hint in caught.value.hint


def test_a_range_needs_random_and_a_key_comes_once():
    with pytest.raises(ConfigError, match=r"range from 0\.1 to 1\.0") as caught:
        grid_settings([Axis.parse("lr=0.1:1.0")])
    assert "--random" in caught.value.hint
    with pytest.raises(ConfigError, match=r"train\.lr is given twice"):
        check_axes([Axis.parse("lr=1,2"), Axis.parse("train.lr=3,4")])
