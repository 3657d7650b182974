"""The prefix mass: against values probed under the base's own attention, against q and k, and what is left behind."""

import math

import pytest
import torch
import transformers as tf
from torch import nn

from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.forward import forward_rows
from foreword.core.mass import attention_share, eager_attention, prefix_mass, watch_attention
from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix, SoftPrompt
from foreword.errors import IncompatibleModel
from tests.tiny import COMMON, NAMES, tiny

ROWS = [[5, 6, 7, 8, 9], [11, 12, 13], list(range(20, 34))]
BLOCK = Block(((1, 3), 4, (17,)))


def make_prefix(base):
    torch.manual_seed(1)
    scale = float(base.embedding.weight.std())
    return compile(base, SoftPrompt(torch.randn(4, base.spec.embed_size) * scale, BLOCK))


def sinks():
    """A model with a learned sink in every softmax, and a window in every other layer."""
    torch.manual_seed(3)
    small = {k: v for k, v in COMMON.items() if k != "intermediate_size"}
    config = tf.GptOssConfig(
        **small, intermediate_size=32, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=12
    )
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([0.5, -1.0, 2.0, 1.0]))
    return FrozenModel(model)


def probed_mass(base, row, prefix, columns, layer):
    """The mass on `columns` [H, T] without attention weights: add 1 to the values there and see the output move.

    The heads' outputs are linear in the values, and they are what the attention's last projection reads. Runs under
    whatever attention implementation the base uses.
    """
    attention = next(m for m in base.layers[layer].modules() if "attention" in type(m).__name__.lower())
    inputs = []

    def run(values):
        changed = KVPrefix(prefix.keys, values, "")
        seen = []
        leaves = [m for m in attention.modules() if not list(m.children()) and getattr(m, "weight", None) is not None]
        leaves = [m for m in leaves if m.weight.ndim == 2]
        handles = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for m in leaves]
        try:
            with torch.no_grad():
                forward_rows(base, [row], [changed])
        finally:
            for handle in handles:
                handle.remove()
        inputs.append(seen[-1].reshape(len(row), -1, prefix.values[layer].shape[-1]))

    run(prefix.values)
    moved = [value.clone() for value in prefix.values]
    moved[layer][:, columns] += 1.0
    run(tuple(moved))
    return (inputs[1] - inputs[0]).mean(-1).T


@pytest.mark.parametrize("name", [*NAMES, "sinks"])
def test_mass_is_what_moves_the_output(name):
    base = sinks() if name == "sinks" else tiny(name)
    prefix = make_prefix(base)
    mass = prefix_mass(base, ROWS, prefix)
    for layer in range(base.spec.num_layers):
        for index, row in enumerate(ROWS):
            for columns, found in (([2, 3, 4, 5], mass.soft), ([0, 1, 6], mass.literal)):
                expected = probed_mass(base, row, prefix, columns, layer)
                torch.testing.assert_close(found[layer][:, index, : len(row)], expected, atol=3e-5, rtol=1e-4)
    whole = torch.stack(mass.soft)
    assert 0.01 < whole.nanmean() < 0.99, "the probe would not see a mass that is nowhere"


@pytest.mark.parametrize("name", NAMES)
def test_shares_sum_to_one_and_padding_is_masked(name):
    base = tiny(name)
    mass = prefix_mass(base, ROWS, make_prefix(base))
    for layer, (prefix, text, sink) in enumerate(zip(mass.prefix, mass.text, mass.sink, strict=True)):
        assert prefix.shape == (text.shape[0], 3, 14)
        for index, row in enumerate(ROWS):
            real = (prefix + text)[:, index, : len(row)]
            torch.testing.assert_close(real, torch.ones_like(real), atol=1e-5, rtol=0)
            assert text[:, index, len(row) :].isnan().all()
        assert sink.nan_to_num().abs().max() < 1e-5
        total = torch.cat([prefix[:, i, : len(row)] for i, row in enumerate(ROWS)], dim=1).mean(1)
        torch.testing.assert_close(mass.by_position[layer].sum(1), total, atol=1e-5, rtol=0)


def test_a_learned_sink_takes_its_share():
    base = sinks()
    mass = prefix_mass(base, ROWS, make_prefix(base))
    shares = mass.sink[0].nanmean((1, 2))
    assert shares[2] > shares[3] > shares[0] > shares[1] > 0.01


def test_a_row_is_the_same_alone_and_in_parts_of_a_batch():
    base = tiny("llama")
    prefix = make_prefix(base)
    rows = [[5 + i, 6, 7, *range(10, 10 + i)] for i in range(11)]
    mass = prefix_mass(base, rows, prefix)
    for index in (0, 10):
        alone = prefix_mass(base, rows[index : index + 1], prefix)
        for found, expected in zip(mass.soft, alone.soft, strict=True):
            torch.testing.assert_close(found[:, index, : len(rows[index])], expected[:, 0], atol=1e-6, rtol=0)


