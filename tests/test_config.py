import json
import subprocess
import sys
from pathlib import Path

import pytest

from foreword.config import TaskConfig, TrainConfig, load_task
from foreword.errors import ConfigError

TASK = """
[task]
name = "triage"
train = "train.jsonl"
dev = "data/dev.jsonl"
test = "/abs/test.jsonl"
chat = true
labels = ["billing", "refund"]
hard_text = "Which team?"
[train]
method = "kv"
lr = 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "triage.toml"
    path.write_text(TASK)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_task(path, overrides)
    return str(error.value)


def test_file_becomes_configs_with_paths_beside_it(file: Path) -> None:
    task, train = load_task(file)
    assert (task.train, task.dev, task.test) == (
        str(file.parent / "train.jsonl"),
        str(file.parent / "data/dev.jsonl"),
        "/abs/test.jsonl",
    )
    assert task.labels == ("billing", "refund") and task.chat and task.template == "{soft:20}{input}"
    assert (train.method, train.lr, train.steps, train.init) == ("kv", 1, 400, None)


def test_overrides_stand_above_the_file_and_bare_words_are_text(file: Path) -> None:
    task, train = load_task(
        file,
        ["train.lr=0.3", "train.method=prefix", 'task.labels=["a", "b"]', "train.init=text:Route, please"],
    )
    assert (train.lr, train.method, train.init, task.labels) == (0.3, "prefix", "text:Route, please", ("a", "b"))
    assert load_task(file, ["task.train=more.jsonl"])[0].train == str(file.parent / "more.jsonl")


def test_json_is_resolved_and_read_back(file: Path) -> None:
    for config in load_task(file):
        data = json.loads(json.dumps(config.to_json()))
        assert type(config).from_mapping(data) == config
    assert load_task(file)[0].to_json()["labels"] == ["billing", "refund"]


def test_columns_are_a_table_of_names(file: Path) -> None:
    task, _ = load_task(file, ['task.columns={input = "question", target = "answer"}'])
    assert task.columns == {"input": "question", "target": "answer"}
    assert TaskConfig.from_mapping(json.loads(json.dumps(task.to_json()))) == task
    assert hash(task) is not None  # runs and tasks may stand in sets
    for table, message in {
        '{inputs = "x"}': "task.columns names 'inputs', which is no field\nDid you mean input",
        "{input = 3}": "is not a table of names such as {input",
        '{input = ""}': "is not a table of names such as {input",
        '{messages = "a", target = "b"}': "names both messages and target",
    }.items():
        assert message in refused(file, f"task.columns={table}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "override 'train.lrr=1': unknown key train.lrr\nDid you mean lr?"),
        ("task.lables=[]", "unknown key task.lables\nDid you mean labels"),
        ("trian.lr=1", "unknown table 'trian'\nDid you mean train or task?"),
        ("lr=1", "override 'lr=1' is not of the form table.key=value"),
        ("train.lr", "override 'train.lr' is not of the form table.key=value"),
        ("train.lr=fast", "override 'train.lr=fast': train.lr = 'fast' (str) is not a finite number"),
        ("train.lr=nan", "train.lr = nan (float) is not a finite number"),
        ("train.lr=-1", "train.lr = -1 (int) is not a number above 0"),
        ("train.steps=1.5", "train.steps = 1.5 (float) is not a whole number"),
        ("train.steps=0", "train.steps = 0 (int) is not at least 1"),
        ("train.seed=true", "train.seed = True (bool) is not a whole number"),
        ("train.method=prefx", "(str) is not 'prompt' or 'prefix' or 'kv'\nDid you mean prefix?"),
        ("train.init=vocabulary", "is not text or vocab or labels"),
        ("train.init=text:", "train.init = 'text:'"),
        ("train.init=from:", "train.init = 'from:'"),
        ("task.metric=exactmatch", "Did you mean exact_match?"),
        ("task.chat=1", "task.chat = 1 (int) is not true or false"),
        ("task.labels=[1, 2]", "task.labels = [1, 2] (list) is not a list of texts"),
        ('task.labels=["a"]', "is not at least two labels"),
        ('task.labels=["Yes", "yes "]', "is not labels that differ by more than case and spaces"),
        ("task.name=../x", "task.name = '../x' (str) is not a name of the form"),
        ("task.metric=bleu", "task.labels is set, and task.metric = 'bleu' is for open answers"),
        ("task.max_input_tokens=0", "task.max_input_tokens = 0 (int) is not at least 1"),
        ("task.train=''", "task.train = ''"),
        ("train.lr=1\nsteps=2", "train.lr = '1\\nsteps=2' (str) is not a finite number"),
    ],
)
def test_bad_override_names_itself_both_values_and_the_nearest(file: Path, override: str, message: str) -> None:
    assert message in refused(file, override)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method =", "metod =", "triage.toml: unknown key train.metod\nDid you mean method"),
        ("[train]", "[trian]", "triage.toml: unknown table [trian]\nDid you mean train or task?"),
        ('name = "triage"', "", "triage.toml: task.name is missing\nWrite name in [task]."),
        ("chat = true", "chat = yes", "triage.toml: not TOML"),
        ("chat = true", 'chat = "true"', "triage.toml: task.chat = 'true' (str) is not true or false"),
        ("chat = true", 'system = "Be brief."', "triage.toml: task.system is for chat templates"),
        ("[task]", "train = 3\n[task]", "Cannot overwrite"),
        ("[task]", "name = 3\n[task]", "triage.toml: unknown table [name]"),
        (TASK, "[train]\nlr = 1\n", "triage.toml: no table [task]"),
        (TASK, "task = 3\n", "triage.toml: task = 3 is not a table"),
        ("[train]", "[later]", "triage.toml: unknown table [later]"),
    ],
)
def test_bad_file_names_file_key_and_the_nearest(file: Path, old: str, new: str, message: str) -> None:
    file.write_text(TASK.replace(old, new))
    assert message in refused(file)


def test_text_initialisation_needs_the_text(file: Path) -> None:
    assert "task.hard_text, which is empty" in refused(file, "task.hard_text=", "train.init=text")
    assert load_task(file, ["train.init=text"])[1].init == "text"


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    assert "cannot read" in refused(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'[task]\nname = "caf\xe9"\n')
    assert "not UTF-8" in refused(tmp_path / "latin.toml")


def test_byte_order_mark_is_fine(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + TASK.encode())
    assert load_task(file)[0].name == "triage"


def test_configs_made_in_code_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="is not 'muon' or 'adamw' or 'adafactor'"):
        TrainConfig(optimizer="sgd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"train\.batch_size = 0"):
        TrainConfig(batch_size=0)
    with pytest.raises(AttributeError):
        TaskConfig(name="t", train="x").name = "y"  # type: ignore[misc]


def test_config_imports_no_torch() -> None:
    code = "import sys, foreword.config, foreword.eval.tasks, foreword.eval.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
