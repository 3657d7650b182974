"""Rows from JSONL, Parquet and saved data sets: the same records give the same rows, and faults are named."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from foreword.config import TaskConfig
from foreword.errors import ConfigError, DataError
from foreword.eval.read import is_there, read_rows
from foreword.eval.rows import rows_sha256
from foreword.eval.tasks import Task
from tests.eval.fakes import write_rows

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")

TURNS = [("system", "be brief"), ("user", "hi"), ("assistant", "yes?"), ("user", "bye"), ("assistant", "ciao")]
PAIRS = [
    {"input": "hello\r\nthere", "target": "greeting", "references": ["greeting", "hi"]},
    {"input": "", "target": " ok "},
    {"input": "né \u2028 \U0001f600", "target": "text"},
]
TALKS = [
    {"messages": [{"role": role, "content": content} for role, content in TURNS]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
]
WEIGHED = [{"messages": [{**turn, **({"weight": 0} if n == 2 else {})} for n, turn in enumerate(TALKS[0]["messages"])]}]


def write_parquet(path: Path, records: list[dict[str, Any]], **options: Any) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(uniform(records)), path, **options)
    return path


def uniform(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every record with every key: Arrow takes the columns of the first."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [{key: record.get(key) for key in keys} for record in records]


def save(folder: Path, records: list[dict[str, Any]], **splits: list[dict[str, Any]]) -> Path:
    made = {name: datasets.Dataset.from_list(uniform(part)) for name, part in ({"": records} | splits).items()}
    saved = made[""] if not splits else datasets.DatasetDict({name: made[name] for name in splits})
    saved.save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    "records", [PAIRS, TALKS, WEIGHED, [*PAIRS, *TALKS]], ids=["pairs", "talks", "weights", "both"]
)
def test_the_container_changes_nothing(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    wanted = read_rows(write_rows(tmp_path / "x.jsonl", records))
    table = write_parquet(tmp_path / "x.parquet", records, row_group_size=1)
    places = [table, save(tmp_path / "set", records), f"{save(tmp_path / 'dict', records, train=records)}#train"]
    for place in places:
        found = read_rows(place)
        assert found == wanted
        assert rows_sha256(found) == rows_sha256(wanted)


def test_rows_give_back_the_records_they_are_made_of(tmp_path: Path) -> None:
    for records in (PAIRS, TALKS, WEIGHED):
        rows = read_rows(write_rows(tmp_path / "x.jsonl", records))
        assert read_rows(write_rows(tmp_path / "y.jsonl", [row.record() for row in rows])) == rows


def test_the_hash_of_rows_without_weights_is_the_old_one(tmp_path: Path) -> None:
    row = read_rows(write_rows(tmp_path / "x.jsonl", [PAIRS[1]]))[0]
    assert row.to_json() == {"input": "", "target": " ok ", "references": [" ok "], "messages": None}


def test_shards_are_one_data_set_and_rows_know_their_file(tmp_path: Path) -> None:
    for number in range(3):
        write_parquet(tmp_path / f"part-{number}.parquet", [{"input": f"{number}{n}", "target": "x"} for n in range(2)])
    for place in (tmp_path, tmp_path / "part-*.parquet"):
        rows = read_rows(place)
        assert [row.input for row in rows] == ["00", "01", "10", "11", "20", "21"]
        assert [row.index for row in rows] == list(range(6))
        assert rows[3].place == f"{tmp_path}/part-1.parquet, row 2"
    assert read_rows(tmp_path / "part-0.parquet")[1].place == "row 2"


def test_patterns_take_jsonl_too(tmp_path: Path) -> None:
    for number in range(2):
        write_rows(tmp_path / f"{number}.jsonl", [{"input": str(number), "target": "x"}])
    assert [row.input for row in read_rows(tmp_path / "*.jsonl")] == ["0", "1"]


@pytest.mark.parametrize("inside", [".", "data"])
def test_a_copy_of_a_hub_repository_has_splits_by_name(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(exist_ok=True)
    for name, count in (("train", 2), ("test", 1)):
        for shard in range(count):
            file = tmp_path / inside / f"{name}-{shard:05}-of-{count:05}.parquet"
            write_parquet(file, [{"input": f"{name} {shard}", "target": "x"}])
    assert [row.input for row in read_rows(f"{tmp_path}#train")] == ["train 0", "train 1"]
    assert [row.input for row in read_rows(f"{tmp_path}#test")] == ["test 0"]
    with pytest.raises(DataError, match=r"has the splits test, train, and none is named\nWrite .*#test\."):
        read_rows(tmp_path)
    with pytest.raises(DataError, match=r"has no split 'trian'; it has test, train\nDid you mean train"):
        read_rows(f"{tmp_path}#trian")


def test_class_labels_are_read_by_name(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    made.save_to_disk(str(tmp_path / "set"))
    made.to_parquet(str(tmp_path / "x.parquet"))
    for place in ("set", "x.parquet"):
        rows = read_rows(tmp_path / place, {"input": "text", "target": "label"})
        assert [(row.input, row.target) for row in rows] == [("a", "pos"), ("b", "neg")]


def test_columns_name_fields_in_every_container(tmp_path: Path) -> None:
    records = [{"question": "q", "answer": "a", "also": ["a", "b"], "input": 3, "messages": "none"}]
    columns = {"input": "question", "target": "answer", "references": "also"}
    places = (write_rows(tmp_path / "x.jsonl", records), write_parquet(tmp_path / "x.parquet", records))
    for place in (*places, save(tmp_path / "set", records)):
        (row,) = Task(TaskConfig(name="t", train=str(place), columns=columns)).rows("train")
        assert (row.input, row.target, row.references) == ("q", "a", ("a", "b"))
    talks = [{"conversation": TALKS[0]["messages"], "input": "x", "target": "y"}]
    for place in (write_rows(tmp_path / "y.jsonl", talks), write_parquet(tmp_path / "y.parquet", talks)):
        assert read_rows(place, {"messages": "conversation"})[0].target == "ciao"


@pytest.mark.parametrize(
    ("records", "columns", "what"),
    [
        ([{"inputs": "x", "target": "y"}], {}, "column input is missing; it has inputs, target\nDid you mean inputs?"),
        (
            [{"question": "x", "answer": "y"}],
            {"input": "question"},
            "column target is missing; it has question, answer",
        ),
        ([{"input": "x", "target": "y"}], {"input": "text"}, "column text is missing; it has input, target"),
        ([{"input": "x", "target": "y"}], {"messages": "talk"}, "column talk is missing; it has input, target"),
        ([PAIRS[1], {"input": "x", "target": None}], {}, "row 2: target is a null"),
        ([PAIRS[1], {"input": "x", "target": " "}], {}, "row 2: target is empty"),
        ([{"input": "x", "target": 3}], {}, "row 1: target is a number"),
        ([{"input": b"x", "target": "y"}], {}, "row 1: input is a bytes"),
        ([{"messages": [{"role": "human", "content": "x"}]}], {}, "row 1: messages[0].role is 'human'"),
        ([{"messages": TALKS[1]["messages"], "input": "x"}], {}, "row 1: both messages and input"),
        ([{"input": None, "target": "y", "messages": None}], {}, "row 1: input is missing"),
    ],
)
def test_faults_are_named_as_in_jsonl(tmp_path: Path, records: Any, columns: dict[str, str], what: str) -> None:
    for place in (write_parquet(tmp_path / "bad.parquet", records), save(tmp_path / "set", records)):
        with pytest.raises(DataError) as error:
            read_rows(place, columns)
        assert what in str(error.value) and str(place) in error.value.message


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "x.parquet", PAIRS * 50).read_bytes()
    for name, data in {"empty": b"", "cut": whole[:-20], "text": b'{"input": 1}\n', "hole": _spoiled(whole)}.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"cannot read {path}: .+\n.*write it again"):
            read_rows(path)
    saved = save(tmp_path / "set", PAIRS)
    (shard,) = saved.glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match=f"cannot read {shard}: "):
        read_rows(saved)
    shard.unlink()
    with pytest.raises(DataError, match=f"cannot read {shard}: .*No such file"):
        read_rows(saved)
    (saved / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*state\.json"):
        read_rows(saved)


def _spoiled(data: bytes) -> bytes:
    return data[:4] + b"\xff" * 200 + data[204:]


def test_places_that_hold_nothing_are_named(tmp_path: Path) -> None:
    saved = save(tmp_path / "set", PAIRS)
    splits = save(tmp_path / "dict", PAIRS, train=PAIRS, validation=PAIRS)
    file = write_rows(tmp_path / "x.jsonl", PAIRS)
    for place, what in {
        f"{saved}#train": "holds one data set and no splits, asked for is 'train'",
        f"{splits}": "has the splits train, validation, and none is named",
        f"{splits}#dev": "has no split 'dev'; it has train, validation",
        f"{file}#train": "is one file",
        f"{tmp_path}/*.parquet": "no file fits the pattern",
        f"{tmp_path}/none.parquet": "No such file or directory",
        f"{tmp_path}": "the folder holds no saved data set and no Parquet",
    }.items():
        assert not is_there(place)
        with pytest.raises(DataError, match=what):
            read_rows(place)
    assert is_there(saved) and is_there(f"{splits}#train") and is_there(file)
    write_parquet(tmp_path / "none.parquet", PAIRS[:1])
    parquet.write_table(parquet.read_table(tmp_path / "none.parquet").slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(tmp_path / "none.parquet")


def test_an_order_apart_from_the_rows_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path / "set", PAIRS)
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match="was saved by an old datasets"):
        read_rows(saved)
    shuffled = datasets.Dataset.from_list(uniform(PAIRS)).select([2, 0, 1])
    shuffled.save_to_disk(str(tmp_path / "shuffled"))
    assert [row.target for row in read_rows(tmp_path / "shuffled")] == ["text", "greeting", " ok "]


def test_pyarrow_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "x.parquet", PAIRS)
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs pyarrow, which is not installed\npip install 'foreword\[data\]'"):
        read_rows(path)
    assert read_rows(write_rows(tmp_path / "x.jsonl", PAIRS))
