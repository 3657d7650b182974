"""`foreword advise` as its user meets it: files, formats, questions on a terminal or from a pipe, wrong input."""

import io
import json
import os
import signal
import subprocess
import sys
import tomllib

import pytest
import typer

from foreword.advise.constraints import load_constraints
from foreword.advise.questions import questions
from foreword.cli import advise_command
from foreword.errors import ConfigError, ForewordError
from tests.advise.cases import TWO_LAYERS

TOML = "\n".join(["[base]", *(f"{key} = {value}" for key, value in TWO_LAYERS.items()), "[tasks]", "count = 3", ""])
NUM_QUESTIONS = len([question for question in questions() if question.table != "priorities"])
ASKED = NUM_QUESTIONS + 3
"""And the base, the hardware, and where to save."""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(TOML)
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command; return (exit code, standard output, standard error). ForewordErrors pass."""
    app = typer.Typer()
    advise_command.register(app)

    def call(*arguments, answers=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answers))
        code = 0
        try:
            app([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = leaving.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_a_file_gives_a_report_on_the_terminal(run, file):
    code, out, _ = run(file)
    assert code == 0
    assert "Recommendation" in out and "What would change the answer" in out


def test_json_alone_on_standard_output(run, file):
    code, out, _ = run(file, "--json", "--set", "tasks.count=40")
    data = json.loads(out)["data"]
    assert code == 0 and data["constraints"]["tasks"]["count"] == 40
    assert data["recommended"] in data["ranking"]


@pytest.mark.parametrize("suffix", [".md", ".html", ".json", ".txt"])
def test_a_report_is_written_by_its_suffix(run, file, tmp_path, suffix):
    out_path = tmp_path / f"report{suffix}"
    code, out, _ = run(file, "--out", out_path)
    assert code == 0 and f"wrote {out_path}" in out and "recommended: kv" in out
    assert "what is given up" in out_path.read_text().lower()
    pictures = list(tmp_path.glob("*.svg"))
    assert len(pictures) == (2 if suffix == ".md" else 0)


def test_measured_rows_turn_the_answer(run, file, tmp_path):
    rows = [
        {"method": name, "score": score, "interval": [score - 0.01, score + 0.01], "metric": "accuracy"}
        for name, score in (("prompt", 0.9), ("kv", 0.7))
    ]
    (tmp_path / "compare.json").write_text(json.dumps({"base": "x", "task": "t", "rows": rows}))
    _, out, _ = run(file, "--json", "--measured", tmp_path / "compare.json")
    assert json.loads(out)["data"]["recommended"] == "compiled_prompt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no constraints file"),
        (["none.toml"], "cannot read none.toml"),
        (["FILE", "--save", "x.toml"], "--save goes with --ask"),
        (["FILE", "--out", "report.pdf"], "'.pdf'"),
        (["FILE", "--set", "tasks.count=none"], "tasks.count = 'none'"),
        (["FILE", "--measured", "none.json"], "cannot read none.json"),
    ],
)
def test_wrong_input(run, file, arguments, message):
    with pytest.raises(ForewordError) as caught:
        run(*(file if argument == "FILE" else argument for argument in arguments))
    assert message in caught.value.message and caught.value.hint


def test_asked_from_a_pipe_with_every_default(run, tmp_path):
    saved = tmp_path / "made.toml"
    answers = "llama-3.1-8b\n" + "\n" * (ASKED - 2)
    code, out, err = run("--ask", "--json", "--save", saved, answers=answers)
    assert code == 0, err
    assert json.loads(out)["data"]["constraints"]["base"] == "llama-3.1-8b"
    assert tomllib.loads(saved.read_text()) == {"base": {"known": "llama-3.1-8b"}}
    assert err.count("How many tasks share the base?") == 1


def test_wrong_answers_are_asked_again(run, tmp_path):
    saved = tmp_path / "made.toml"
    lines = ["", "nowhere", "qwen3-0.6b", "many", "0", "12", "tags", "tagging", *[""] * (ASKED - 4), str(saved)]
    code, _, err = run("--ask", "--json", answers="\n".join(lines) + "\n")
    assert code == 0, err
    for message in (
        "a base is needed",
        "'nowhere' is neither a known base nor a folder",
        "tasks.count = 'many' is not a whole number",
        "tasks.count = '0' is less than 1",
        "'tags' is none of classification",
        "Did you mean tagging?",
    ):
        assert message in err
    constraints = load_constraints(saved)
    assert (constraints.tasks.count, constraints.tasks.kind) == (12, "tagging")


def test_a_file_gives_the_defaults_of_the_questions(run, file, tmp_path):
    file.write_text(
        TOML + '[limits]\nstorage_total_bytes = "2 MB"\n[priorities]\nwire = 2\n[hardware]\nknown = "a100"\n'
    )
    saved = tmp_path / "again.toml"
    code, _, err = run(file, "--ask", "--json", "--save", saved, "--set", "tasks.rows_per_task=70", answers="\n" * 60)
    assert code == 0, err
    before, after = load_constraints(file, ["tasks.rows_per_task=70"]), load_constraints(saved)
    assert after.to_json() == before.to_json()
    assert '"2 MB"' in saved.read_text()


def test_contradictory_answers_are_explained_and_asked_once_more(run, tmp_path):
    keys = [question.path for question in questions() if question.table != "priorities"]
    first, second = [""] * NUM_QUESTIONS, [""] * NUM_QUESTIONS
    first[keys.index("limits.update_deadline_hours")] = "1 hour"
    second[keys.index("limits.update_deadline_hours")] = "1 day"
    lines = ["llama-3.1-8b", *first, "", "", *second, "", ""]
    code, out, err = run("--ask", "--json", answers="\n".join(lines) + "\n")
    assert code == 0, err
    assert "change.review_hours = 2 is more than limits.update_deadline_hours = 1 hours" in err
    assert json.loads(out)["data"]["constraints"]["limits"]["update_deadline_hours"] == 24


def test_the_end_of_input_leaves_cleanly(run, tmp_path):
    code, out, err = run("--ask", "--save", tmp_path / "x.toml", answers="qwen3-32b\n3\n")
    assert code == 130 and out == "" and "nothing was written" in err
    assert not (tmp_path / "x.toml").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_cleanly(tmp_path):
    code = "import typer; from foreword.cli import advise_command as c; a = typer.Typer(); c.register(a); a(['--ask'])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        shown = b""
        while b"Which base?" not in shown:  # the test's time limit ends a command that never asks
            shown += os.read(process.stderr.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == b""
    assert b"nothing was written" in err and b"Traceback" not in err


def test_a_place_that_cannot_be_written_is_said(run):
    answers = "llama-3.1-8b\n" + "\n" * (ASKED - 2)
    with pytest.raises(ConfigError, match="cannot write"):
        run("--ask", "--save", "/nowhere/x.toml", answers=answers)


def test_a_folder_is_found_from_where_the_file_is_saved(run, tmp_path, monkeypatch):
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    config |= {"intermediate_size": 128, "vocab_size": 500}
    (tmp_path / "here/model").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    (tmp_path / "here/model/config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path / "here")
    saved = tmp_path / "there/c.toml"
    code, _, err = run("--ask", "--json", "--save", saved, answers="model\n" + "\n" * (ASKED - 2))
    assert code == 0, err
    assert load_constraints(saved).base.num_layers == 2
