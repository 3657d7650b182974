"""A trained prompt and a dead one, on the bundled base: the explanations differ, in words and in every signal."""

import dataclasses
import json

import pytest
import torch

from foreword.core.artefact import load_artefact
from foreword.core.block import Block
from foreword.core.prompt import SoftPrompt
from foreword.errors import ConfigError, DataError, IncompatibleModel
from foreword.eval.tasks import Task
from foreword.explain.ablate import divergences, form_without
from foreword.explain.effects import effect_on_outputs
from foreword.explain.examples import Example, Sample, gather
from foreword.explain.explanation import explain
from foreword.explain.report import report
from foreword.report import render
from foreword.train.loop import fit
from foreword.train.run import Run
from tests.bundled import bundled, write_task
from tests.explain.vectors import EXAMPLES, dead_kv, make
from tests.tiny import NAMES, tiny

METHODS = ["prompt", "prefix", "kv"]
CASES = [(name, METHODS[place % 3]) for place, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A prompt trained for some seconds, its task, and a sample of its rows."""
    folder = tmp_path_factory.mktemp("explain")
    toml = write_task(folder)
    run = Run.from_toml(toml, method="prompt", steps=16, eval_every=16, batch_size=8, warmup_steps=2)
    (result,) = fit(bundled(), [run], out=folder / "out")
    artefact = load_artefact(result.artefact)
    return artefact, gather(bundled(), artefact.header, task=Task.from_toml(toml)), toml


@pytest.fixture(scope="module")
def alive(trained):
    return explain(bundled(), trained[0], trained[1])


@pytest.fixture(scope="module")
def dead(trained):
    artefact, sample, _ = trained
    return explain(bundled(), dead_kv(bundled(), sample.examples, artefact.header.block), sample, name="dead")


def test_a_trained_prompt_is_alive(alive):
    assert alive.verdict.state == "alive" and alive.verdict.sentence.startswith("alive: ")
    assert alive.losses.gain.low > 1.0 and alive.losses.gain_over_control.low > 1.0
    assert alive.outputs.mean.low > 0.1
    assert 0.02 < alive.attention.mean < 0.98
    assert alive.one_by_one.count("helps") >= 1
    assert len(alive.one_by_one.effects) == alive.num_vectors == 4
    assert alive.faithfulness.verdict == "not faithful" and alive.faithfulness.score.high < 0.8


def test_without_means_without_all_of_them(trained, alive):
    vectors, examples = trained[0].vectors, trained[1].examples
    kl = divergences(bundled(), form_without(bundled(), vectors), form_without(bundled(), vectors, range(4)), examples)
    assert alive.outputs.mean.value == pytest.approx(effect_on_outputs(kl, examples).mean.value, rel=1e-6)


def test_a_dead_one_does_nothing_by_every_signal(dead):
    assert dead.verdict.state == "dead"
    assert "dead: the vectors do nothing (KL " in dead.verdict.sentence
    assert dead.outputs.mean.value < 1e-6
    assert abs(dead.losses.gain.value) < 1e-5
    assert dead.attention.mean < 1e-6
    assert all(effect.verdict == "unclear" for effect in dead.one_by_one.effects)
    assert dead.reading is None and any("no nearest tokens" in sentence for sentence in dead.missing)


def test_the_two_reports_differ_visibly(alive, dead):
    one, other = (render(report(found), "text") for found in (alive, dead))
    assert "Alive: the vectors make the answers likelier" in one and "Dead: the vectors do nothing" in other
    assert "Nearest tokens are not an explanation of these vectors" in one
    shades = [[line for line in text.splitlines() if line[:2] in ("0 ", "5 ") and "·" in line] for text in (one, other)]
    assert all(set(line) <= set("05 ·") for line in shades[1]) and len(shades[1]) == 2
    assert shades[0] != shades[1]


def test_an_untrained_prompt_is_not_taken_for_a_trained_one(trained):
    artefact, sample, _ = trained
    torch.manual_seed(0)
    norm = float(bundled().embedding.weight.std())
    rows = torch.randn(4, bundled().spec.embed_size) * norm
    found = explain(bundled(), SoftPrompt(rows, artefact.header.block), sample, one_by_one=False)
    assert found.verdict.state in ("idle", "harmful")
    assert found.one_by_one is None


def test_reports_come_in_every_form_with_the_numbers(alive, dead):
    for found in (alive, dead):
        made = report(found)
        data = json.loads(render(made, "json"))["data"]
        assert data["verdict"]["state"] == found.verdict.state
        assert data == json.loads(json.dumps(found.to_json()))
        assert "Prefix mass" in render(made, "markdown")
    page = render(report(alive), "html")
    assert "Alive: the vectors make the answers likelier" in page and page.count("<svg") >= 4


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_architecture_and_method(name, method):
    base = tiny(name)
    before = base.checksum()
    sample = Sample(examples=tuple(EXAMPLES), source="made", has_targets=True)
    found = explain(base, make(base, method), sample, nearest=1)
    assert found.attention is not None and len(found.attention.layers) == base.spec.num_layers
    assert found.missing[-1] == "4 rows are too few for intervals."
    assert render(report(found), "text").startswith(f"What the vectors of {method} do")
    assert base.checksum() == before


def test_without_targets_what_needs_them_is_left_out_and_said(trained):
    artefact, _, _ = trained
    probes = gather(bundled(), artefact.header)
    assert probes.source == "the artefact's 8 conformance probes" and not probes.has_targets
    found = explain(bundled(), artefact, probes)
    assert found.losses is found.one_by_one is found.faithfulness is None
    assert found.verdict.state == "acting" and found.reading is not None
    assert "have no targets" in found.missing[0]
    assert "not tested against the loss" in render(report(found), "text")
    texts = gather(bundled(), artefact.header, texts=["the old cart is red"])
    assert explain(bundled(), artefact, texts).num_rows == 1


def test_rows_of_a_file_and_of_a_task_are_the_same_rows(trained):
    artefact, sample, toml = trained
    from_file = gather(bundled(), artefact.header, rows=toml.with_name("colour.dev.jsonl"))
    assert sample.source == "16 of 16 rows of colour dev"
    assert from_file.source == "16 of 16 rows of colour.dev.jsonl"
    assert from_file.examples == sample.examples
    few = gather(bundled(), artefact.header, rows=toml.with_name("colour.dev.jsonl"), limit=3, seed=1)
    assert len(few.examples) == 3 and set(few.examples) <= set(sample.examples)


def test_what_cannot_be_measured_is_refused(trained, tmp_path):
    artefact, sample, toml = trained
    header = artefact.header
    with pytest.raises(ConfigError, match="a task and texts were given"):
        gather(bundled(), header, task=Task.from_toml(toml), texts=["a"])
    with pytest.raises(ConfigError, match="limit = 0"):
        gather(bundled(), header, limit=0)
    with pytest.raises(ConfigError, match="nothing to measure on"):
        gather(bundled(), dataclasses.replace(header, conformance=()))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"input": "very " * 5000, "target": "warm"}) + "\n")
    with pytest.raises(DataError, match=r"row 1 takes \d+ positions"):
        gather(bundled(), header, rows=long)
    with pytest.raises(IncompatibleModel, match="was trained for another base"):
        explain(tiny("llama"), artefact, sample)


def test_vectors_behind_the_text_alone_have_no_prefix():
    base = tiny("llama")
    vectors = make(base, "prompt", Block(((1,),)), after=2)
    example = Example((5, 6, 7, 0, 0, 8, 9), 2, ((3, 0, 2),))
    found = explain(base, vectors, Sample(examples=(example,) * 6, source="made", has_targets=True))
    assert found.attention is None and any("no prefix mass" in sentence for sentence in found.missing)
    assert [effect.position for effect in found.one_by_one.effects] == [None, None]
    assert "behind the text" in render(report(found), "text")
