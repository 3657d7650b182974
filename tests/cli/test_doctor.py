"""`foreword doctor` as a user meets it: what it prints, its exit codes, and every wrong input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from foreword.registry.store import Registry
from foreword.serve.gateway import create_app
from tests.command import Run, command_runner
from tests.doctor.lab.server.plants import NoVectors
from tests.doctor.lab.server.stage import BASE, NUM_VECTORS, base_of, home_of, running
from tests.serve.artefacts import write_artefact
from tests.serve.fakes import FakeBackend, served

SUBJECTS = """
from foreword.core.block import Block
from foreword.core.init import initial_vectors
from foreword.doctor.subjects import Implementation
from tests.tiny import tiny


def lost():
    base = tiny("llama")
    plain = lambda ids, mask: base.model(input_ids=ids, attention_mask=mask).logits
    vectors = initial_vectors(base, "kv", Block((5,)), "random", seed=3)
    return Implementation(declared="kv", num_vectors=5, base=base, forward=plain, vectors=vectors)


def broken():
    raise RuntimeError("no GPU here")


def wrong():
    return "a model"


number = 3
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command line in an empty folder; return (exit code, standard output, standard error)."""
    monkeypatch.setenv("FOREWORD_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FOREWORD_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return command_runner(monkeypatch, capsys, first=["doctor"])


@pytest.fixture
def subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examined.py").write_text(SUBJECTS)
    (tmp_path / "raises.py").write_text("1 / 0")
    (tmp_path / "needs.py").write_text("import nothing_of_this_name")
    for name in ("examined", "raises", "needs"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_environment_is_examined_where_nothing_is_named(run: Run) -> None:
    code, out, _ = run()
    assert code == 0 and "Nothing was found" in out and "torch" in out and "registry" in out


@pytest.mark.usefixtures("subjects")
def test_an_implementation_of_ones_own_is_examined(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--module", "examined:lost", "--out", tmp_path / "report.html")
    assert code == 3, err
    assert "layers-dropped" in out and "Measured: " in out and "Cure: " in out
    assert "needs training_forward" in out, "what could not be checked is told"
    assert out.index("layers-dropped") < out.index("Every check"), "the cause comes first"
    assert "layers-dropped" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("subjects")
@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("examined", "names no function"),
        ("examined:", "names no function"),
        ("not-a-name:x", "names no function"),
        ("examine:lost", "Did you mean examined"),
        ("examined.inner:healthy", "no module 'examined.inner'"),
        ("examined:lots", "Did you mean lost"),
        ("examined:number", "is a int, not a function"),
        ("examined:broken", "raised RuntimeError: no GPU here"),
        ("examined:wrong", "returned str, which is nothing to examine"),
        ("raises:x", "importing raises raised ZeroDivisionError"),
        ("needs:x", "needs the module 'nothing_of_this_name'"),
    ],
)
def test_a_wrong_module_is_said_with_its_cure(run: Run, reference: str, said: str) -> None:
    code, out, err = run("--module", reference)
    assert code == 2 and said in err and "Traceback" not in err and not out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--module", "a:b", "--server", "http://x"], 2, "--module and --server"),
        (["--module", "a:b", "x.safetensors"], 2, "--module and an artefact"),
        (["--bisect"], 2, "nothing to walk through"),
        (["--good", "http://x"], 2, "nothing to compare with"),
        (["--server", "http://x", "--server", "http://y", "--bisect"], 2, "2 are given"),
        (["--out", "report.pdf"], 2, ".pdf"),
        (["--server", "http://127.0.0.1:1"], 7, "does not answer"),
        (["--server", "http://127.0.0.1:1", "--bisect"], 7, "does not answer"),
        (["--server", "nonsense"], 7, "URL"),
        (["--server", "http://127.0.0.1:1", "nobody"], 6, "nobody"),
        (["nobody@1"], 6, "nobody"),
        (["--server", "http://127.0.0.1:1", "--base", "."], 2, "no tokenizer can be loaded"),
    ],
)
def test_wrong_options_are_said_with_both_values(run: Run, arguments: list[str], code: int, said: str) -> None:
    found, out, err = run(*arguments)
    assert found == code and said in err and "Traceback" not in err and not out, err


def test_a_wrong_key_is_said(run: Run, tmp_path: Path) -> None:
    backend = FakeBackend()
    with Registry.open(tmp_path / "home") as registry:
        app = create_app(backend, registry, base_name="base", require_keys=True)
        with served(app, backend) as server:
            for given in ([], ["--key", "fw-wrong"]):
                code, _, err = run("--server", server.url, *given)
                assert code == 7 and "refuses the key (401)" in err and "--key" in err


def test_a_server_is_examined_and_the_cause_comes_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREWORD_HOME", str(home_of("llama")))
    with running("llama", backend=NoVectors) as server:
        code, out, err = run("--server", server.url, "alpha", "--json")
    told = json.loads(out)
    assert code == 3, err
    assert told["first"]["fault"] == "mask-blind" and "U2" not in told["first"]["measured"]
    assert told["first"]["expected"] and told["first"]["fix"] and told["first"]["numbers"]["max_kl"] > 1e-3


def test_a_pair_of_artefacts_is_walked_through(run: Run, tmp_path: Path) -> None:
    good = write_artefact(tmp_path, "good", "kv", base=base_of("llama"), num_vectors=NUM_VECTORS)
    bad = write_artefact(tmp_path, "bad", "kv", num_vectors=NUM_VECTORS)  # of another base
    code, out, err = run(bad, "--good", good, "--json")
    assert code == 0, err + out
    code, out, err = run(bad, "--good", good, "--base", BASE, "--json")
    assert code == 0, "the good one is of another base, the new one is not"
    code, out, _ = run(good, "--good", bad, "--base", BASE, "--json")
    assert code == 3 and json.loads(out)["first"]["fault"] in ("other-base", "wrong-shape")
