"""Packed, compiled, checkpointed, offloaded: the same loss and gradients as the plain way."""

import gc

import pytest
import torch

from foreword.core.block import Block
from foreword.core.init import initial_vectors
from foreword.core.packed import InSequence, forward_packed, packs
from foreword.core.prompt import SoftPrompt
from foreword.errors import ConfigError
from foreword.train.data import Example
from foreword.train.loss import Batch, step_gradients, target_losses
from foreword.train.strategy import Strategy, choose_strategy
from foreword.train.tuners import Tuner
from tests.tiny import NAMES, SIX, tiny

BLOCKS = [Block(((1,), 4, (7, 9))), Block((9,)), Block((3,)), Block(((1, 3), 2, (4,)))]
METHODS = ["prompt", "kv", "prefix", "prefix"]
PACKING = [name for name in NAMES if name not in ("bloom", "falcon-alibi")]
WAYS = {
    "packed": Strategy(packed=True),
    "checkpointing": Strategy(checkpointing=True),
    "offload": Strategy(offload=True),
    "all": Strategy(packed=True, checkpointing=True, offload=True),
}


def rows(seed):
    """Ragged rows, longer than the windows of the tiny bases."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 34, (3,), generator=generator).tolist()
    ids = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    return [Example(ids[0], 2), Example(ids[1], 1), Example(ids[2], 1, spans=((1, 3),))]


def batches(base):
    made = [
        Tuner(initial_vectors(base, method, block, "random", seed=seed), block)
        for seed, (method, block) in enumerate(zip(METHODS, BLOCKS, strict=True))
    ]
    return [Batch(tuner, rows(seed)) for seed, tuner in enumerate(made)]


def assert_same(base, strategy, micro_tokens=4096, make=batches):
    plain, other = make(base), make(base)
    expected = step_gradients(base, plain)
    found = step_gradients(base, other, micro_tokens, strategy)
    assert found == pytest.approx(expected, rel=1e-5)
    for a, b in zip(plain, other, strict=True):
        reference = a.tuner.encoder.theta.grad
        assert reference.abs().max() > 0
        assert (b.tuner.encoder.theta.grad - reference).norm() <= 1e-4 * reference.norm()


@pytest.mark.parametrize("name", PACKING)
def test_packed_is_padded_on_every_family_that_packs(name):
    assert packs(tiny(name))
    assert_same(tiny(name), Strategy(packed=True))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_packed_in_parts_is_padded(name):
    assert_same(tiny(name), Strategy(packed=True), micro_tokens=40)


@pytest.mark.parametrize("way", ["checkpointing", "offload", "all"])
@pytest.mark.parametrize("name", SIX)
def test_saved_activations_may_be_computed_again_or_lie_elsewhere(name, way):
    if way == "all" and name not in PACKING:
        pytest.skip("does not pack")
    assert_same(tiny(name), WAYS[way])


def test_slots_behind_the_text_are_packed():
    def make(base):
        torch.manual_seed(0)
        tuner = Tuner(SoftPrompt(torch.randn(4, 64), BLOCKS[0], torch.randn(2, 64)), BLOCKS[0])
        return [
            Batch(tuner, [Example([5, 8, 0, 0, 21, 2], 2, ((2, 0, 2),)), Example([5, 0, 0, 9, 2], 1, ((1, 0, 2),))])
        ]

    assert_same(tiny("qwen3"), Strategy(packed=True), make=make)


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi"])
def test_a_base_that_counts_positions_by_its_mask_is_not_packed(name):
    assert not packs(tiny(name))
    assert choose_strategy(tiny(name)) == Strategy()
    with pytest.raises(ConfigError, match=r"bloom|falcon.*does not compute a packed sequence right"):
        choose_strategy(tiny(name), "packed")


def test_a_row_hears_nothing_of_its_neighbours():
    """Another row's tokens, and another run's vectors, leave a run's loss and gradient to the last digits."""
    base = tiny("qwen3")
    one, two = batches(base), batches(base)
    two[1].rows[0].ids[:] = [5] * len(two[1].rows[0].ids)
    with torch.no_grad():
        two[2].tuner.encoder.theta.mul_(3)
    losses = [step_gradients(base, some, strategy=Strategy(packed=True)) for some in (one, two)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0][1] != pytest.approx(losses[1][1], rel=1e-3)
    torch.testing.assert_close(one[0].tuner.encoder.theta.grad, two[0].tuner.encoder.theta.grad, rtol=1e-4, atol=1e-6)


def test_checkpointing_keeps_less():
    base = tiny("llama")
    kept = {}
    for name, strategy in (("plain", Strategy()), ("checkpointing", Strategy(checkpointing=True))):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            step_gradients(base, batches(base), strategy=strategy)
        kept[name] = sum(sizes)
    assert kept["checkpointing"] < 0.7 * kept["plain"]


def test_layouts_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match=r"layout 'dense' is not one of auto, packed, padded"):
        choose_strategy(tiny("llama"), "dense")
    assert choose_strategy(tiny("llama")) == Strategy()
    assert choose_strategy(tiny("llama"), "packed").packed


def test_nothing_of_a_step_waits_for_the_garbage_collector():
    base, held = tiny("llama"), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            step_gradients(base, batches(base))
            held.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    finally:
        gc.enable()
    assert held[-1] == held[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_flex_attention_sees_what_the_matrix_shows(name, monkeypatch):
    """Its backward pass runs on CUDA only; the forward pass shows that its block mask says the same."""
    base = tiny(name)
    items = batches(base)
    fronts = [InSequence(batch.tuner.vectors(), batch.tuner.block) for batch in items]
    part = [(run, row) for run, batch in enumerate(items) for row in batch.rows]
    with torch.no_grad():
        _, plain = target_losses(base, part, fronts, forward_packed)
        monkeypatch.setattr(base.config, "_attn_implementation", "flex_attention")
        _, flexible = target_losses(base, part, fronts, forward_packed)
    assert (plain - flexible).abs().max() < 1e-5
