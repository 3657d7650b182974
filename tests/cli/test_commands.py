"""The command line as a user meets it, wrong input included: a clear message, an exit code by kind, nothing lost."""

import json
import subprocess
import sys

import pytest
import torch

import foreword
from foreword.cli import app, main
from foreword.core.artefact import load_artefact
from tests.bundled import BASE, write_task

FAST = ["--set", "train.steps=4", "--set", "train.batch_size=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    toml = write_task(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["foreword", "train", str(toml), "--base", str(BASE), *FAST])
        patch.setattr(sys, "argv", [*sys.argv, "--methods", "prompt,kv", "--out", str(folder / "out"), "--json"])
        with pytest.raises(SystemExit) as leaving:
            main()
        assert not leaving.value.code
    return folder


def commands():
    return sorted(command.name or command.callback.__name__ for command in app.registered_commands)


def test_every_named_command_exists_with_an_example_and_json():
    named = "demo train eval generate publish list show diff promote rollback serve import export doctor version"
    assert set(named.split()) <= set(commands())
    for command in app.registered_commands:
        assert "Example: foreword" in command.callback.__doc__
        assert "as_json" in command.callback.__annotations__, command.name


def test_help_of_every_command(run):
    for name in commands():
        code, out, _ = run(name, "--help")
        assert code == 0 and "Example: foreword" in out


def test_version(run):
    code, out, _ = run("version", "--json")
    assert code == 0 and json.loads(out)["foreword"] == foreword.__version__


def test_what_a_launcher_starts_several_times_is_refused_but_train(run, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in set(commands()) - {"train"}:
        code, out, err = run(name)
        assert (code, out) == (2, "") and err.startswith(f"error: foreword {name} runs in one process")
    assert "cannot read nothing.toml" in run("train", "nothing.toml", "--base", tmp_path)[2]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run("version")[0] == 0


def test_train_writes_artefacts(trained):
    assert load_artefact(trained / "out/colour-kv.safetensors").header.method == "kv"
    assert load_artefact(trained / "out/colour-prompt.safetensors").header.method == "prompt"


def test_eval_generate_publish_and_doctor(run, trained):
    vectors = trained / "out/colour-kv.safetensors"
    toml = trained / "colour.toml"
    code, out, err = run("eval", toml, "--base", BASE, "--vectors", vectors, "--split", "dev", "--json")
    assert code == 0, err
    kinds = [report["kind"] for report in json.loads(out)["reports"]]
    assert kinds[0] == "prefix" and {"hard_text", "few_shot"} <= set(kinds)
    report = trained / "report.json"
    assert run("eval", toml, "--base", BASE, "--vectors", vectors, "--split", "dev", "--out", report)[0] == 0
    code, out, _ = run(
        "eval", toml, "--base", BASE, "--vectors", vectors, "--split", "dev", "--against", report, "--no-baselines"
    )
    assert code == 0 and "no difference" in out
    assert run("publish", vectors, "--alias", "prod")[0] == 0
    code, out, _ = run("generate", "the cart is red", "--base", BASE, "--vectors", "colour", "--json")
    assert code == 0 and len(json.loads(out)) == 1
    code, out, err = run("doctor", "colour@1", "--base", BASE, "--json")
    assert code == 0, out
    assert {finding["check"] for finding in json.loads(out)["findings"]} >= {"file", "base", "conformance", "registry"}


def test_doctor_finds_other_weights(run, trained, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "other")
    vectors = trained / "out/colour-kv.safetensors"
    code, out, _ = run("doctor", vectors, "--base", tmp_path / "other", "--json")
    findings = {finding["check"]: finding for finding in json.loads(out)["findings"]}
    assert code == 3 and not findings["base"]["ok"] and "weights_sha256" in findings["base"]["measured"]
    code, _, err = run("generate", "x", "--base", tmp_path / "other", "--vectors", vectors)
    assert code == 3 and "another base: weights_sha256" in err and "--allow-mismatch" in err
    assert run("generate", "x", "--base", tmp_path / "other", "--vectors", vectors, "--allow-mismatch")[0] == 0


def test_export_and_import_again(run, trained, tmp_path):
    vectors = trained / "out/colour-kv.safetensors"
    code, _, err = run("export", vectors, "--out", tmp_path / "peft", "--base", BASE)
    assert code == 0, err
    assert (tmp_path / "peft/adapter_config.json").exists()
    out = tmp_path / "back.safetensors"
    code, _, err = run("import", tmp_path / "peft", "--base", BASE, "--out", out, "--task", "colour")
    assert code == 0 and load_artefact(out).header.method == "kv", err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "nowhere.toml", "--base", BASE], 2, "cannot read nowhere.toml"),
        (["train", "TOML", "--base", "/no/such/base", *FAST], 2, "no base model can be loaded"),
        (["train", "TOML", "--base", BASE, "--set", "train.stepps=3"], 2, "unknown key train.stepps"),
        (["train", "TOML", "--base", BASE, "--set", "train.lr=fast"], 2, "train.lr"),
        (["train", "TOML", "--base", BASE, "--methods", "prmpt"], 2, "'prmpt'"),
        (["train", "TOML", "--base", BASE, "--out", "OUT"], 2, "holds finished results"),
        (["train", "TOML", "--base", BASE, "--device", "cuda"], 2, "no CUDA device"),
        (["eval", "TOML", "--base", BASE, "--vectors", "nothing"], 6, "nothing"),
        (["eval", "TOML", "--base", BASE, "--vectors", "colour@9"], 6, "colour"),
        (["eval", "TOML", "--base", BASE, "--vectors", "no.safetensors"], 3, "cannot read no.safetensors"),
        (["doctor", "TORN", "--base", BASE], 3, ""),
        (["publish", "TORN"], 3, "not a safetensors file"),
        (["import", "EMPTY", "--base", BASE, "--out", "x.safetensors"], 3, "adapter_config.json"),
        (["generate", "--base", BASE], 2, "no text to answer"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_input(run, trained, tmp_path, monkeypatch, arguments, code, message):
    if arguments[0] == "train" and "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    torn, empty = tmp_path / "torn.safetensors", tmp_path / "empty"
    torn.write_bytes((trained / "out/colour-kv.safetensors").read_bytes()[:-7][:3000])
    empty.mkdir()
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    named = {"TOML": trained / "colour.toml", "OUT": trained / "out", "TORN": torn, "EMPTY": empty}
    found, out, err = run(*[named.get(argument, argument) for argument in arguments])
    sys.stdin.close()
    assert found == code, (out, err)
    assert message in out + err
    assert "Traceback" not in err


def test_malformed_rows_name_file_and_row(run, tmp_path):
    toml = write_task(tmp_path)
    train = tmp_path / "colour.train.jsonl"
    lines = train.read_text().splitlines()
    lines[4] = '{"input": "x", "target": '
    train.write_text("\n".join(lines))
    code, _, err = run("train", toml, "--base", BASE, "--out", tmp_path / "out")
    assert code == 4 and "colour.train.jsonl, row 5: malformed JSON" in err
    train.write_text("")
    code, _, err = run("train", toml, "--base", BASE, "--out", tmp_path / "out")
    assert code == 4 and "holds no rows" in err
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_ctrl_c_leaves_a_resumable_state(tmp_path):
    toml = write_task(tmp_path)
    command = [sys.executable, "-m", "foreword", "train", str(toml), "--base", str(BASE), "--out", str(tmp_path / "o")]
    command += ["--set", "train.steps=400", "--set", "train.batch_size=4", "--set", "train.eval_every=1"]
    import signal
    import time

    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    line = child.stderr.readline()
    while "step" not in line and line:
        line = child.stderr.readline()
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "stopped after step" in err and "--resume" in err and "Traceback" not in err
    assert (tmp_path / "o/checkpoint.safetensors").exists()


def test_help_starts_quickly_enough_to_be_used():
    """No timing here (bench/startup.py times it): nothing heavy is imported, which is what makes it quick."""
    code = "import sys; sys.argv = ['foreword', '--help']\nfrom foreword.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass\n"
    code += "print([m for m in ('torch', 'transformers', 'numpy', 'sqlalchemy', 'fastapi') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "[]"
