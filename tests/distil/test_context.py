"""Contexts: read, laid before questions so that tokens align, cut into chunks, held against the window."""

import dataclasses
import json

import pytest

from foreword.core.template import TaskTemplate
from foreword.distil.context import Context, check_aligned, context_ids, cut, read_context
from foreword.distil.ground import lay_ground
from foreword.distil.lessons import Lesson, check_lessons
from foreword.distil.questions import Question
from foreword.errors import ConfigError, DataError
from tests.bundled import bundled
from tests.distil.notes import job, write_small

CHAT = TaskTemplate("{soft:4}{input}", chat=True)
PLAIN = TaskTemplate("{soft:4}{input}")
TEXT = "Project Alder has the city Oslo. Elm: manager Greta Reed."


@pytest.mark.parametrize(
    ("context", "template"),
    [
        (Context("a", TEXT), CHAT),
        (Context("a", TEXT, place="front"), CHAT),
        (Context("a", turns=(("user", "Alder city?"), ("assistant", "Oslo"))), CHAT),
        (Context("a", TEXT), PLAIN),
    ],
    ids=["system", "front", "turns", "plain"],
)
def test_the_teacher_reads_left_context_and_the_students_row(context, template):
    base = bundled()
    inner = context_ids(base, context, template)
    question = Question("Which city does project Alder have?")
    taught = context.lay(base.tokenizer, question.input, None, template.chat)
    left = template.block(base.tokenizer).left_ids
    assert taught == [*left, *inner, *template.render(base.tokenizer, question.input).ids]
    shown = base.tokenizer.decode(inner)
    assert ("Oslo" in shown) and not shown.startswith(base.tokenizer.bos_token)
    check_lessons(base, template, [Lesson(question, "Oslo", (5, 2))], [context], [(*left, *inner)])


def test_tokens_that_do_not_align_are_refused_with_the_first_differing_position():
    base = bundled()
    with pytest.raises(DataError) as caught:
        check_aligned(base, [1, 50, 60, 70, 80], [1, 50, 60, 71, 80], 2, "question 3 ('Elm')")
    shown = [repr(base.tokenizer.decode([token])) for token in (71, 70)]
    assert f"question 3 ('Elm'): token 1 of question and answer is 71 {shown[0]} for the teacher" in str(caught.value)
    assert f"and 70 {shown[1]} for the student" in str(caught.value)
    with pytest.raises(DataError, match="is the end for the teacher"):
        check_aligned(base, [1, 50, 60], [1, 50], 1)


def test_a_question_that_melts_with_the_context_is_refused(monkeypatch):
    """A base whose tokens run across the seam: the context's last and the question's first characters are one token."""
    base = bundled()
    context = Context("a", "The code is 4")
    inner = context_ids(base, context, PLAIN)
    monkeypatch.setattr(Context, "lay", lambda self, tokenizer, text, turns, chat: [
        1, *tokenizer(f"{self.text}{text}", add_special_tokens=False).input_ids
    ])  # fmt: skip
    with pytest.raises(DataError, match=r"question 1 \('.*'\): token -?\d+ of question and answer is"):
        lesson = Lesson(Question(" and the rest is silence"), "x", (5, 2))
        check_lessons(base, PLAIN, [lesson], [context], [(1, *inner)])


def test_chunks_are_the_text_and_fit():
    base = bundled()
    text = "\n\n".join(f"Rule {part}. " + "Nobody enters the room without a key. " * 6 for part in range(9)).strip()
    chunks = cut(base, Context("rules", text), 120)
    bodies = []
    for index, chunk in enumerate(chunks, start=1):
        line, _, body = chunk.text.partition("\n")
        assert line == f"Part {index} of {len(chunks)} of rules."
        assert len(base.tokenizer(chunk.text).input_ids) <= 120
        bodies.append(body)
    assert len(chunks) > 3
    assert " ".join(" ".join(bodies).split()) == " ".join(text.split())
    assert all(body.startswith("Rule") for body in bodies), "chunks end at paragraphs where they can"


def test_a_text_that_fits_is_one_chunk_itself():
    context = Context("a", TEXT)
    assert cut(bundled(), context, 64) == [context]


def test_turns_are_not_cut():
    with pytest.raises(ConfigError, match="turns of a chat, which are not cut"):
        cut(bundled(), Context("a", turns=(("user", "x"),)), 100)


def test_a_context_over_the_window_is_refused_with_both_numbers(tmp_path):
    base, notes = bundled(), write_small(tmp_path)
    notes.write_text("Nobody enters the room without a key. " * 600)
    limit, config = base.spec.max_positions, job(notes).distil
    count = len(base.tokenizer(notes.read_text().strip(), verbose=False).input_ids)
    with pytest.raises(ConfigError) as caught:
        lay_ground(base, config)
    assert f"takes {count} tokens" in caught.value.message
    assert f"the base's window is {limit}" in caught.value.message
    assert "--chunk-tokens" in caught.value.hint
    chunked = lay_ground(base, dataclasses.replace(config, chunk_tokens=512, vectors=16))
    assert chunked.is_chunked and len(chunked.whole) == count
    with pytest.raises(ConfigError, match=f"window is {limit}"):
        lay_ground(base, dataclasses.replace(config, chunk_tokens=512, ratio=2.0))


def test_vectors_that_compress_nothing_are_refused(tmp_path):
    notes = write_small(tmp_path)
    ground = lay_ground(bundled(), job(notes, ratio=4.0).distil)
    assert ground.num_vectors == round(len(ground.whole) / 4)
    with pytest.raises(ConfigError, match=f"{len(ground.whole)} vectors for context 'notes' of {len(ground.whole)}"):
        lay_ground(bundled(), job(notes, vectors=len(ground.whole)).distil)


def test_reading_contexts(tmp_path):
    turns = [{"role": "user", "content": "Alder city?"}, {"role": "assistant", "content": "Oslo"}]
    (tmp_path / "shots.json").write_text(json.dumps({"messages": turns}))
    assert read_context(tmp_path / "shots.json").turns == (("user", "Alder city?"), ("assistant", "Oslo"))
    (tmp_path / "bad.json").write_text('{"message": 1}')
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, words in (
        ("bad.json", "KeyError"),
        ("empty.txt", "empty"),
        ("latin.txt", "not UTF-8"),
        ("none.txt", "cannot"),
    ):
        with pytest.raises(DataError, match=words):
            read_context(tmp_path / name)
