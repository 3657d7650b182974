"""`tweak`: rows mixed as asked, joint = alone, warm start, judged, published; wrong input leaves the registry alone."""

import dataclasses
import os
import signal

import pytest
import torch

from foreword.core.artefact import load_artefact, save_artefact
from foreword.errors import ConfigError, Conflict, DataError, IncompatibleModel, NotFound
from foreword.eval.tasks import read_rows, rows_sha256
from foreword.recipes.origin import live_version, open_origin, recipe_of, write_rows
from foreword.recipes.tweak import NEW, OLD, TweakSettings, tweak, tweak_config
from foreword.recipes.tweak_data import Rehearsal, hold_out, read_tweak_rows, write_task
from foreword.train.loop import TrainingInterrupted, fit
from foreword.train.run import Run
from tests.bundled import bundled
from tests.recipes import cases
from tests.recipes.cases import publish_trained, purple, small, state

QUICK = TweakSettings(steps=3, eval_rows=6, decoding="free")


@pytest.fixture
def registry(tmp_path):
    with publish_trained(tmp_path, methods=("kv", "prompt")) as registry:
        yield registry


def origin_of(registry, **where):
    return open_origin(registry, live_version(registry, "colour"), **where)


def test_a_version_says_where_its_rows_are_and_how_it_was_trained(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    origin = origin_of(registry)
    assert len(origin.task.rows("train")) == 32 and len(origin.task.rows("dev")) == 16
    assert origin.recipe.steps == cases.FAST["steps"] and origin.recipe.lr == cases.FAST["lr"]
    assert origin.task.labels() == ("cold", "warm")
    assert origin.template.text == "{soft:4}{input}"


def test_rows_are_written_and_read_again_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"input": "x", "target": "y", "references": ["y", "z"]}\n'
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "é"}, '
        '{"role": "assistant", "content": "a", "weight": 0}, {"role": "user", "content": "u"}, '
        '{"role": "assistant", "content": "t"}]}\n'
    )
    rows = read_rows(tmp_path / "a.jsonl")
    write_rows(tmp_path / "b.jsonl", rows)
    assert rows_sha256(read_rows(tmp_path / "b.jsonl")) == rows_sha256(rows)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75])
def test_the_mix_has_the_share_that_was_asked_for(registry, tmp_path, share):
    rows = read_tweak_rows(origin_of(registry), purple(tmp_path / "new.jsonl"), None, dev_share=0.3)
    whole, _, _ = write_task(tmp_path, origin_of(registry), rows)
    mixed = Rehearsal(task=whole, rows=rows, share=share, num_rows=40).mixed()
    old = [row for row in mixed if row.target != "purple"]
    assert len(old) == pytest.approx(share * len(mixed), abs=2)
    assert {row.input for row in rows.new_train} <= {row.input for row in mixed}
    assert len({id(row) for row in old}) == len(old)
    again = Rehearsal(task=whole, rows=rows, share=share, num_rows=40).mixed()
    assert mixed == again
    other = Rehearsal(task=whole, rows=rows, share=share, num_rows=40, seed=1)
    assert (mixed == other.mixed()) == (share == 0.0)
    train, dev = other.examples(small(), whole.template)
    assert len(train) == len(other.mixed()) and dev


def test_a_row_with_an_added_input_is_replaced_everywhere_and_dropped_answers_are_gone(registry, tmp_path):
    origin = origin_of(registry)
    twice = [origin.task.rows("train")[0].input, origin.task.rows("dev")[1].input, "something else", "and more"]
    add = cases.write_rows(tmp_path / "new.jsonl", [(text, "cold") for text in twice])
    rows = read_tweak_rows(origin, add, None, dev_share=0.3)
    assert not {row.input for row in (*rows.old_train, *rows.old_dev)} & set(twice)
    every = [*origin.task.rows("train"), *origin.task.rows("dev")]
    assert rows.num_replaced == sum(row.input in twice for row in every) >= 2
    dropped = read_tweak_rows(origin, add, None, dev_share=0.3, drop_targets=["warm"])
    assert {row.target for row in (*dropped.old_train, *dropped.old_dev)} == {"cold"} and dropped.num_dropped > 0
    whole, _, _ = write_task(tmp_path, origin, dropped)
    assert whole.labels() == ()  # one answer alone is no closed set
    with pytest.raises(DataError, match="'hot': no old row has this answer"):
        read_tweak_rows(origin, add, None, dev_share=0.3, drop_targets=["hot"])


