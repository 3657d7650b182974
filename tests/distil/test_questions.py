"""Questions: read with and without answers; written by the model, the same for the same seed."""

import json

import pytest

from foreword.demo.make_notes import make_notes
from foreword.distil.context import Context
from foreword.distil.questions import INSTRUCTIONS, LEADS, count_by_type, read_questions, self_study
from foreword.distil.settings import SEED_TYPES
from foreword.engine.engine import Engine
from foreword.errors import DataError
from tests.bundled import bundled

CHUNK = Context("notes", make_notes(0, 6).text)


def test_every_seed_type_has_leads_and_an_instruction():
    assert set(LEADS) == set(INSTRUCTIONS) == set(SEED_TYPES)


@pytest.mark.parametrize("writer", ["turn", "instruction"])
def test_self_study_follows_the_seed(writer):
    def write(seed):
        return self_study(Engine(bundled()), [CHUNK], 10, chat=True, writer=writer, seed=seed, max_tokens=24)

    first = write(0)
    assert first == write(0)
    assert [question.input for question in first] != [question.input for question in write(1)]


def test_self_study_is_distinct_and_over_all_types_and_chunks():
    chunks = [CHUNK, Context("more", make_notes(1, 6).text)]
    found = self_study(Engine(bundled()), chunks, 30, chat=True)
    texts = [" ".join(question.input.lower().split()) for question in found]
    assert len(set(texts)) == len(texts)
    assert set(count_by_type(found)) == set(SEED_TYPES)
    assert {question.chunk for question in found} == {0, 1}


def test_the_model_asks_about_the_notes():
    """The bundled base has learned what is asked about notes: its questions name their projects."""
    notes = make_notes(0, 6)
    found = self_study(Engine(bundled()), [CHUNK], 20, chat=True, seed_types=("question",), temperature=0.5)
    projects = {fact.project for fact in notes.facts}
    about = [question for question in found if any(project in question.input for project in projects)]
    assert len(about) >= len(found) / 3


def test_plain_bases_write_questions_too():
    found = self_study(Engine(bundled()), [CHUNK], 4, chat=False, max_tokens=40)
    assert all(question.input.startswith("Question: ") and question.input.endswith("\nAnswer:") for question in found)


def test_reading_questions_with_and_without_answers(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        json.dumps({"input": "Alder city?", "target": "Oslo"}) + "\n" + json.dumps({"input": "Why?"}) + "\n"
    )
    known, open_one = read_questions(path)
    assert (known.target, known.references, open_one.target) == ("Oslo", ("Oslo",), None)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    turns += [{"role": "user", "content": "Elm?"}, {"role": "assistant", "content": "Lima"}]
    path.write_text(json.dumps({"messages": turns}))
    (talk,) = read_questions(path)
    assert talk.target == "Lima" and [role for role, _ in talk.turns] == ["user", "assistant", "user"]
    path.write_text(json.dumps({"input": "Alder?", "target": "Oslo"}) + "\n" + json.dumps({"inptu": "Elm?"}))
    with pytest.raises(DataError, match=r"q\.jsonl, row 2"):
        read_questions(path)
    with pytest.raises(DataError, match="cannot read the questions"):
        read_questions(tmp_path / "none.jsonl")
