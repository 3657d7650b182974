"""`foreword explain` as a user meets it: what it prints and writes, and what it says of wrong input."""

import dataclasses
import json

import pytest

from foreword.core.artefact import load_artefact, save_artefact
from foreword.core.compile import compile
from foreword.core.conformance import make_probes
from tests.bundled import BASE, bundled, write_task
from tests.command import command_runner
from tests.serve.artefacts import write_artefact


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command line; return (exit code, standard output, standard error)."""
    monkeypatch.setenv("FOREWORD_HOME", str(tmp_path / "home"))
    return command_runner(monkeypatch, capsys, first=["explain"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained prompt with conformance probes, a kv without, and a task."""
    folder = tmp_path_factory.mktemp("explained")
    write_task(folder, rows=24)
    path = write_artefact(folder, "colour", base=bundled(), num_vectors=3)
    artefact = load_artefact(path)
    probes = make_probes(bundled(), compile(bundled(), artefact), [[20, 21, 22], [30, 31]])
    save_artefact(path, dataclasses.replace(artefact.header, conformance=probes), artefact.tensors)
    write_artefact(folder, "colour", "kv", base=bundled(), num_vectors=3)
    return folder


def test_a_task_is_explained_on_the_terminal(run, folder):
    vectors = folder / "colour-prompt-0.safetensors"
    code, out, _ = run(vectors, "--base", BASE, "--task", folder / "colour.toml", "--dtype", "float32")
    assert code == 0
    for heading in ("Verdict", "Prefix mass", "Vector by vector", "Norms", "Nearest tokens", "Reach into the text"):
        assert f"\n{heading}\n" in out
    assert "Rows: 8 of 8 rows of colour dev" in out


def test_json_and_a_page_hold_the_same_verdict(run, folder, tmp_path):
    vectors = folder / "colour-prompt-0.safetensors"
    common = (vectors, "--base", BASE, "--rows", folder / "colour.dev.jsonl", "--limit", 6, "--no-one-by-one")
    code, out, _ = run(*common, "--json", "--out", tmp_path / "page.html", "--dtype", "float32")
    found = json.loads(out)
    assert code == 0 and found["num_rows"] == 6 and found["one_by_one"] is None
    sentence = found["verdict"]["sentence"]
    assert sentence[1:40] in (tmp_path / "page.html").read_text()
    code, out, _ = run(*common, "--out", tmp_path / "page.json", "--dtype", "float32")
    assert code == 0 and out.startswith(sentence[:20]) and "wrote " in out
    assert json.loads((tmp_path / "page.json").read_text())["data"]["verdict"] == found["verdict"]


def test_without_rows_the_probes_are_taken_and_what_is_missing_is_said(run, folder):
    code, out, _ = run(folder / "colour-prompt-0.safetensors", "--base", BASE, "--dtype", "float32")
    assert code == 0 and "conformance probes" in out
    assert "The rows have no targets" in out and "give --task or --rows" in out
    code, _, err = run(folder / "colour-kv-0.safetensors", "--base", BASE)
    assert code == 2 and "nothing to measure on" in err and "Give --task, --rows or --text." in err


def test_keys_and_values_say_that_they_have_no_nearest_tokens(run, folder):
    code, out, _ = run(
        folder / "colour-kv-0.safetensors", "--base", BASE, "--text", "red cart", "--text", "sea", "--dtype", "float32"
    )
    assert code == 0 and "there are no nearest tokens" in out.replace("\n ", "") and "\nNearest tokens\n" not in out


def test_wrong_input(run, folder, tmp_path):
    vectors = folder / "colour-prompt-0.safetensors"
    code, _, err = run(tmp_path / "none.safetensors", "--base", BASE)
    assert code == 3 and "none.safetensors" in err
    code, _, err = run("nothing@7", "--base", BASE)
    assert code == 6 and "nothing" in err
    code, _, err = run(vectors, "--base", tmp_path / "no-base")
    assert code == 2 and "no base model can be loaded" in err
    code, _, err = run(vectors, "--base", BASE, "--out", tmp_path / "page.pdf")
    assert code == 2 and "'.pdf'" in err and ".html" in err
    code, _, err = run(vectors, "--base", BASE, "--rows", tmp_path / "rows.jsonl")
    assert code == 4 and "rows.jsonl" in err
    code, _, err = run(vectors, "--base", BASE, "--text", "a", "--rows", folder / "colour.dev.jsonl")
    assert code == 2 and "rows and texts were given" in err
    code, _, err = run(vectors, "--base", BASE, "--limit", 0)
    assert code == 2 and "limit = 0" in err
    artefact = load_artefact(vectors)
    other = tmp_path / "other.safetensors"
    changed = dataclasses.replace(artefact.header.base, weights_sha256="0" * 64)
    save_artefact(other, dataclasses.replace(artefact.header, base=changed), artefact.tensors)
    code, _, err = run(other, "--base", BASE, "--text", "red")
    assert code == 3 and "trained for another base" in err and "--allow-mismatch" in err
    code, _, _ = run(other, "--base", BASE, "--text", "red", "--allow-mismatch", "--dtype", "float32")
    assert code == 0
