import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.config import TaskConfig
from foreword.errors import ConfigError, DataError
from foreword.eval.tasks import Row, Task, cut_text, read_rows, sample_rows
from tests.eval.fakes import CharTokenizer, make_task, write_rows

TOKENIZER = CharTokenizer()
GOOD = {"input": "hello", "target": "greeting"}


def test_rows_are_read_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = ['{"input": "a", "target": "b"}', "", ' {"input": "c\u2028d", "target": "e", "document": 7} ', "\t"]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    rows = read_rows(path)
    assert [(row.input, row.target, row.index, row.line) for row in rows] == [("a", "b", 0, 1), ("c\u2028d", "e", 1, 3)]
    assert rows[0].references == ("b",) and rows[0].messages is None


def test_conversations_become_turns_and_an_answer(tmp_path: Path) -> None:
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "yes?"), ("user", "bye"), ("assistant", "ciao")]
    many = [{"role": role, "content": content} for role, content in turns]
    single = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "yes?"}]
    rows = read_rows(write_rows(tmp_path / "x.jsonl", [{"messages": many}, {"messages": single}]))
    assert (rows[0].input, rows[0].target, rows[0].messages) == ("bye", "ciao", tuple(many[:-1]))
    assert (rows[1].input, rows[1].target, rows[1].messages) == ("hi", "yes?", None)


def message(role: str, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"target": "x"}, "input is missing"),
        ({"input": "x"}, "target is missing"),
        ({"inputs": "x", "target": "x"}, "input is missing\nDid you mean inputs?"),
        ({"input": 3, "target": "x"}, "input is a number"),
        ({"input": "x", "target": None}, "target is a null"),
        ({"input": "x", "target": ["y"]}, "target is a list"),
        ({"input": "x", "target": True}, "target is a boolean"),
        ({"input": "x", "target": " \n"}, "target is empty"),
        ({"input": "x", "target": "y", "references": []}, "references is an empty list"),
        ({"input": "x", "target": "y", "references": "y"}, "references is a text"),
        ({"input": "x", "target": "y", "references": [3]}, "references is a number"),
        ({"input": "\ud800", "target": "y"}, "input holds half of a surrogate pair"),
        (["x"], "a JSON list where an object is needed"),
        ({"messages": "hi"}, "messages is a text"),
        ({"messages": []}, "messages has the roles of nobody"),
        ({"messages": ["hi"]}, "messages[0] is a text"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [message("user", [{"type": "text"}])]}, "messages[0].content is a list"),
        ({"messages": [message("human"), message("assistant")]}, "messages[0].role is 'human'"),
        ({"messages": [message("user")]}, "messages has the roles user\n"),
        ({"messages": [message("assistant")]}, "messages has the roles assistant\n"),
        ({"messages": [message("user"), message("assistant", "")]}, "target is empty"),
        ({"messages": [message("user") | {"weight": 0}, message("assistant")]}, "messages[0].weight is not supported"),
        ({"messages": [message("user"), message("assistant")], "input": "x"}, "both messages and input"),
    ],
)
def test_malformed_row_is_named(tmp_path: Path, row: Any, what: str) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [GOOD, row])
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert f"{path}, row 2: {what}" in str(error.value) + "\n"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "holds no rows"),
        (b"\n \r\n\xef\xbb\xbf".strip(b"\xef\xbb\xbf"), "holds no rows"),
        (b'{"input": "x", "target"', "row 1: malformed JSON"),
        (b"{'input': 'x'}", "row 1: malformed JSON"),
        (b'{"input": "caf\xe9", "target": "x"}', "row 1: not UTF-8"),
        ('{"input": "x", "target": "y"}'.encode("utf-16"), "row 1: not UTF-8"),
        (b"[" * 100_000, "row 1: malformed JSON"),
        (b"9" * 10_000, "row 1: malformed JSON"),
    ],
)
def test_malformed_file_is_named(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=what) as error:
        read_rows(path)
    assert str(path) in error.value.message


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match=f"cannot read {path}"):
            read_rows(path)


@given(st.text(), st.text().filter(str.strip), st.dictionaries(st.text(), st.integers()))
@settings(max_examples=50, deadline=None)
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str, target: str, more: Any) -> None:
    for name in ("input", "target", "references", "messages"):
        more.pop(name, None)
    path = write_rows(tmp_path_factory.mktemp("any") / "x.jsonl", [{"input": text, "target": target, **more}])
    assert read_rows(path) == [Row(text, target, (target,), None, 0, 1)]


def test_labels_are_found_where_they_recur(tmp_path: Path) -> None:
    rows = [{"input": str(n), "target": "ba"[n % 2]} for n in range(10)]
    assert make_task(tmp_path, rows).labels() == ("a", "b")
    assert make_task(tmp_path, rows, metric="f1").labels() == ("a", "b")
    assert make_task(tmp_path, rows, metric="token_f1").labels() == ()
    assert make_task(tmp_path, rows[:9]).labels() == ()
    assert make_task(tmp_path, rows[:1] * 10).labels() == ()
    many = [{"input": "x", "target": str(n % 129)} for n in range(129 * 5)]
    assert make_task(tmp_path, many).labels() == ()
    assert len(make_task(tmp_path, many[:640], train=[row for row in many if row["target"] != "7"]).labels()) == 128


def test_a_target_outside_the_configured_labels_is_refused(tmp_path: Path) -> None:
    task = make_task(tmp_path, [{"input": "x", "target": "refnd"}], labels=("refund", "billing"))
    assert task.labels() == ("refund", "billing")
    with pytest.raises(DataError) as error:
        task.rows("test")
    assert "row 1: target 'refnd' is not one of the 2 labels\nDid you mean refund?" in str(error.value)