def test_new_answers_join_the_labels(registry, tmp_path):
    origin = origin_of(registry)
    rows = read_tweak_rows(origin, purple(tmp_path / "new.jsonl"), None, dev_share=0.3)
    whole, old, new = write_task(tmp_path, origin, rows)
    assert whole.labels() == old.labels() == new.labels() == ("cold", "warm", "purple")
    assert len(old.rows("dev")) == 16 and len(new.rows("dev")) == 3 and len(whole.rows("dev")) == 19
    assert old.data_sha256("dev") == origin.task.data_sha256("dev")


def test_holding_out_needs_two_rows(tmp_path):
    rows = read_rows(purple(tmp_path / "one.jsonl", 1))
    with pytest.raises(DataError, match="holds 1 rows"):
        hold_out(rows, 0.3, 0, "one.jsonl")
    train, dev = hold_out(rows * 10, 0.3, 0, "x")
    assert len(train) == 7 and len(dev) == 3


def test_the_candidate_starts_at_the_live_vectors_and_is_published(registry, tmp_path):
    before = load_artefact(registry.path(registry.resolve("colour@prod")))
    seen = []
    result = tweak(
        registry,
        small(),
        "colour",
        purple(tmp_path / "new.jsonl"),
        out=tmp_path / "out",
        settings=QUICK,
        on_progress=lambda progress: seen.append(progress.losses),
        who="ann",
    )
    assert result.current == "colour@1" and result.version.reference == "colour@3" and seen
    assert registry.aliases("colour") == {"candidate": 3, "prod": 1}
    after = load_artefact(result.artefact)
    moved = torch.cat([(after.tensors[key] - before.tensors[key]).flatten() for key in before.tensors]).norm()
    whole = torch.cat([tensor.flatten() for tensor in before.tensors.values()]).norm()
    assert 0 < moved < 0.2 * whole
    header = after.header
    assert header.parent == before.sha256 and header.training["tweak"]["added"] == 7
    assert "purple" in header.labels and set(result.paired) == {OLD, NEW}
    assert result.paired[OLD].num_rows == 6 and result.paired[NEW].num_rows == 3
    assert any("3 new dev rows decide nothing" in note for note in result.notes)
    stored = result.version.evaluation
    assert stored["paired"]["against"] == before.sha256 and set(stored["paired"]["tests"]) == {OLD, NEW}
    assert stored["split"] == "dev" and result.version.who == "ann"
    registry.promote("colour@3", who="ann")
    assert recipe_of(header).steps == cases.FAST["steps"]  # the recipe of the task, not of the tweak


def test_a_tweak_can_be_tweaked_and_rehearses_both(registry, tmp_path):
    for number, target in enumerate(("purple", "mauve")):
        add = purple(tmp_path / f"{target}.jsonl", 10, target)
        add.write_text(add.read_text().replace("violet", target))
        result = tweak(registry, small(), "colour", add, out=tmp_path / f"out{number}", settings=QUICK)
        registry.promote(result.version.reference, force=True)
    rows = read_rows(tmp_path / "out1" / "train.jsonl")
    assert len(rows) == 32 + 7 + 7 and {"purple", "mauve", "cold"} <= {row.target for row in rows}
    assert len(read_rows(tmp_path / "out1" / "dev.old.jsonl")) == 16 + 3


