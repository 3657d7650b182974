"""Notes of facts: seeded, every fact stated once, held-out wordings not among those taught."""

import json

from foreword.demo.make_notes import ATTRIBUTES, HELD_OUT, TAUGHT, make_notes, write_notes


def test_notes_follow_the_seed(tmp_path):
    write_notes(tmp_path / "a", 3)
    write_notes(tmp_path / "b", 3)
    for name in ("notes.txt", "questions.jsonl", "test.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert make_notes(3) == make_notes(3) != make_notes(4)


def test_every_fact_stands_in_the_notes_and_is_asked_for():
    for seed in range(20):
        notes = make_notes(seed)
        assert len(notes.facts) == 24 == len({(fact.project, fact.attribute) for fact in notes.facts})
        for fact in notes.facts:
            statements = [text for text in notes.text.split(".") if fact.project in text and fact.attribute in text]
            assert len(statements) == 1 and fact.value in statements[0]
        assert {fact.attribute for fact in notes.facts} == set(ATTRIBUTES)


def test_wordings_are_apart(tmp_path):
    assert not set(TAUGHT) & set(HELD_OUT)
    write_notes(tmp_path)
    taught, held = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("questions", "test")
    )
    assert (len(taught), len(held)) == (96, 48)
    assert not {row["input"] for row in taught} & {row["input"] for row in held}
    assert {row["target"] for row in taught} == {row["target"] for row in held}
