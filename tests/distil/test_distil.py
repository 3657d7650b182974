"""`distil` whole: contract 5, resume, an ordinary artefact, rendering as served, numbers that agree."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from foreword.core.artefact import load_artefact
from foreword.core.compile import compile
from foreword.core.conformance import replay
from foreword.distil import run as module
from foreword.distil import teacher
from foreword.distil.ground import Desk
from foreword.distil.prepare import prepare
from foreword.distil.report import report
from foreword.distil.run import distil
from foreword.engine.engine import Engine
from foreword.engine.render import prepare as render_request
from foreword.engine.request import Request
from foreword.errors import ConfigError, DataError
from foreword.report import render
from foreword.train.loop import TrainingInterrupted, fit
from foreword.train.run import Run
from foreword.train.state import RunState
from tests.bundled import bundled, write_task
from tests.distil.notes import job, write_small


def desk(out, cache=None):
    out.mkdir(parents=True, exist_ok=True)
    return Desk(bundled(), Engine(bundled()), out, cache, lambda line: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distil")
    notes = write_small(folder)
    (found,) = distil(bundled(), [job(notes)], out=folder / "out", cache=folder / "cache")
    return folder, found


def test_joint_equals_alone(tmp_path):
    """Contract 5: a distillation beside another and beside an ordinary task gets the vectors it gets alone."""
    base, notes = bundled(), write_small(tmp_path / "a")
    other = write_small(tmp_path / "b", seed=1)
    few = {"steps": 3, "eval_every": 3}
    first = prepare(desk(tmp_path / "first"), job(notes, few, test=None)).run
    given = {"name": "other", "objective": "likelihood", "learn": "all", "test": None, "init": "first"}
    second = prepare(desk(tmp_path / "second"), job(other, few, **given)).run
    ordinary = Run.from_toml(
        write_task(tmp_path), name="ordinary", method="prompt", steps=3, batch_size=4, warmup_steps=2
    )
    runs = [first, ordinary, second]
    joint = fit(base, runs, out=tmp_path / "joint")
    for run, together in zip(runs, joint, strict=True):
        (alone,) = fit(base, [run], out=tmp_path / f"alone-{run.name}")
        assert together.history[0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-4)
        start = RunState(base, run).snapshot()
        ours, theirs = load_artefact(together.artefact).tensors, load_artefact(alone.artefact).tensors
        for name, tensor in ours.items():
            moved = (tensor - start[name]).norm()
            assert (tensor - theirs[name]).norm() <= 2e-3 * moved, (run.name, name)
            assert moved > 0


def test_the_first_vector_stays_by_default(made):
    _, found = made
    start = found.prepared.run.start.tensors()
    for name, tensor in found.artefact.tensors.items():
        assert torch.allclose(tensor[:, 0], start[name][:, 0], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(tensor[:, 1:], start[name][:, 1:])


def test_the_student_is_rendered_as_it_is_served(made):
    """What trained is what a server sends behind the artefact, for every lesson."""
    _, found = made
    base, run = bundled(), found.prepared.run
    prefix = compile(base, load_artefact(found.artefact.path))
    train, _ = run.material.examples(base, run.template)
    assert len(train) == len(found.prepared.train) == 24
    for example, lesson in zip(train, found.prepared.train, strict=True):
        request = Request(messages=[{"role": "user", "content": lesson.question.input}])
        served = render_request(request, base, prefix).ids
        assert example.ids == [*served, *lesson.answer_ids]
        teacher_row = found.prepared.ground.context.lay(base.tokenizer, lesson.question.input, None, True)
        assert teacher_row == [*found.prepared.ground.blocks[0], *served]


def test_it_is_an_ordinary_artefact(made):
    _, found = made
    base, artefact = bundled(), load_artefact(found.artefact.path)
    assert replay(base, compile(base, artefact), artefact.header.conformance).ok
    assert artefact.header.labels == ()
    training = artefact.header.training["distil"]
    assert training["objective"] == "kl" and training["context_sha256"] == found.prepared.ground.context.sha256()
    assert training["ratio"] == pytest.approx(training["context_tokens"] / artefact.header.num_vectors, abs=1e-3)
    assert "same base" in training["teacher"]


def test_numbers_agree(made):
    folder, found = made
    data = json.loads((folder / "out" / "notes.distil.json").read_text())
    assert data == json.loads(json.dumps(found.to_json()))
    by_name = {standing["name"]: standing for standing in data["standings"]}
    assert list(by_name)[:3] == ["student", "full", "none"]
    assert by_name["full"]["divergence"] == pytest.approx(0, abs=1e-5)
    assert by_name["none"]["gap_closed"] == 0
    for standing in by_name.values():
        expected = 1 - standing["divergence"] / by_name["none"]["divergence"]
        assert standing["gap_closed"] == pytest.approx(expected)
    assert data["gap_closed"] == by_name["student"]["gap_closed"]
    assert data["retained"] == pytest.approx(by_name["student"]["score"] / by_name["full"]["score"])
    for name in ("truncated", "summary", "untrained", "student"):
        assert by_name[name]["num_tokens"] <= data["num_vectors"]
    paired = by_name["full"]["student_against_it"]
    assert paired["difference"] == pytest.approx(by_name["student"]["score"] - by_name["full"]["score"])
    header = load_artefact(found.artefact.path).header
    assert header.evaluation["score"] == by_name["student"]["score"]
    assert data["bytes"]["kv_of_vectors"] == data["bytes"]["vectors"]
    elsewhere = {damage["name"]: damage["divergence"] for damage in data["elsewhere"]}
    assert elsewhere["none"] == pytest.approx(0, abs=1e-5) and elsewhere["student"] > 0


def test_the_report_names_every_baseline(made):
    _, found = made
    text = render(report([found]), "text")
    for words in ("the context itself", "no context", "the text's beginning", "own summary", "KL gap closed"):
        assert words in text
    assert f"{found.judged['student'].gap_closed:.3f}" in text


def test_a_killed_run_goes_on_to_the_same_vectors(made, tmp_path, monkeypatch):
    """Killed in training: questions, answers and the teacher's numbers are not computed again."""
    folder, found = made
    notes, base = folder / "notes.txt", bundled()

    def kill(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        distil(base, [job(notes)], out=tmp_path / "out", cache=tmp_path / "cache", on_progress=kill)

    def never(*arguments, **options):
        raise AssertionError("this was computed before")

    monkeypatch.setattr(teacher, "_compute", never)
    monkeypatch.setattr("foreword.distil.prepare.teach", never)
    (resumed,) = distil(base, [job(notes)], out=tmp_path / "out", cache=tmp_path / "cache", resume=True)
    for name, tensor in resumed.artefact.tensors.items():
        assert torch.equal(tensor, found.artefact.tensors[name])


def test_killed_while_judging(made, tmp_path, monkeypatch):
    folder, found = made
    notes, base = folder / "notes.txt", bundled()

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "judge_student", die)
        with pytest.raises(KeyboardInterrupt):
            distil(base, [job(notes)], out=tmp_path, cache=folder / "cache")
    with pytest.raises(ConfigError, match="holds finished results"):
        distil(base, [job(notes)], out=tmp_path, cache=folder / "cache")
    monkeypatch.setattr(module, "fit", die)
    (resumed,) = distil(base, [job(notes)], out=tmp_path, cache=folder / "cache", resume=True)
    assert resumed.judged["student"].report.score == found.judged["student"].report.score
    with pytest.raises(ConfigError, match="trained on other questions, teacher or number of vectors"):
        distil(base, [job(notes, vectors=9)], out=tmp_path, resume=True)


