import json

import pytest
import typer
from typer.testing import CliRunner

from foreword.cli.compare_command import parse_rates, register
from foreword.compare.result import Comparison
from foreword.errors import ConfigError
from tests.bundled import BASE
from tests.compare.cases import comparison, row, small_task


@pytest.fixture
def app():
    made = typer.Typer()
    register(made)
    made.callback()(lambda: None)  # a group, as the whole command line is
    return made


def test_rates_are_read():
    assert parse_rates(None) == {}
    assert parse_rates("kv=0.05, lora=1e-3") == {"kv": 0.05, "lora": 1e-3}
    for wrong in ("kv", "kv=", "kv=fast", "=0.1,"):
        with pytest.raises(ConfigError, match="not of the form method=number"):
            parse_rates(wrong)


def test_options_reach_the_library(app, tmp_path, monkeypatch):
    seen = {}

    def compare_methods(task, base, **options):
        seen.update(options, task=task, base=base)
        options["tell"] and options["tell"]("a stage")
        return comparison([row("hard_text", 0.5)])

    monkeypatch.setattr("foreword.compare.run.compare_methods", compare_methods)
    command = ["compare", "x.toml", "--base", "b", "--methods", "text,lora", "--steps", "9", "--batch-size", "3"]
    command += ["--seed", "4", "--train-rows", "50", "--rows-limit", "20", "--decoding", "labels", "--lora-rank", "4"]
    command += ["--lr", "lora=0.01", "--set", "train.clip=2", "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(app, [*command, "--report", str(tmp_path / "r.md")])
    assert result.exit_code == 0, result.output
    assert "text scores highest" in result.output and "a stage" in result.output
    assert "scores highest" in (tmp_path / "r.md").read_text()
    settings = seen["settings"]
    assert (settings.methods, settings.rows_limit, settings.decoding) == (("hard_text", "lora"), 20, "labels")
    assert settings.lora.rank == 4 and settings.lr == {"lora": 0.01}
    assert seen["overrides"] == [
        "train.clip=2", "train.steps=9", "train.batch_size=3", "train.seed=4", "train.max_train_rows=50"
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*command, "--json"])
    assert Comparison.from_json(json.loads(result.stdout)) == comparison([row("hard_text", 0.5)])


def test_a_report_of_unknown_kind_is_refused_first(app, monkeypatch):
    monkeypatch.setattr("foreword.compare.run.compare_methods", None)
    result = CliRunner().invoke(app, ["compare", "x.toml", "--base", "b", "--report", "r.pdf"])
    assert isinstance(result.exception, ConfigError) and ".pdf" in str(result.exception)


@pytest.mark.slow
def test_a_baseline_alone_runs_from_the_shell(app, tmp_path):
    command = ["compare", str(small_task(tmp_path)), "--base", str(BASE), "--methods", "text", "--rows-limit", "4"]
    result = CliRunner().invoke(app, [*command, "--timing-rounds", "1", "--out", str(tmp_path / "o"), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["base"] == "base-3m" and data["rows"][0]["method"] == "hard_text" and data["paired"] == []