def llama_scores(base, layer, hidden, prefix, num):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention = base.layers[layer].self_attn
    rows, length = hidden.shape[:2]
    query = attention.q_proj(hidden).view(rows, length, 4, -1).transpose(1, 2)
    key = attention.k_proj(hidden).view(rows, length, 2, -1).transpose(1, 2)
    positions = torch.arange(num, num + length)[None]
    query, key = apply_rotary_pos_emb(query, key, *base.decoder.rotary_emb(hidden, positions))
    key = torch.cat([prefix.keys[layer][None], key], dim=2).repeat_interleave(2, dim=1)
    return query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])


def gpt2_scores(base, layer, hidden, prefix, num):
    query, key, _ = base.layers[layer].attn.c_attn(hidden).split(64, dim=2)
    query, key = (x.view(*x.shape[:2], 4, 16).transpose(1, 2) for x in (query, key))
    key = torch.cat([prefix.keys[layer][None], key], dim=2)
    return query @ key.transpose(2, 3) / 4.0


@pytest.mark.parametrize(("name", "scores_of"), [("llama", llama_scores), ("gpt2", gpt2_scores)])
def test_mass_is_the_softmax_over_recomputed_queries_and_keys(name, scores_of):
    base = tiny(name)
    prefix, row = make_prefix(base), ROWS[2]
    num = prefix.num_positions
    inputs = []
    attention = "self_attn" if name == "llama" else "attn"

    def keep(module, args, kwargs):
        inputs.append(args[0] if args else kwargs["hidden_states"])

    handles = [getattr(m, attention).register_forward_pre_hook(keep, with_kwargs=True) for m in base.layers]
    with torch.no_grad():
        forward_rows(base, [row], [prefix])
    for handle in handles:
        handle.remove()
    mass = prefix_mass(base, [row], prefix)
    for layer, hidden in enumerate(inputs):
        scores = scores_of(base, layer, hidden, prefix, num)[0]
        seen = torch.arange(num + len(row)) <= num + torch.arange(len(row))[:, None]
        exponents = scores.masked_fill(~seen, float("-inf")).exp()
        expected = exponents[..., :num].sum(-1) / exponents.sum(-1)
        torch.testing.assert_close(mass.prefix[layer][:, 0], expected, atol=1e-5, rtol=1e-4)


def test_a_window_hides_the_prefix_from_far_tokens():
    base = tiny("mistral-window")
    row = [7 + i % 60 for i in range(40)]
    mass = prefix_mass(base, [row], make_prefix(base))
    for soft, prefix in zip(mass.soft, mass.prefix, strict=True):
        assert (soft[:, 0, :18] > 0).all()  # 24 keys: itself and 23 before; the last vector stands 2 before the text
        assert prefix[:, 0, 23:].abs().max() == 0.0
    assert mass.soft[0][0, 0, 23 - 2] > 0.0
    assert mass.soft[0][:, 0, 22].abs().max() == 0.0


def test_the_share_of_somebody_elses_model():
    base = tiny("qwen3")
    prefix = make_prefix(base)
    ids = torch.tensor([ROWS[0]])
    mask = torch.ones(1, prefix.num_positions + ids.shape[1], dtype=torch.long)
    found = attention_share(
        nn.Sequential(base.model),
        lambda: base.model(input_ids=ids, attention_mask=mask, past_key_values=prefix.cache()),
        slice(0, prefix.num_positions),
    )
    mass = prefix_mass(base, ROWS[:1], prefix)
    for share, expected in zip(found, mass.prefix, strict=True):
        torch.testing.assert_close(share[0], expected[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon", "gemma2"])
def test_the_base_is_left_as_it_was(name):
    base = tiny(name)
    prefix = make_prefix(base)
    before, kind = base.checksum(), base.config._attn_implementation
    hooks = {key: len(module._forward_hooks) for key, module in base.model.named_modules()}
    prefix_mass(base, ROWS, prefix)
    with pytest.raises(ZeroDivisionError):
        watch_attention(base.model, lambda: 1 / 0, lambda weights: weights)
    assert base.config._attn_implementation == base.model.config._attn_implementation == kind
    assert {key: len(module._forward_hooks) for key, module in base.model.named_modules()} == hooks
    assert base.checksum() == before
    with eager_attention(base.model):
        assert base.config._attn_implementation == "eager"


def test_a_base_that_eager_attention_changes_is_refused(monkeypatch):
    base = tiny("falcon-alibi")
    monkeypatch.setattr("foreword.core.mass._alibi_once", lambda module, args, kwargs: (args, kwargs))
    with pytest.raises(IncompatibleModel, match="falcon computes something else under eager attention than under sdpa"):
        prefix_mass(base, ROWS, make_prefix(base))


def test_what_cannot_be_measured_is_said():
    base = tiny("llama")
    prefix = make_prefix(base)
    with pytest.raises(ValueError, match="at least one token"):
        prefix_mass(base, [[5], []], prefix)
    with pytest.raises(IncompatibleModel, match="no attention weights were seen in Linear, 0 attention modules"):
        watch_attention(nn.Linear(2, 2), lambda: None, lambda weights: weights)