def test_without_questions_the_model_writes_them_and_teachers_answers_count(tmp_path):
    notes = write_small(tmp_path)
    given = {"questions": None, "test": None, "self_study": 6, "seed_types": ("question", "creative"), "vectors": 8}
    (found,) = distil(bundled(), [job(notes, {"method": "prompt", "steps": 2}, **given)], out=tmp_path / "out")
    data = found.to_json()
    assert set(data["questions"]["by_type"]) <= {"question", "creative"}
    assert data["questions"]["right_is"] == "teacher"
    assert data["standings"][1]["name"] == "full" and data["standings"][1]["score"] == 1.0
    assert data["questions"]["held_out"] == "learned"
    assert "these were learned" in render(report([found]), "text")


def test_chunks_each_have_their_own_teacher(tmp_path):
    """Questions find the chunk that answers them, and full context is that chunk."""
    notes = write_small(tmp_path, num_facts=12)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(questions.read_text().splitlines(keepends=True)[:12]))  # one wording
    item = prepare(desk(tmp_path / "out"), job(notes, chunk_tokens=90, vectors=12, test=None))
    ground = item.ground
    assert len(ground.chunks) >= 2 and ground.is_chunked
    rows, right = item.train, 0
    for lesson in rows:
        target = lesson.question.target
        holders = [index for index, chunk in enumerate(ground.chunks) if target in chunk.text]
        right += lesson.question.chunk in holders
    assert right / len(rows) > 0.8
    with pytest.raises(ConfigError, match=f"cut into {len(ground.chunks)} chunks"):
        prepare(desk(tmp_path / "out"), job(notes, chunk_tokens=90, init="match"))
    (tmp_path / "bare.jsonl").write_text('{"input": "Who?"}\n')
    with pytest.raises(DataError, match=f"question 1 has no target, .* {len(ground.chunks)} chunks"):
        prepare(desk(tmp_path / "out"), job(notes, chunk_tokens=90, questions=str(tmp_path / "bare.jsonl")))