def test_joint_is_alone(registry, tmp_path):
    """Contract 5: tweaks of two shares in one pass get the vectors that each gets by itself."""
    origin = origin_of(registry)
    rows = read_tweak_rows(origin, purple(tmp_path / "new.jsonl"), None, dev_share=0.3)
    whole, _, _ = write_task(tmp_path, origin, rows)
    runs = []
    for share in (0.25, 0.75):
        settings = TweakSettings(rehearsal=share, steps=3)
        config = dataclasses.replace(tweak_config(origin, settings), lr=0.05)
        material = Rehearsal(task=whole, rows=rows, share=share, num_rows=12)
        runs.append(Run(whole, config, f"share{share}", material, origin.artefact.vectors, origin.artefact.sha256))
    joint = fit(small(), runs, out=tmp_path / "joint")
    for run, together in zip(runs, joint, strict=True):
        (alone,) = fit(small(), [run], out=tmp_path / run.name)
        a, b = (load_artefact(result.artefact).tensors for result in (together, alone))
        start = origin.artefact.tensors
        apart = torch.cat([(a[key] - b[key]).flatten() for key in a]).norm()
        way = torch.cat([(a[key] - start[key]).flatten() for key in a]).norm()
        assert way > 0 and apart <= 2e-3 * way


def test_a_lost_paired_test_stops_the_promotion(registry, tmp_path):
    result = tweak(registry, small(), "colour", purple(tmp_path / "new.jsonl"), out=tmp_path / "out", settings=QUICK)
    evaluation = {**result.version.evaluation}
    test = {**evaluation["paired"]["tests"][OLD], "verdict": "worse", "score_a": 0.25, "score_b": 0.5}
    evaluation["paired"] = {**evaluation["paired"], "tests": {OLD: test}}
    artefact = load_artefact(result.artefact)
    other = tmp_path / "other.safetensors"
    save_artefact(other, dataclasses.replace(artefact.header, created="later"), artefact.tensors)
    lost = registry.publish(other, evaluation=evaluation)
    with pytest.raises(Conflict, match=r"lost to colour@1 row by row: exact_match 0.25 against 0.5 on old dev rows"):
        registry.promote(lost.reference)
    registry.promote(result.version.reference)
    registry.promote(lost.reference)  # the test was against another version than the one that serves now


def run_wrong(registry, tmp_path, error, match, task="colour", base=None, add=None, **given):
    before = state(registry)
    add = purple(tmp_path / "new.jsonl") if add is None else add
    with pytest.raises(error, match=match) as caught:
        tweak(registry, base or fail, task, add, out=tmp_path / "out", settings=given.pop("settings", QUICK), **given)
    assert state(registry) == before
    return caught.value


def fail():
    raise AssertionError("the base was loaded before the refusal")


def test_a_gone_dev_set_is_refused_with_the_way_to_give_one(registry, tmp_path):
    dev = tmp_path / "data" / "colour.dev.jsonl"
    kept = dev.rename(tmp_path / "kept.jsonl")
    error = run_wrong(registry, tmp_path, DataError, f"colour@1: its dev rows are gone, there is no {dev}")
    assert "--old-dev" in error.hint and "--task" in error.hint
    tweak(registry, small(), "colour", tmp_path / "new.jsonl", out=tmp_path / "out", settings=QUICK, old_dev=kept)


def test_gone_training_rows_are_refused_unless_none_are_rehearsed(registry, tmp_path):
    (tmp_path / "data" / "colour.train.jsonl").unlink()
    error = run_wrong(registry, tmp_path, DataError, "its training rows are gone")
    assert "--rehearsal 0" in error.hint
    settings = dataclasses.replace(QUICK, rehearsal=0.0)
    tweak(registry, small(), "colour", tmp_path / "new.jsonl", out=tmp_path / "out", settings=settings)


