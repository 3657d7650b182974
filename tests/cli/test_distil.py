"""`foreword distil` as a user calls it."""

import json

import pytest
from typer.testing import CliRunner

from foreword.cli import app
from foreword.errors import ConfigError, DataError
from tests.bundled import BASE
from tests.distil.notes import write_small

FEW = ["--steps", "2", "--set", "train.batch_size=4", "--set", "warmup_steps=0", "--max-new-tokens", "8"]


def call(*arguments):
    return CliRunner().invoke(app, ["distil", *map(str, arguments), "--base", str(BASE), "--dtype", "float32"])


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FOREWORD_HOME", str(tmp_path / "home"))
    return tmp_path


def test_json_report_and_files(home):
    notes, out = write_small(home), home / "out"
    result = call(
        notes, "--questions", notes.with_name("questions.jsonl"), "--ratio", 6, "--out", out,
        "--report", home / "report.md", "--json", *FEW,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (data,) = json.loads(result.stdout)["contexts"]
    assert data["num_vectors"] == round(data["num_context_tokens"] / 6)
    assert (out / "notes.safetensors").is_file() and "KL gap closed" in (home / "report.md").read_text()
    assert list((home / "home" / "distil").glob("*.safetensors")), "the teacher's numbers are kept at home"


def test_a_toml_file_names_everything(home):
    notes = write_small(home)
    path = home / "handbook.toml"
    path.write_text(
        f'[distil]\ncontext = "{notes.name}"\nquestions = "questions.jsonl"\nvectors = 5\nmax_new_tokens = 8\n'
        '[train]\nmethod = "prompt"\nsteps = 2\nbatch_size = 4\nwarmup_steps = 0\n'
    )
    result = call(path, "--out", home / "out")
    assert result.exit_code == 0, result.output
    assert "into 5 vectors of method prompt" in result.stdout
    assert "publish it: foreword publish" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["{missing}"], DataError, "cannot read the context"),
        (["{notes}", "--vectors", "9", "--ratio", "4"], ConfigError, "vectors = 9 and distil.ratio = 4.0"),
        (["{notes}", "{notes}", "--name", "a"], ConfigError, "--name a for 2 contexts"),
        (["{notes}", "--report", "a.pdf"], ConfigError, "a.pdf has suffix '.pdf'"),
        (["{notes}", "--set", "lr"], ConfigError, "'lr' is not of the form"),
    ],
)
def test_mistakes(home, arguments, error, words):
    notes = write_small(home)
    places = {"notes": notes, "missing": home / "none.txt"}
    result = call(*[argument.format(**places) for argument in arguments], "--out", home / "out")
    assert isinstance(result.exception, error)
    assert words in result.exception.message
    assert not (home / "out" / "results.json").exists()
