"""Loss and gradients against the plain way: vectors written into every row, logits everywhere, one row at a time."""

import pytest
import torch
import torch.nn.functional as F

from foreword.core.block import Block
from foreword.core.compile import compile, uncompiled_logits
from foreword.core.init import initial_vectors
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt
from foreword.train.data import Example
from foreword.train.loss import Batch, mean_losses, step_gradients
from foreword.train.tuners import ENCODERS, Tuner
from tests.tiny import SIX, tiny

BLOCK = Block(((1,), 4, (7, 9)))
ROWS = [Example([5, 8, 13, 21, 34, 55, 2], 3), Example([9, 4, 2], 2), Example([11, 12, 13, 14, 15, 16, 17, 18, 2], 1)]


def tuner(base, method, seed=0, block=BLOCK, encoder="none"):
    return Tuner(initial_vectors(base, method, block, "random", seed=seed), block, encoder, seed)


def plain_loss(base, vectors, rows):
    """Mean over target tokens, each row alone, the vectors in its sequence."""
    losses = []
    for row in rows:
        ids = torch.tensor([row.ids])
        if isinstance(vectors, SoftKV):
            prefix = compile_with_gradient(base, vectors)
            cache = prefix.cache()
            count = prefix.num_positions
            positions = torch.arange(count, count + ids.shape[1])[None]
            mask = torch.ones(1, count + ids.shape[1], dtype=torch.long)
            logits = base.run(ids=ids, positions=positions, cache=cache, mask=mask)
        else:
            logits = uncompiled_logits(base, ids, vectors)
        first = len(row.ids) - row.num_targets
        losses.append(F.cross_entropy(logits[0, first - 1 : -1].float(), ids[0, first:], reduction="none"))
    return torch.cat(losses).mean()


def compile_with_gradient(base, vectors):
    from foreword.core.compile import compute_block
    from foreword.core.prompt import KVPrefix

    layers = compute_block(base, vectors, vectors.block)
    return KVPrefix(tuple(key[0] for key, _ in layers), tuple(value[0] for _, value in layers), "")


@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
@pytest.mark.parametrize("name", SIX)
def test_loss_and_gradient_equal_the_plain_way(name, method):
    base = tiny(name)
    fast, plain = tuner(base, method), tuner(base, method)
    reference = plain_loss(base, plain.vectors(), ROWS)
    reference.backward()
    loss = step_gradients(base, [Batch(fast, ROWS)])[0]
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    expected, found = plain.encoder.theta.grad, fast.encoder.theta.grad
    assert expected.abs().max() > 0
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "bloom"])
def test_joint_gradients_equal_those_of_each_run_alone(name):
    base = tiny(name)
    blocks = [BLOCK, Block((9,)), Block(((1, 3), 2, (4,))), Block(((1,), 6))]
    methods = ["prompt", "prefix", "kv", "prompt"]
    joint = [tuner(base, m, i, b) for i, (m, b) in enumerate(zip(methods, blocks, strict=True))]
    alone = [tuner(base, m, i, b) for i, (m, b) in enumerate(zip(methods, blocks, strict=True))]
    rows = [ROWS, ROWS[:1], ROWS[1:], [*ROWS, *ROWS]]
    losses = step_gradients(base, [Batch(t, r) for t, r in zip(joint, rows, strict=True)])
    for index, (t, r) in enumerate(zip(alone, rows, strict=True)):
        assert losses[index] == pytest.approx(step_gradients(base, [Batch(t, r)])[0], rel=1e-5)
        difference = (joint[index].encoder.theta.grad - t.encoder.theta.grad).norm()
        assert difference <= 1e-4 * t.encoder.theta.grad.norm()


def test_micro_batches_do_not_change_loss_or_gradient():
    base = tiny("llama")
    whole, cut = tuner(base, "prefix"), tuner(base, "prefix")
    a = step_gradients(base, [Batch(whole, ROWS)])[0]
    b = step_gradients(base, [Batch(cut, ROWS)], micro_tokens=8)[0]
    assert a == pytest.approx(b, rel=1e-6)
    torch.testing.assert_close(whole.encoder.theta.grad, cut.encoder.theta.grad, rtol=1e-4, atol=1e-6)


def test_slots_behind_the_text_get_their_gradient():
    base = tiny("llama")
    torch.manual_seed(0)
    vectors = SoftPrompt(torch.randn(4, 64), BLOCK, torch.randn(2, 64))
    t = Tuner(vectors, BLOCK)
    rows = [Example([5, 8, 0, 0, 21, 2], 2, ((2, 0, 2),)), Example([5, 0, 0, 9, 2], 1, ((1, 0, 2),))]
    step_gradients(base, [Batch(t, rows)])
    gradient = t.encoder.theta.grad
    assert (gradient.norm(dim=1) > 0).all()
    step = 1e-2
    with torch.no_grad():  # finite difference of one entry of a vector behind the text
        t.encoder.theta[5, 3] += step
        up = mean_losses(base, [(with_after(base, t), rows)])[0]
        t.encoder.theta[5, 3] -= 2 * step
        down = mean_losses(base, [(with_after(base, t), rows)])[0]
    assert (up - down) / (2 * step) == pytest.approx(gradient[5, 3].item(), rel=2e-2, abs=1e-5)


def with_after(base, t):
    return compile(base, t.vectors())


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
def test_encoders_start_at_the_initial_vectors_and_all_their_parameters_learn(encoder, method):
    base = tiny("qwen3")
    start = initial_vectors(base, method, BLOCK, "random", seed=3)
    t = Tuner(start, BLOCK, encoder, seed=5)
    for name, tensor in t.vectors().tensors().items():
        torch.testing.assert_close(tensor, start.tensors()[name], rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW(t.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in t.named_parameters()}
    for _ in range(2):  # the last layer starts at zero: the ones before it learn from the second step on
        step_gradients(base, [Batch(t, ROWS)])
        optimizer.step()
        optimizer.zero_grad()
    assert all((p - before[name]).abs().max() > 0 for name, p in t.named_parameters())


def test_only_the_vectors_have_gradients_and_the_base_keeps_its_bits():
    base = tiny("gpt2")
    before = base.checksum()
    step_gradients(base, [Batch(tuner(base, "prefix"), ROWS)])
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    assert base.checksum() == before


def test_checksum_sees_a_single_bit():
    base = tiny("llama", seed=7)
    before = base.checksum()
    weight = next(base.model.parameters())
    with torch.no_grad():
        weight.view(-1)[17] = torch.nextafter(weight.view(-1)[17], torch.tensor(9.0))
    assert base.checksum() != before


@pytest.mark.parametrize("kind", [SoftPrefix, SoftKV])
def test_prefix_methods_take_all_rows(kind):
    base = tiny("llama")
    t = tuner(base, "prefix" if kind is SoftPrefix else "kv")
    assert isinstance(t.vectors(), kind)
    assert t.vectors().num_vectors == BLOCK.num_soft
