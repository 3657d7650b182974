"""`retouch`: hard text changes, vectors do not; keys of a kv are turned to where they come to stand."""

import dataclasses

import pytest
import torch

from foreword.core.artefact import load_artefact, read_header
from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.conformance import replay
from foreword.core.forward import forward
from foreword.core.init import random_kv
from foreword.core.template import TaskTemplate
from foreword.errors import ConfigError, DataError
from foreword.recipes.retouch import check_slots, moved, retouch, with_hard_text
from foreword.recipes.tweak import NEW, OLD
from tests.recipes.cases import publish_trained, purple, small, state
from tests.tiny import tiny

QUICK = {"eval_rows": 6, "decoding": "free"}


@pytest.fixture(params=["kv", "prompt", "prefix"])
def registry(request, tmp_path):
    with publish_trained(tmp_path, methods=(request.param,)) as registry:
        yield registry


def test_only_the_text_changes(registry, tmp_path):
    new = "{soft:4}Which colour? {input}"
    result = retouch(registry, small(), "colour", new, out=tmp_path / "out", **QUICK)
    before, after = (load_artefact(registry.path(registry.resolve(name))) for name in ("colour@1", "colour@2"))
    assert all(torch.equal(before.tensors[key], after.tensors[key]) for key in before.tensors)
    assert after.header.template["text"] == new and after.header.parent == before.sha256
    assert after.header.template["sha256"] != before.header.template["sha256"]
    assert not result.notes
    assert replay(small(), compile(small(), after), after.header.conformance).ok
    assert set(result.paired) == {OLD} and registry.aliases("colour") == {"candidate": 2, "prod": 1}
    assert result.version.evaluation["paired"]["against"] == before.sha256
    again = retouch(registry, small(), "colour", "{soft:4}{input}", out=tmp_path / "o2", start="candidate", **QUICK)
    assert read_header(again.artefact).block == before.header.block


def test_new_dev_rows_are_judged_too(tmp_path):
    dev = purple(tmp_path / "dev.jsonl", 6, "warm")
    with publish_trained(tmp_path) as registry:
        result = retouch(registry, small(), "colour", "{soft:4}!{input}", out=tmp_path / "out", new_dev=dev, **QUICK)
    assert result.paired[NEW].num_rows == 6


def test_keys_that_come_to_stand_elsewhere_are_turned(tmp_path):
    with publish_trained(tmp_path) as registry:
        result = retouch(registry, small(), "colour", "Well: {soft:4}{input}", out=tmp_path / "out", **QUICK)
        old = load_artefact(registry.path(registry.resolve("colour@1")))
    new = load_artefact(result.artefact)
    assert "turned" in result.notes[0] and new.header.block.soft_positions()[0] > 1
    assert not torch.equal(old.tensors["key.0"], new.tensors["key.0"])
    assert torch.equal(old.tensors["value.0"], new.tensors["value.0"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-neox", "phi3"])
def test_turned_keys_act_at_their_new_place_as_at_the_old(name):
    """Behind nothing but themselves, text sees vectors alike wherever both stand: RoPE knows distances alone."""
    base = tiny(name)
    vectors = random_kv(base, Block((4,)), seed=0)
    here, _ = moved(base, vectors, Block((4,)))
    shifted, notes = moved(base, vectors, Block(((5, 6, 7), 4)))
    assert torch.equal(here.keys[0], vectors.keys[0]) and "turned" in notes[0]
    back, _ = moved(base, shifted, Block((4,)))
    for one, other in zip(vectors.keys, back.keys, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert forward(base, [[3, 4]], compile(base, back)).isfinite().all()


def test_a_base_that_turns_no_keys_leaves_them(tmp_path):
    base = tiny("gpt2")
    vectors = random_kv(base, Block((4,)), seed=0)
    put, notes = moved(base, vectors, Block(((5,), 4)))
    assert torch.equal(put.keys[0], vectors.keys[0]) and "does not rotate" in notes[0]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("{soft:4}{input}", "{soft:5}{input}", "{soft:5}"),
        ("{soft:4}{input}", "Hi {input}", "no slot"),
        ("{soft:4}{input}", "{input}{soft:4}", "{soft:4}"),
        ("{soft:4}{input}{soft:2}", "{soft:2}{input}{soft:4}", "{soft:2} {soft:4}"),
        ("{soft:2}a{soft:3}{input}", "{soft:3}a{soft:2}{input}", "{soft:3} {soft:2}"),
    ],
)
def test_other_slots_are_refused_with_both(old, new, found):
    with pytest.raises(ConfigError) as caught:
        check_slots(TaskTemplate(old), TaskTemplate(new))
    assert old in caught.value.message and caught.value.message.endswith(f"has {found}")


def test_in_a_chat_slots_may_not_change_their_turn():
    old = TaskTemplate("{soft:2}{input}", chat=True, system="{soft:2} x")
    check_slots(old, dataclasses.replace(old, system="{soft:2} y"))
    with pytest.raises(ConfigError):  # behind the system turn now, whose vectors would come first
        check_slots(old, dataclasses.replace(old, text="Hi {soft:2}{input}"))


def test_hard_text_goes_between_slot_and_input():
    assert with_hard_text(TaskTemplate("{soft:4}{input}"), "Say {this}:") == "{soft:4}Say {{this}}:\n{input}"
    assert with_hard_text(TaskTemplate("{soft:4}old: {input}"), "") == "{soft:4}{input}"
    for unclear in ("a{soft:4}{input}", "{soft:4}{input}!", "{soft:2}a{soft:2}{input}"):
        with pytest.raises(ConfigError, match="is not clear"):
            with_hard_text(TaskTemplate(unclear), "x")


def test_wrong_input_leaves_the_registry_alone(tmp_path):
    with publish_trained(tmp_path) as registry:
        before = state(registry)

        def wrong(error, match, template="{soft:4}x{input}"):
            with pytest.raises(error, match=match):
                retouch(registry, lambda: pytest.fail("loaded"), "colour", template, out=tmp_path / "out", **QUICK)

        wrong(ConfigError, "is the version's own", "{soft:4}{input}")
        wrong(ConfigError, "holds {input} 2 times", "{soft:4}{input}{input}")
        (tmp_path / "data" / "colour.dev.jsonl").unlink()
        wrong(DataError, "its dev rows are gone")
        assert state(registry) == before
