"""The demo's rows: reproducible, honestly split, balanced, and as their task files say."""

import json
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from foreword.demo import make_tasks

FOLDER = Path(make_tasks.__file__).parent / "tasks"
TASKS = ["triage", "clause", "handbook", "order_slots"]
WORD_RANGE = {"triage": (8, 40), "clause": (15, 45), "handbook": (15, 60), "order_slots": (3, 40)}


def rows(task: str, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / task / f"{split}.jsonl").read_text("utf-8").splitlines()]


def settings(task: str) -> dict[str, object]:
    return tomllib.loads((FOLDER / task / f"{task}.toml").read_text("utf-8"))["task"]


def word_runs(text: str, num_words: int = 4) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z]+|\d+", text.lower())
    return {tuple(words[at : at + num_words]) for at in range(len(words) - num_words + 1)}


def test_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    make_tasks.write_tasks(tmp_path)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.glob("*/*")}
    committed = {path.relative_to(FOLDER): path.read_bytes() for path in FOLDER.glob("*/*")}
    assert sorted(written) == sorted(committed)
    assert [str(name) for name in written if written[name] != committed[name]] == []


def test_all_rows_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.jsonl")) < 600_000


@pytest.mark.parametrize("task", TASKS)
def test_no_input_occurs_twice(task: str) -> None:
    inputs = [row["input"] for split in make_tasks.ROWS for row in rows(task, split)]
    assert len(inputs) == sum(make_tasks.ROWS.values())
    assert len({text.lower() for text in inputs}) == len(inputs)


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("task", TASKS)
def test_half_of_the_judged_rows_are_worded_as_no_train_row_is(task: str, split: str) -> None:
    seen = set().union(*(word_runs(row["input"]) for row in rows(task, "train")))
    runs = [word_runs(row["input"]) for row in rows(task, split)]
    new = [row_runs for row_runs in runs if len(row_runs - seen) > len(row_runs) / 2]
    assert len(new) >= len(runs) / 2


def pools(value: object) -> list[dict[str, list[str]]]:
    """Every pool (train, dev and test share) inside `value`."""
    if isinstance(value, dict) and list(value) == list(make_tasks.ROWS) and isinstance(value["dev"], list):
        return [value]
    parts = value.values() if isinstance(value, dict) else ()
    return [pool for part in parts for pool in pools(part)]


def test_shares_of_every_pool_are_disjoint() -> None:
    found = pools(make_tasks.PHRASES)
    assert len(found) > 80
    for pool in found:
        phrases = [phrase for share in pool.values() for phrase in share]
        closed = pool["train"] == pool["dev"] == pool["test"]  # weekdays, months, letters, ranks
        assert closed or len(set(phrases)) == len(phrases), pool
        assert all(pool.values()), pool


@pytest.mark.parametrize("task", ["triage", "clause"])
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_labels_are_covered_and_balanced(task: str, split: str) -> None:
    counts = Counter(row["target"] for row in rows(task, split))
    assert sorted(counts) == sorted(settings(task)["labels"])
    assert max(counts.values()) <= 1.25 * min(counts.values())


@pytest.mark.parametrize("task", ["triage", "clause"])
def test_no_row_is_settled_by_one_key_word(task: str) -> None:
    """Each label has a word of its own in its name; a reader who goes by that word alone is often wrong or silent."""
    labels = settings(task)["labels"]
    named = [[label for label in labels if label[:6].lower() in row["input"].lower()] for row in rows(task, "train")]
    right = sum(found == [row["target"]] for found, row in zip(named, rows(task, "train"), strict=True))
    assert right < 0.6 * len(named)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_handbook_answers_stand_once_in_their_policy(split: str) -> None:
    for row in rows("handbook", split):
        policy, question = row["input"].split("\nQuestion: ")
        assert policy.startswith("Policy: ") and question.endswith("?")
        assert len(re.findall(rf"\b{re.escape(row['target'])}\b", policy)) == 1, row


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_order_slots_are_copied_and_ordered(split: str) -> None:
    kinds = Counter[tuple[str, ...]]()
    for row in rows("order_slots", split):
        slots = [] if row["target"] == "none" else [slot.split(": ") for slot in row["target"].split("; ")]
        names = tuple(name for name, _ in slots)
        assert names in [tuple(kind.split()) for kind in make_tasks.ORDER_KINDS]
        assert all(value in row["input"] for _, value in slots), row
        kinds[names] += 1
    assert len(kinds) == len(make_tasks.ORDER_KINDS) and max(kinds.values()) <= 1.25 * min(kinds.values())


@pytest.mark.parametrize("task", TASKS)
def test_task_file_fits_its_rows(task: str) -> None:
    values = settings(task)
    assert values["name"] == task
    assert [values[split] for split in make_tasks.ROWS] == [f"{split}.jsonl" for split in make_tasks.ROWS]
    low, high = WORD_RANGE[task]
    for row in (row for split in make_tasks.ROWS for row in rows(task, split)):
        assert list(row) == ["input", "target"] and all(value == value.strip() and value for value in row.values())
        assert low <= len(row["input"].split()) <= high, row
        assert "  " not in row["input"] and not set("[]{}|") & set(row["input"]), row
