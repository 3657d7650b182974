"""`foreword train` on data in its forms, and with trackers: mistakes are told before any base is loaded."""

import json

import pytest

from foreword.core.artefact import load_artefact
from foreword.train import trackers
from tests.bundled import BASE, write_task

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
FAST = ["--set", "train.steps=3", "--set", "train.batch_size=4"]


def convert(folder, split):
    """Write the task's rows as Parquet and as a saved data set, under other names; return the columns."""
    lines = (folder / f"colour.{split}.jsonl").read_text().splitlines()
    rows = [{"question": row["input"], "answer": row["target"]} for row in map(json.loads, lines)]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(str(folder / f"{split}.parquet"))
    return made


def test_the_vectors_are_the_same_to_the_bit_whatever_holds_the_rows(tmp_path, run):
    toml = write_task(tmp_path)
    made = datasets.DatasetDict({split: convert(tmp_path, split) for split in ("train", "dev")})
    made.save_to_disk(str(tmp_path / "set"))
    columns = 'task.columns={input = "question", target = "answer"}'
    found = []
    for name, train, dev in (
        ("jsonl", "colour.train.jsonl", "colour.dev.jsonl"),
        ("parquet", "train.parquet", "dev.parquet"),
        ("set", "set#train", "set#dev"),
    ):
        named = [] if name == "jsonl" else ["--set", columns]
        places = ["--set", f"task.train={train}", "--set", f"task.dev={dev}"]
        code, out, err = run("train", toml, "--base", BASE, *FAST, *places, *named, "--out", tmp_path / name, "--json")
        assert code == 0, err
        artefact = load_artefact(json.loads(out)["results"][0]["artefact"])
        found.append((artefact.tensors["prompt"], artefact.header.training["data_sha256"]))
    assert all((tensor == found[0][0]).all() and sha256 == found[0][1] for tensor, sha256 in found)


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (["task.train=cut.parquet"], 4, "cut.parquet: Parquet magic bytes not found"),
        (["task.train=train.parquet"], 4, "column input is missing; it has question, answer"),
        (["task.train=set"], 4, "set has the splits train, dev, and none is named"),
        (["task.train=set#tran"], 4, "has no split 'tran'; it has train, dev"),
        (["task.dev=none.parquet"], 4, "none.parquet: No such file or directory"),
        (["task.train=*.parq"], 4, "no file fits the pattern"),
        (["task.columns=question"], 2, 'is not a table of names such as {input = "question"}'),
        (['task.columns={inputs = "question"}'], 2, "task.columns names 'inputs', which is no field"),
        (['task.columns={messages = "a", input = "b"}'], 2, "task.columns names both messages and input"),
        (["task.learn=every"], 2, "task.learn = 'every' (str) is not 'last' or 'all'"),
        (["task.chat=false", "task.learn=all"], 2, "task.learn = 'all' is for conversations"),
    ],
)
def test_mistakes_are_told_before_a_base_is_loaded(tmp_path, run, settings, code, message):
    toml = write_task(tmp_path)
    made = datasets.DatasetDict({split: convert(tmp_path, split) for split in ("train", "dev")})
    made.save_to_disk(str(tmp_path / "set"))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-30])
    flags = [flag for setting in settings for flag in ("--set", setting)]
    found, _, err = run("train", toml, "--base", tmp_path / "no-base", *flags, "--out", tmp_path / "out")
    assert found == code and message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_unknown_and_missing_trackers(tmp_path, run, monkeypatch):
    toml = write_task(tmp_path)
    found, _, err = run("train", toml, "--base", tmp_path / "no-base", "--track", "tensorbord")
    assert found == 2 and "unknown tracker 'tensorbord'" in err and "Did you mean tensorboard" in err
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "mlflow" else object())
    found, _, err = run("train", toml, "--base", tmp_path / "no-base", "--track", "mlflow")
    assert found == 2 and "needs mlflow, which is not installed" in err and "pip install mlflow" in err


def test_a_tracker_that_is_down_is_said_once_and_training_succeeds(tmp_path, run, monkeypatch):
    def refuse(*args):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(trackers, "OPEN", {"mlflow": refuse})
    monkeypatch.setattr(trackers, "check_tracker", lambda name: None)
    toml = write_task(tmp_path)
    with pytest.warns(UserWarning, match="mlflow failed .*no route to host.* Training goes on") as warned:
        code, out, _ = run(
            "train", toml, "--base", BASE, *FAST, "--track", "mlflow", "--out", tmp_path / "out", "--json"
        )
    assert len(warned) == 1
    assert code == 0 and json.loads(out)["results"][0]["status"] == "done"
    assert len((tmp_path / "out/colour-prompt.history.jsonl").read_text().splitlines()) == 3
