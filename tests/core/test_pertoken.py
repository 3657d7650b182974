"""Modules that skip rows: found where they are, and without a trace in logits and gradients."""

import pytest
import torch

from tests.tiny import NAMES, tiny


@pytest.mark.parametrize("name", NAMES)
def test_only_what_no_other_place_reads_may_skip(name):
    """Every family has an output projection and a feed-forward to skip; keys and values never are."""
    found = set(tiny(name).per_token)
    assert len(found) >= 2
    assert not any(part in module for module in found for part in ("k_proj", "v_proj", "qkv", "c_attn", "query_key"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3-moe", "bloom", "phi3"])
def test_logits_and_gradients_stay(name):
    base = tiny(name)
    rows = torch.tensor([4, 9, 13])
    results = []
    for lean in (False, True):
        from transformers import DynamicCache

        embeds = base.embed(torch.arange(3, 17).view(2, 7)).detach().requires_grad_()
        positions = torch.arange(7).expand(2, -1)
        arguments = {"positions": positions, "cache": DynamicCache(), "mask": torch.ones_like(positions)}
        if lean:
            with base.computed_only_at([-1], rows):
                logits = base.run(embeds=embeds, select=rows, **arguments)
        else:
            logits = base.run(embeds=embeds, select=rows, **arguments)
        logits.float().square().sum().backward()
        results.append((logits.detach(), embeds.grad))
    torch.testing.assert_close(*[logits for logits, _ in results], rtol=1e-4, atol=1e-5)
    assert (results[0][1] - results[1][1]).norm() < 1e-4 * results[0][1].norm()


def test_the_rows_left_out_are_not_computed():
    base, seen = tiny("llama"), []
    _ = base.per_token
    handle = base.layers[-1].mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    from transformers import DynamicCache

    ids = torch.arange(3, 17).view(2, 7)
    positions = torch.arange(7).expand(2, -1)
    rows = torch.tensor([4, 9, 13])
    with base.computed_only_at([-1], rows):
        base.run(ids=ids, select=rows, positions=positions, cache=DynamicCache(), mask=torch.ones_like(ids))
    handle.remove()
    assert seen == [torch.Size([1, 3, 64])]