def test_a_task_elsewhere_is_scored(tmp_path):
    from foreword.distil.baselines import baselines
    from foreword.distil.elsewhere import measure_damage

    notes, task = write_small(tmp_path), write_task(tmp_path, hard_text="Is it warm or cold?")
    place = desk(tmp_path / "out")
    item = prepare(place, job(notes, elsewhere=str(task)))
    everyone = baselines(place, item.ground, item.run.start, 8)[:2]
    found = {damage.name: damage for damage in measure_damage(place, item.ground, everyone, str(task))}
    assert found["none"].divergence == pytest.approx(0, abs=1e-5)
    assert found["full"].divergence > 0.01
    assert all(0 <= damage.score <= 1 for damage in found.values())


def test_mistakes_are_told_before_any_work(tmp_path):
    notes, base = write_small(tmp_path), bundled()
    twice = [job(notes), job(notes)]
    for jobs, error, words in (
        ([], ConfigError, "at least one context"),
        (twice, ConfigError, "two contexts are named 'notes'"),
        ([job(notes, questions=None, self_study=0)], ConfigError, "no questions to learn from"),
        ([job(notes, elsewhere=str(tmp_path / "none.jsonl"))], DataError, "cannot read the questions"),
        ([job(notes, {"method": "prefix"}, init="match")], ConfigError, "for method kv, not prefix"),
    ):
        with pytest.raises(error, match=words):
            distil(base, jobs, out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_lessons_of_another_template_are_refused(made):
    _, found = made
    material = found.prepared.run.material
    short = dataclasses.replace(material, learn="all")
    with pytest.raises(DataError, match="lesson 1: the teacher has distributions for"):
        short.examples(bundled(), found.prepared.run.template)


@pytest.mark.slow
def test_most_of_the_gap_is_closed(tmp_path):
    """The bundled base on 24 facts at 1/4: what docs/distil.md shows, in fewer steps."""
    notes = write_small(tmp_path, num_facts=24)
    train = {"steps": 60, "batch_size": 16, "warmup_steps": 20, "eval_every": 30}
    (found,) = distil(bundled(), [job(notes, train, max_new_tokens=16)], out=tmp_path / "out")
    assert found.judged["full"].report.score > 0.85
    assert found.judged["none"].report.score < 0.2
    assert found.judged["student"].gap_closed > 0.9
    assert found.judged.retained > 0.8
    assert found.judged["student"].report.score > found.judged["truncated"].report.score + 0.3
