"""`similar`: measures with known answers, the order, who is left out, and what is recommended."""

import dataclasses

import pytest
import torch

from foreword.core.artefact import load_artefact, save_artefact
from foreword.core.prompt import SoftKV, SoftPrompt
from foreword.errors import ConfigError, IncompatibleModel, NotFound
from foreword.recipes.similar import cosines, output_divergence, similar
from foreword.registry.store import Registry
from foreword.train.loop import fit
from foreword.train.run import Run
from tests.bundled import write_task
from tests.recipes.cases import FAST, publish_trained, small


def test_cosines_of_known_vectors():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert cosines(SoftPrompt(x), SoftPrompt(x)) == (pytest.approx(1), pytest.approx(1))
    pooled, aligned = cosines(SoftPrompt(x), SoftPrompt(y))  # the same mean, each vector another
    assert pooled == pytest.approx(1) and aligned == pytest.approx(0)
    assert cosines(SoftPrompt(x), SoftPrompt(-x[:1]))[1] is None
    key, value = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    pooled, aligned = cosines(SoftKV((key,), (value,)), SoftKV((key,), (-value,)))
    assert pooled == pytest.approx(0) and aligned == pytest.approx(0)  # keys agree, values oppose
    with pytest.raises(ValueError, match="other spaces"):
        cosines(SoftPrompt(x), SoftKV((key,), (value,)))


@pytest.fixture
def registry(tmp_path):
    """`near` is the very task under another name, learnt, `far` has random vectors, `tone` another method."""
    base = small()
    publish_trained(tmp_path, methods=("kv",), task="near", steps=30).close()
    with publish_trained(tmp_path, methods=("prompt",), task="tone") as registry:
        near = load_artefact(registry.path(registry.resolve("near")))
        torch.manual_seed(0)
        noise = {name: 3.0 * torch.randn_like(tensor) for name, tensor in near.tensors.items()}
        save_artefact(tmp_path / "far.safetensors", dataclasses.replace(near.header, task="far"), noise)
        registry.publish(tmp_path / "far.safetensors")
        assert base.spec.num_layers == 3
        yield registry


def test_a_task_file_is_ranked_by_the_loss_of_its_rows(registry, tmp_path):
    file = write_task(tmp_path / "mine", "mine")
    found = similar(registry, small(), file, method="kv", num_rows=8)
    assert [match.reference for match in found.matches] == ["near@1", "far@1"] and found.ranked_by == "loss"
    assert found.matches[0].loss < found.matches[1].loss and found.matches[0].kl is None
    assert found.left_out == ("tone@1: method prompt, a start for kv is needed",)
    assert found.own_loss is not None and found.own_init == "text"
    assert found.recommended == ("near@1" if found.matches[0].loss < found.own_loss else None)


def test_the_loss_is_what_training_from_there_begins_with(registry, tmp_path):
    file = write_task(tmp_path / "mine", "mine")
    found = similar(registry, small(), file, method="kv", num_rows=32)
    path = registry.path(registry.resolve("far"))
    settings = {**FAST, "steps": 1, "batch_size": 32, "init": f"from:{path}"}
    (trained,) = fit(small(), [Run.from_toml(file, method="kv", **settings)], out=tmp_path / "out")
    assert trained.history[0]["loss"] == pytest.approx(found.matches[1].loss, rel=1e-4)


def test_a_version_is_compared_by_loss_outputs_and_vectors(registry, tmp_path):
    found = similar(registry, small(), "near@1", num_rows=8)
    (far,) = found.matches
    assert far.reference == "far@1" and far.loss is not None and far.kl > 0.01 and abs(far.cosine) < 0.9
    (tmp_path / "data" / "near.train.jsonl").unlink()  # no rows: outputs decide
    found = similar(registry, small(), "near@1")
    assert found.ranked_by == "kl" and found.matches[0].loss is None and found.own_loss is None


def test_divergence_of_a_version_from_itself_is_nothing(registry):
    near, far = (load_artefact(registry.path(registry.resolve(name))) for name in ("near", "far"))
    assert output_divergence(small(), near, near) == pytest.approx(0, abs=1e-9)
    one, other = output_divergence(small(), near, far), output_divergence(small(), far, near)
    assert one == pytest.approx(other) and one > 0
    bare = dataclasses.replace(near, header=dataclasses.replace(near.header, conformance=()))
    assert output_divergence(small(), bare, bare) is None


def test_another_base_and_an_empty_registry(registry, tmp_path):
    file = write_task(tmp_path / "mine", "mine")
    found = similar(registry, small(seed=1), file, method="kv", num_rows=4)
    assert not found.matches and any("of another base (weights_sha256" in reason for reason in found.left_out)
    assert found.recommended is None
    with pytest.raises(IncompatibleModel):
        similar(registry, small(seed=1), "near@1")
    with pytest.raises(ConfigError, match="0 rows"):
        similar(registry, small(), file, num_rows=0)
    with Registry.open(tmp_path / "empty") as empty, pytest.raises(NotFound, match="of another task than 'mine'"):
        similar(empty, small(), file)


def test_all_versions(registry, tmp_path):
    near = load_artefact(registry.path(registry.resolve("near")))
    changed = {name: tensor * 1.5 for name, tensor in near.tensors.items()}
    save_artefact(tmp_path / "two.safetensors", near.header, changed)
    registry.publish(tmp_path / "two.safetensors")
    file = write_task(tmp_path / "mine", "mine")
    found = similar(registry, small(), file, method="kv", num_rows=4, all_versions=True)
    assert {match.reference for match in found.matches} == {"near@1", "near@2", "far@1"}