def test_wrong_input_is_refused_before_the_base_is_loaded(registry, tmp_path):
    assert "colour" in run_wrong(registry, tmp_path, NotFound, "no task 'color'", task="color").hint
    run_wrong(registry, tmp_path, NotFound, "colour has no alias 'blue'", start="blue")
    run_wrong(registry, tmp_path, DataError, "cannot read", add=tmp_path / "nowhere.jsonl")
    for wrong, message in (({"rehearsal": 1.0}, "a rehearsal of 1"), ({"dev_share": 0.0}, "0 held out")):
        with pytest.raises(ConfigError, match=message):
            TweakSettings(**wrong)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    run_wrong(registry, tmp_path, ConfigError, "is not empty")


def test_without_prod_nothing_goes_live_unasked(registry, tmp_path):
    registry.untag("colour", "prod")
    assert "foreword tag colour@1 prod" in run_wrong(registry, tmp_path, NotFound, "colour has no alias 'prod'").hint
    run_wrong(registry, tmp_path, Conflict, "a candidate would go live unasked", start="1")
    add = tmp_path / "new.jsonl"
    result = tweak(registry, small(), "colour", add, out=tmp_path / "out", settings=QUICK, start="1", publish=False)
    assert result.version is None and len(registry.versions("colour")) == 2


def test_an_empty_registry_says_so(registry, tmp_path):
    from foreword.registry.store import Registry

    with Registry.open(tmp_path / "empty") as empty:
        assert "holds no tasks" in run_wrong(empty, tmp_path, NotFound, "no task 'colour'").hint


def test_another_base_is_refused_with_the_way_there(registry, tmp_path):
    error = run_wrong(registry, tmp_path, IncompatibleModel, "another base: weights_sha256", base=small(seed=1))
    assert "foreword migrate" in error.hint


def test_another_template_in_the_task_file_is_refused_with_both(registry, tmp_path):
    from tests.bundled import write_task as write

    file = write(tmp_path / "other", template="{soft:4}Colour: {input}")
    error = run_wrong(registry, tmp_path, ConfigError, "colour@1 was trained for the template", task_file=file)
    assert "Colour: {input}" in error.message and "--template" in error.hint


def test_an_imported_version_needs_a_task_file(registry, tmp_path):
    artefact = load_artefact(registry.path(registry.resolve("colour@1")))
    bare = tmp_path / "bare.safetensors"
    save_artefact(bare, dataclasses.replace(artefact.header, training={}), artefact.tensors)
    version = registry.publish(bare)
    error = run_wrong(registry, tmp_path, ConfigError, "does not say on which rows", start=str(version.number))
    assert "--task" in error.hint


def test_a_signal_publishes_nothing(registry, tmp_path):
    def stop(progress):
        os.kill(os.getpid(), signal.SIGINT)

    error = run_wrong(registry, tmp_path, TrainingInterrupted, "nothing was published", base=small(), on_progress=stop)
    assert error.exit_code == 130 and "--resume" not in error.hint


@pytest.mark.slow
def test_a_new_answer_is_learned_and_the_old_ones_are_kept(tmp_path):
    from foreword.registry.store import Registry
    from tests.bundled import write_task as write

    base = bundled()
    file = write(tmp_path / "data", rows=90)
    (trained,) = fit(base, [Run.from_toml(file, method="kv", steps=80, batch_size=8)], out=tmp_path / "trained")
    with Registry.open(tmp_path / "home") as registry:
        registry.publish(trained.artefact, alias="prod")
        rows = [(row.input.replace("old", "new"), "broken") for row in read_rows(tmp_path / "data/colour.dev.jsonl")]
        add = cases.write_rows(tmp_path / "new.jsonl", rows[:24])
        settings = TweakSettings(steps=60, lr_factor=0.5)
        result = tweak(registry, base, "colour", add, out=tmp_path / "out", settings=settings)
    assert result.paired[NEW].verdict == "better" and result.paired[NEW].score_a > 0.8
    assert result.paired[OLD].score_a > 0.8 and not result.lost