def test_a_conversation_needs_a_chat_task(tmp_path: Path) -> None:
    rows = [{"messages": [message("user"), message("assistant"), message("user"), message("assistant")]}]
    with pytest.raises(DataError, match="is no chat"):
        make_task(tmp_path, rows).rows("test")
    assert make_task(tmp_path, rows, chat=True).rows("test")[0].messages is not None


def test_a_task_without_the_split_and_with_a_bad_template(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no dev data"):
        make_task(tmp_path, [GOOD]).rows("dev")
    with pytest.raises(ConfigError, match=r"holds \{input\} 0 times"):
        Task(TaskConfig(name="t", train="x", template="{soft:20}"))


def test_hash_is_of_the_rows_not_of_the_file(tmp_path: Path) -> None:
    first = make_task(tmp_path, [GOOD]).data_sha256("test")
    (tmp_path / "test.jsonl").write_bytes(b'\r\n{"target": "greeting", "more": 1, "input": "hello"}\r\n')
    task = Task.from_toml(_toml(tmp_path), test=str(tmp_path / "test.jsonl"))
    assert task.data_sha256("test") == first
    assert make_task(tmp_path, [{**GOOD, "target": "other"}]).data_sha256("test") != first
    with pytest.raises(ConfigError, match=r"unknown key task\.tset"):
        Task.from_toml(_toml(tmp_path), tset="x")


def _toml(folder: Path) -> Path:
    path = folder / "t.toml"
    path.write_text('[task]\nname = "t"\ntrain = "train.jsonl"\n')
    return path


def test_samples_are_seeded_and_whole_files_keep_their_order(tmp_path: Path) -> None:
    rows = read_rows(write_rows(tmp_path / "x.jsonl", [{"input": str(n), "target": "x"} for n in range(50)]))
    assert sample_rows(rows, None, 0) == sample_rows(rows, 50, 0) == rows
    drawn = sample_rows(rows, 10, 3)
    assert drawn == sample_rows(rows, 10, 3) != sample_rows(rows, 10, 4)
    assert drawn == sample_rows(rows, 20, 3)[:10] and len({row.index for row in drawn}) == 10


def test_limits_leave_room_for_block_template_and_answer(tmp_path: Path) -> None:
    plain = make_task(tmp_path, [GOOD], template="{soft:20}Say: {input}!", max_new_tokens=8)
    assert plain.input_limit(TOKENIZER, None) is None
    # 20 vectors and "Say: " in the block, "x!" and 2 to spare behind it, 8 for the answer
    assert plain.input_limit(TOKENIZER, 100) == 100 - 25 - 4 - 8
    assert make_task(tmp_path, [GOOD], max_input_tokens=5).input_limit(TOKENIZER, 100) == 5
    with pytest.raises(
        ConfigError, match=r"block \(25\), template \(4\) and answer \(8\) leave no token of the base's 30"
    ):
        plain.input_limit(TOKENIZER, 30)


def test_inputs_over_the_limit_are_refused_or_cut(tmp_path: Path) -> None:
    row = Row("0123456789", "x", ("x",), None, 4, 7)
    task = make_task(tmp_path, [GOOD])
    assert task.fit(row, TOKENIZER, None) == task.fit(row, TOKENIZER, 10) == row
    with pytest.raises(DataError) as error:
        task.fit(row, TOKENIZER, 9)
    assert "row 7: the input has 10 tokens, the limit is 9\nShorten it, or set truncate" in str(error.value)
    assert make_task(tmp_path, [GOOD], truncate="left").fit(row, TOKENIZER, 4).input == "6789"
    assert make_task(tmp_path, [GOOD], truncate="right").fit(row, TOKENIZER, 4).input == "0123"


def test_of_a_conversation_the_last_user_message_is_cut(tmp_path: Path) -> None:
    turns = (message("user", "abc"), message("assistant", "de"), message("user", "0123"))
    row = Row("0123", "x", ("x",), turns, 0, 1)
    task = make_task(tmp_path, [GOOD], truncate="right", chat=True)
    cut = task.fit(row, TOKENIZER, 7)
    assert cut.input == "01" and cut.messages == (*turns[:2], message("user", "01"))
    with pytest.raises(DataError, match="the input has 9 tokens, the limit is 5"):
        task.fit(row, TOKENIZER, 5)


@given(st.text(min_size=1, max_size=30), st.integers(1, 30), st.sampled_from(["left", "right"]))
@settings(deadline=None)
def test_cut_text_is_an_end_of_the_text(text: str, num_tokens: int, side: str) -> None:
    cut = cut_text(TOKENIZER, text, num_tokens, side)
    assert len(cut) == min(num_tokens, len(text))
    assert text.endswith(cut) if side == "left" else text.startswith(cut)


@pytest.mark.skipif(not Path("../shared/tasks").is_dir(), reason="../shared/tasks is absent")
def test_real_tasks_are_read_and_their_labels_found() -> None:
    found = {}
    for folder in sorted(Path("../shared/tasks").iterdir()):
        config = TaskConfig(name=folder.name, train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"))
        task = Task(config)
        found[folder.name] = len(task.labels())
        first = json.loads((folder / "test.jsonl").read_text(encoding="utf-8").partition("\n")[0])
        assert task.rows("test")[0].references == tuple(first.get("references", [first["target"]]))
    closed = {"ag_news": 4, "banking77": 77, "bitext_support_triage": 27, "cuad_clause_type": 37}
    closed |= {"rte": 2, "sst2": 2, "trec": 6}
    assert {name: num for name, num in found.items() if num} == closed
