"""`foreword sweep`, `foreword lr` and `foreword train --share` as a user meets them, wrong input included."""

import json

import pytest

from tests.bundled import BASE, write_task

FAST = ["--set", "train.steps=4", "--set", "train.batch_size=4", "--set", "train.init=vocab"]


def test_sweep_prints_its_result_and_writes_the_report(run, tmp_path):
    toml = write_task(tmp_path)
    asked = ["sweep", toml, "--base", BASE, *FAST, "--grid", "lr=0.5x,1x", "--judge-rows", "4"]
    code, out, _ = run(*asked, "--out", tmp_path / "out", "--report", tmp_path / "sweep.md", "--json")
    assert code == 0
    data = json.loads(out)
    assert len(data["ranking"]) == 2 and data["best"].keys() == {"lr"} and data["paired"]["num_rows"] == 4
    assert {ranked["status"] for ranked in data["ranking"]} == {"done", "stopped"}
    assert "## Ranking" in (tmp_path / "sweep.md").read_text()
    code, _, err = run(*asked, "--out", tmp_path / "out")
    assert code == 2 and "holds a sweep" in err
    code, out, err = run(*asked, "--out", tmp_path / "out", "--resume")
    assert code == 0 and "Best setting" in out and "1 joint pass" in err


def test_lr_prints_its_finding(run, tmp_path):
    toml = write_task(tmp_path)
    asked = ["lr", toml, "--base", BASE, "--steps", "2", "--rates", "0.01,0.1", *FAST]
    code, out, _ = run(*asked, "--methods", "kv", "--report", tmp_path / "lr.html", "--json")
    (finding,) = json.loads(out)
    assert code == 0 and finding["lr"] in (0.01, 0.1) and len(finding["trials"]) == 2
    assert "<svg" in (tmp_path / "lr.html").read_text()


def test_tasks_share_a_source(run, tmp_path):
    tomls = write_task(tmp_path), write_task(tmp_path, "shade")
    out = tmp_path / "out"
    code, printed, _ = run("train", *tomls, "--base", BASE, *FAST, "--share", "both", "--out", out, "--json")
    assert code == 0 and len(json.loads(printed)["results"]) == 2
    assert (out / "both.shared.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--grid", "train.lrr=1,2"], "unknown key train.lrr\n  Did you mean lr?"),
        (["sweep", "--grid", "lr=0.1"], "has 1 setting, it takes 2 at least"),
        (["sweep", "--grid", "lr=0.1,0.2", "--passes", "many"], "--passes 'many' is neither auto nor a number"),
        (["sweep", "--grid", "lr=0.1,0.2", "--resume"], "--resume needs the folder"),
        (["sweep", "--grid", "lr=0.1,0.2", "--report", "x.pdf"], "'.pdf'"),
        (["lr", "--rates", "0.1,x"], "--rates '0.1,x' are no numbers"),
        (["lr", "--rates", "0,0.1"], "rate 0 is not above 0"),
        (["lr", "--report", "x.pdf"], "'.pdf'"),
        (["train", "--share", "both"], "is the only one of method"),
        (["train", "--share", "both", "--set", "train.encoder=mlp"], "'mlp'"),
    ],
)
def test_wrong_input_is_refused_before_a_base_is_loaded(run, tmp_path, arguments, message):
    command, *rest = arguments
    code, _, err = run(command, write_task(tmp_path), "--base", "/nowhere", *rest)
    assert code == 2 and message in err
