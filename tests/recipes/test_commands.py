"""The recipes' commands as a user meets them: lines to copy, JSON, wrong input."""

import json

import pytest

from foreword.core.artefact import load_artefact
from foreword.registry.store import Registry
from foreword.train.loop import fit
from foreword.train.run import Run
from tests.bundled import BASE, bundled, write_task
from tests.command import command_runner
from tests.recipes import cases

FAST = ["--steps", "3", "--eval-rows", "4", "--decoding", "free"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A registry with a task of the bundled base, kv and prompt, the kv as prod."""
    folder = tmp_path_factory.mktemp("home")
    file = write_task(folder)
    runs = [Run.from_toml(file, method=method, name=method, **cases.FAST) for method in ("kv", "prompt")]
    results = fit(bundled(), runs, out=folder / "out")
    with Registry.open(folder / "home") as registry:
        registry.publish(results[0].artefact, alias="prod")
        registry.publish(results[1].artefact)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, home):
    """Run a command line with the registry; return (exit code, standard output, standard error)."""
    return command_runner(monkeypatch, capsys, last=["--home", str(home / "home")])


def test_a_tweak_prints_the_line_that_promotes_it(run, home, tmp_path):
    add = cases.purple(tmp_path / "new.jsonl")
    code, out, err = run("tweak", "colour", "--add", add, "--base", BASE, "--out", tmp_path / "out", *FAST)
    assert code == 0, err
    line = next(line.strip() for line in out.splitlines() if "foreword promote" in line)
    assert line.startswith("foreword promote colour@") and "old dev rows" in out and "new dev rows" in out
    arguments = [part for part in line.split()[1:] if part != "--force"]
    code, out, err = run(*arguments)
    assert code == (6 if "--force" in line else 0), err  # with --force printed the gate refuses without it
    with Registry.open(home / "home") as registry:
        registry.tag("colour@1", "prod")


def test_hard_text_as_json(run, tmp_path):
    arguments = ["--base", BASE, "--eval-rows", "4", "--decoding", "free", "--no-publish", "--json"]
    code, out, err = run("tweak", "colour", "--hard-text", "Warm or cold?", "--out", tmp_path / "out", *arguments)
    assert code == 0, err
    found = json.loads(out)
    assert found["candidate"] is None and found["promote"] is None and found["trained"] == {}
    header = load_artefact(found["artefact"]).header
    assert header.template["text"] == "{soft:4}Warm or cold?\n{input}"


def test_prune_ensemble_similar_and_migrate_as_json(run, home, tmp_path):
    code, out, err = run("prune", "colour@1", "--base", BASE, "--rows", "6", "--out", tmp_path / "p", *FAST, "--json")
    assert code == 0, err
    assert len(json.loads(out)["effects"]) == 4
    versions = ["--versions", "colour@1,colour@2", "--limit", "4", "--json"]
    code, out, err = run("ensemble", home / "colour.toml", "--base", BASE, *versions)
    assert code == 0, err
    assert set(json.loads(out)["members"]) == {"colour@1", "colour@2"}
    other = write_task(tmp_path, "other")
    code, out, err = run("similar", other, "--base", BASE, "--method", "kv", "--rows", "4", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["matches"][0]["reference"] == "colour@1"
    assert (found["train"] is None) == (found["recommended"] is None)
    if found["train"]:
        assert "--set train.init=from:colour@1" in found["train"]
    code, out, err = run("migrate", "--base", BASE, "--out", tmp_path / "m", "--json")
    assert code == 0 and json.loads(out)["tasks"][0]["outcome"] == "on this base already", err


def test_texts_for_people(run, home):
    versions = ["--versions", "colour@1,colour@2", "--limit", "4"]
    code, out, _ = run("ensemble", home / "colour.toml", "--base", BASE, *versions)
    assert code == 0 and "vote: majority" in out and "requests a row" in out
    code, out, _ = run("migrate", "--base", BASE)
    assert code == 0 and "on this base already" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tweak", "colour", "--base", BASE], 2, "neither --add nor --template given"),
        (["tweak", "colour", "--base", BASE, "--add", "a", "--template", "b"], 2, "--add and --template given"),
        (["tweak", "colour", "--base", BASE, "--hard-text", "x", "--system", "y"], 2, "--system goes with --template"),
        (["tweak", "color", "--base", BASE, "--add", "a.jsonl"], 6, "no task 'color'"),
        (["tweak", "colour", "--base", BASE, "--add", "nowhere.jsonl"], 4, "cannot read nowhere.jsonl"),
        (["tweak", "colour", "--base", BASE, "--add", "a", "--rehearsal", "1"], 2, "a rehearsal of 1"),
        (["tweak", "colour", "--base", BASE, "--template", "{soft:9}{input}"], 2, "{soft:9}"),
        (["prune", "colour@99", "--base", BASE], 6, "no version colour@99"),
        (["migrate", "--base", BASE, "--tasks", "nothing"], 6, "no task 'nothing'"),
        (["migrate", "--base", "/no/such/base"], 2, "no base model can be loaded"),
        (["similar", "nowhere.toml", "--base", BASE], 2, "cannot read nowhere.toml"),
        (["similar", "colour@1", "--base", BASE], 6, "no version of another task than 'colour'"),
        (["ensemble", "TOML", "--base", BASE], 2, "neither of --versions and --seeds"),
        (["ensemble", "TOML", "--base", BASE, "--versions", "colour@1,colour@1"], 2, "colour@1 stands twice"),
        (["ensemble", "TOML", "--base", BASE, "--versions", "colour@1,colour@77"], 6, "colour@77"),
        (["ensemble", "TOML", "--base", BASE, "--versions", "colour@1"], 2, "an ensemble of 1 member"),
    ],
)
def test_wrong_input(run, home, arguments, code, message):
    found, out, err = run(*[home / "colour.toml" if argument == "TOML" else argument for argument in arguments])
    assert found == code and message in err, (out, err)
    assert "Traceback" not in err
