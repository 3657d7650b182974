"""Settings: from options and TOML, refused with both values where they are wrong."""

import pytest

from foreword.distil.settings import KV_LR, DistilConfig, load_job, parse_overrides, train_config
from foreword.errors import ConfigError

TOML = """
[distil]
context = "notes.txt"
questions = "q.jsonl"
ratio = 10
seed_types = ["question"]
[train]
method = "prefix"
steps = 50
"""


def test_defaults():
    config = train_config({})
    assert (config.method, config.frozen_vectors, config.lr) == ("kv", 1, KV_LR)
    assert train_config({"lr": 0.1}).lr == 0.1
    assert train_config({"method": "prompt"}).lr is train_config({"optimizer": "adamw"}).lr is None
    made = DistilConfig(context="a.txt", name="a")
    assert made.num_written == 256 and DistilConfig(context="a", name="a", questions="q").num_written == 0
    assert DistilConfig(context="a", name="a", questions="q", self_study=9).num_written == 9


def test_a_file_and_what_stands_above_it(tmp_path):
    path = tmp_path / "handbook.toml"
    path.write_text(TOML)
    job = load_job(path, {"vectors": 7}, {"lr": 0.2})
    assert (job.distil.vectors, job.distil.ratio, job.distil.name) == (7, None, "handbook")
    assert job.distil.context == str(tmp_path / "notes.txt") and job.distil.seed_types == ("question",)
    assert (job.train.method, job.train.steps, job.train.lr) == ("prefix", 50, 0.2)


def test_a_text_is_its_own_job(tmp_path):
    job = load_job(tmp_path / "My Notes.txt", {"ratio": 8.0}, {})
    assert (job.distil.name, job.distil.ratio, job.distil.context) == ("my-notes", 8.0, str(tmp_path / "My Notes.txt"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vectors": 8, "ratio": 4.0}, "vectors = 8 and distil.ratio = 4.0"),
        ({"ratio": 1.0}, "ratio = 1.0 compresses nothing"),
        ({"vectors": 1}, "vectors = 1 is not a number of at least 2"),
        ({"init": "spraed"}, "init = 'spraed' is not one of auto, first, spread, match"),
        ({"objective": "mse"}, "objective = 'mse' is not one of kl, likelihood"),
        ({"seed_types": ("riddle",)}, "seed_types holds 'riddle'"),
        ({"name": "Hand Book"}, "name = 'Hand Book' is not a name"),
        ({"chunk_tokens": 3}, "chunk_tokens = 3 is not a number of at least 64"),
    ],
)
def test_wrong_values(given, words):
    with pytest.raises(ConfigError, match=words):
        DistilConfig(**{"context": "a.txt", "name": "a", **given})


def test_wrong_files(tmp_path):
    path = tmp_path / "a.toml"
    for text, words in (
        ("[distill]\ncontext = 'a'", r"a\.toml: unknown table \[distill\]"),
        ("[distil]\ncontext = 'a'\nratoi = 4", r"unknown key distil\.ratoi"),
        ("[distil]\nratio = 4", r"distil\.context is missing"),
        ("[distil]\ncontext = 'a'\nratio = 0.5", r"a\.toml: distil\.ratio = 0\.5"),
        ("[distil]\ncontext = 'a'\n[train]\ninit = 'text'", r"train\.init is not for a distillation"),
        ("distil = [", "not TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_job(path, {}, {})


def test_overrides():
    assert parse_overrides(["train.lr=0.3", "steps=7", "schedule=cosine"]) == {
        "lr": 0.3,
        "steps": 7,
        "schedule": "cosine",
    }
    with pytest.raises(ConfigError, match="'lr' is not of the form"):
        parse_overrides(["lr"])
