"""What is learned where: several answers of a conversation, a teacher's distribution, vectors that stay."""

import math

import pytest
import torch

from foreword.core.block import Block
from foreword.core.init import initial_vectors
from foreword.train.data import Example, SoftTargets
from foreword.train.loss import Batch, divergence, losses_at_targets, step_gradients
from foreword.train.tuners import ENCODERS, Tuner
from tests.tiny import tiny

BLOCK = Block(((1,), 4))
IDS = [5, 8, 13, 21, 34, 55, 2]


def tuner(base, method="kv", **options):
    return Tuner(initial_vectors(base, method, BLOCK, "random"), BLOCK, **options)


def loss_of(base, *rows):
    return step_gradients(base, [Batch(tuner(base), rows)])[0]


def test_a_span_that_is_the_answer_changes_nothing():
    base = tiny("qwen3")
    assert Example(IDS, 3, spans=((4, 7),)).learned == Example(IDS, 3).learned
    assert loss_of(base, Example(IDS, 3, spans=((4, 7),))) == loss_of(base, Example(IDS, 3))


def test_several_spans_are_the_mean_over_all_their_tokens():
    base = tiny("qwen3")
    both = loss_of(base, Example(IDS, 2, spans=((1, 3), (5, 7))))
    first, last = loss_of(base, Example(IDS[:3], 2)), loss_of(base, Example(IDS, 2))
    assert both == pytest.approx((first + last) / 2, rel=1e-6)


def test_a_teacher_that_names_every_token_gives_the_true_divergence():
    logits, other = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    teacher = SoftTargets(torch.arange(11).expand(5, -1), other.log_softmax(-1))
    true = torch.nn.functional.kl_div(logits.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="none")
    assert torch.allclose(divergence(logits, teacher), true.sum(-1), atol=1e-5)


def test_the_bucket_of_other_tokens_keeps_the_student_from_sharpening():
    """At the teacher's own distribution the divergence is 0 and so is its gradient, whatever k names."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).requires_grad_()
    top = logits.detach().log_softmax(-1).topk(5)
    lost = divergence(logits, SoftTargets(top.indices, top.values))
    lost.sum().backward()
    assert lost.abs().max() < 1e-6
    assert logits.grad.abs().max() < 1e-6
    with torch.no_grad():
        assert divergence(logits * 2, SoftTargets(top.indices, top.values)).min() > 0.01


def test_a_certain_teacher_is_cross_entropy():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(2))
    row = Example([4, 7, 9, 3], 3)
    certain = SoftTargets(torch.tensor([[7], [9], [3]]), torch.zeros(3, 1))
    found = losses_at_targets(logits, [Example(row.ids, 3, teacher=certain)])
    assert torch.allclose(found, losses_at_targets(logits, [row]), atol=1e-4)


def test_rows_with_and_without_a_teacher_share_a_pass():
    base = tiny("qwen3")
    teacher = SoftTargets(torch.tensor([[3, 4], [5, 6]]), torch.tensor([[0.5, 0.3], [0.2, 0.1]]).log())
    soft, hard = Example([9, 4, 2], 2, teacher=teacher), Example(IDS, 3)
    joint = [tuner(base), tuner(base)]
    losses = step_gradients(base, [Batch(joint[0], [soft, hard]), Batch(joint[1], [hard])])
    assert losses[0] == pytest.approx((2 * loss_of(base, soft) + 3 * loss_of(base, hard)) / 5, rel=1e-5)
    assert losses[1] == pytest.approx(loss_of(base, hard), rel=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
def test_frozen_vectors_stay_to_the_bit(method, encoder):
    base = tiny("qwen3")
    trained = tuner(base, method, encoder=encoder, num_frozen=1)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: tensor.detach().clone() for name, tensor in trained.vectors().tensors().items()}
    for _ in range(3):
        loss = step_gradients(base, [Batch(trained, [Example(IDS, 3)])])[0]
        assert math.isfinite(loss)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in trained.vectors().tensors().items():
        dim = {"prompt": 0}.get(method, 1)
        old, new = before[name], tensor.detach()
        assert torch.equal(old.narrow(dim, 0, 1), new.narrow(dim, 0, 1))
        assert not torch.equal(old.narrow(dim, 1, 3), new.narrow(dim, 1, 3))
