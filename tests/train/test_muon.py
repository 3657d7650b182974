"""Orthonormal updates: equal singular values in every part, size as promised, exact when taken up again."""

import copy

import pytest
import torch

from foreword.train.muon import Muon, orthonormal


def matrix(rows=5, columns=40, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (1, 7), (6, 6)])
def test_all_directions_get_the_same_size(shape):
    made = orthonormal(matrix(*shape))
    singular = torch.linalg.svdvals(made)
    assert torch.allclose(singular, singular[:1].expand_as(singular), rtol=1e-3)
    assert made.square().mean().sqrt() == pytest.approx(1.0, rel=1e-3)


def test_it_is_the_polar_factor():
    update = matrix()
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    assert torch.allclose(orthonormal(update), left @ right * 40**0.5, atol=1e-3)


def test_rounding_is_not_turned_up():
    """A second direction a million times weaker than the first stays weak; a hundred times weaker is made equal."""
    first, second = torch.zeros(2, 8), torch.zeros(2, 8)
    first[0, 0], second[1, 1] = 1.0, 1.0
    weak, fair = (
        torch.linalg.svdvals(orthonormal(first + 1e-6 * second)),
        torch.linalg.svdvals(orthonormal(first + 1e-2 * second)),
    )
    assert weak[1] < 0.02 * weak[0]
    assert fair[1] > 0.99 * fair[0]


def test_nothing_moves_without_a_gradient():
    theta = torch.nn.Parameter(matrix())
    before = theta.detach().clone()
    theta.grad = torch.zeros_like(theta)
    Muon([theta], lr=1.0).step()
    assert torch.equal(theta, before)


def test_every_part_by_itself():
    gradient = matrix()
    gradient[:, 10:] *= 1e-3
    theta = torch.nn.Parameter(torch.zeros_like(gradient))
    theta.grad = gradient
    Muon([theta], lr=0.1, widths=(10, 30)).step()
    assert torch.allclose(theta[:, :10], -0.1 * orthonormal(gradient[:, :10]), atol=1e-6)
    assert torch.allclose(theta[:, 10:], -0.1 * orthonormal(gradient[:, 10:]), atol=1e-6)


def test_state_goes_through_a_state_dict():
    def steps(theta, optimizer, seeds):
        for seed in seeds:
            theta.grad = matrix(seed=seed)
            optimizer.step()

    whole = torch.nn.Parameter(matrix())
    one = Muon([whole], lr=0.1)
    steps(whole, one, (1, 2, 3, 4))
    half = torch.nn.Parameter(matrix())
    first = Muon([half], lr=0.1)
    steps(half, first, (1, 2))
    second = Muon([half], lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(half, second, (3, 4))
    assert torch.equal(whole, half)
