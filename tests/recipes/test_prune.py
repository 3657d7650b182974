"""`prune`: which vectors go, that a pruned kv is the kv with its vectors masked, and what is published."""

import dataclasses

import pytest
import torch

from foreword.core.artefact import load_artefact, read_header, save_artefact
from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.forward import forward
from foreword.core.init import random_kv
from foreword.core.template import TaskTemplate
from foreword.errors import ConfigError, DataError, NotFound
from foreword.explain.ablate import form_without, run_form
from foreword.explain.examples import Example
from foreword.recipes.origin import open_origin
from foreword.recipes.prune import PruneSettings, choose, make_runs, prune, without, without_slots
from foreword.train.loop import fit
from tests.explain.vectors import make
from tests.recipes.cases import publish_trained, small, state
from tests.tiny import tiny

QUICK = PruneSettings(rows=12, steps=3, eval_rows=6, decoding="free")
IDS = [[3, 8, 20, 41, 5]]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox", "phi3", "olmo2"])
@pytest.mark.parametrize("removed", [{0}, {3}, {1, 2}])
def test_a_pruned_kv_is_the_kv_with_these_vectors_masked(name, removed):
    """Exact: every key keeps its distance to the text, which moves up by as many places as are gone."""
    base, block = tiny(name), Block((5,))
    vectors = random_kv(base, block, seed=1)
    left = without(base, vectors, removed, Block((5 - len(removed),)))
    pruned = forward(base, IDS, compile(base, left))[0]
    form = form_without(base, vectors, removed)
    masked = run_form(base, form, [Example(tuple(IDS[0]))], torch.arange(5))
    torch.testing.assert_close(pruned, masked, atol=2e-4, rtol=2e-4)
    unturned = dataclasses.replace(
        left, keys=tuple(k[:, [i for i in range(5) if i not in removed]] for k in vectors.keys)
    )
    assert (forward(base, IDS, compile(base, unturned))[0] - masked).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_other_methods_lose_the_rows_and_nothing_else(method):
    base = tiny("llama")
    vectors = make(base, method)
    block = Block((vectors.num_vectors - 1,))
    left = without(base, vectors, {1}, block)
    kept = [index for index in range(vectors.num_vectors) if index != 1]
    dim = 1 if method == "prefix" else 0
    assert torch.equal(left.vectors, vectors.vectors.index_select(dim, torch.tensor(kept)))
    compile(base, left)


@pytest.mark.parametrize(
    ("template", "removed", "left"),
    [
        (TaskTemplate("{soft:4}{input}"), {1}, ("{soft:3}{input}", None)),
        (TaskTemplate("{soft:2}a{soft:3}{input}{soft:2}"), {0, 1, 5}, ("a{soft:3}{input}{soft:1}", None)),
        (TaskTemplate("a{soft:2}b{soft:2}{input}", chat=True, system="{soft:2}s"), {0, 4, 5},
         ("a{soft:2}b{input}", "{soft:1}s")),
        (TaskTemplate("{soft:2}a{soft:1}{input}", chat=True, system="s{soft:2}"), {0, 2, 4},
         ("{soft:1}a{input}", "s{soft:1}")),
    ],
)  # fmt: skip
def test_slots_shrink_where_their_vectors_stood(template, removed, left):
    shorter = without_slots(template, removed)
    assert (shorter.text, shorter.system) == left


def planted(tmp_path, registry):
    """Publish the kv with its second vector made to shout: it draws attention and says noise."""
    artefact = load_artefact(registry.path(registry.resolve("colour@1")))
    tensors = {name: tensor.clone() for name, tensor in artefact.tensors.items()}
    for name in tensors:
        tensors[name][:, 1] *= 40.0 if name.startswith("value") else 1.0
    path = tmp_path / "planted.safetensors"
    save_artefact(path, artefact.header, tensors)
    return registry.publish(path)


def test_a_planted_harmful_vector_is_found_taken_out_and_the_rest_published(tmp_path):
    with publish_trained(tmp_path) as registry:
        version = planted(tmp_path, registry)
        found = prune(registry, small(), version.reference, out=tmp_path / "out", settings=QUICK)
        assert 1 in found.removed and found.loss_change.value < 0
        assert found.version.num_vectors == 4 - len(found.removed)
        assert registry.aliases("colour")["candidate"] == found.version.number
    header = read_header(found.artefact)
    assert header.template["text"] == f"{{soft:{header.num_vectors}}}{{input}}" and header.parent == version.sha256
    assert header.training["pruned"]["removed"] == list(found.removed)
    assert found.paired.num_rows == found.control.num_rows == 6 and found.split == "dev"


def test_joint_is_alone(tmp_path):
    """Contract 5: the pruned run and its control get in one pass what each gets by itself."""
    with publish_trained(tmp_path) as registry:
        origin = open_origin(registry, registry.resolve("colour"))
    runs = make_runs(small(), origin, {2}, dataclasses.replace(QUICK, lr_factor=1.0))
    joint = fit(small(), runs, out=tmp_path / "joint")
    for run, together in zip(runs, joint, strict=True):
        (alone,) = fit(small(), [run], out=tmp_path / run.name)
        a, b = (load_artefact(result.artefact).tensors for result in (together, alone))
        start = run.start.tensors()
        apart = torch.cat([(a[key] - b[key]).flatten() for key in a]).norm()
        way = torch.cat([(a[key] - start[key]).flatten() for key in a]).norm()
        assert way > 0 and apart <= 2e-3 * way


def test_where_none_harms_nothing_happens(tmp_path):
    with publish_trained(tmp_path) as registry:
        before = state(registry)
        strict = dataclasses.replace(QUICK, only_certain=True)
        origin = open_origin(registry, registry.resolve("colour"))
        chosen = choose(small(), origin, strict)
        harmful = {effect.index for effect in chosen.one_by_one.effects if effect.verdict == "harms"}
        assert set(chosen.removed) <= harmful and len(chosen.one_by_one.effects) == 4
        if not chosen.removed:
            found = prune(registry, small(), "colour", out=tmp_path / "out", settings=strict)
            assert found.version is None and not (tmp_path / "out").exists()
        assert state(registry) == before


def test_wrong_input(tmp_path):
    with publish_trained(tmp_path) as registry:
        before = state(registry)

        def load():
            raise AssertionError("loaded")

        with pytest.raises(NotFound):
            prune(registry, load, "colour@9", out=tmp_path / "out")
        (tmp_path / "data" / "colour.train.jsonl").unlink()
        with pytest.raises(DataError, match="its training rows are gone"):
            prune(registry, load, "colour", out=tmp_path / "out")
        assert state(registry) == before
    with pytest.raises(ConfigError, match="all 4 vectors"):
        without(tiny("llama"), random_kv(tiny("llama"), Block((4,)), 0), range(4), Block(()))
