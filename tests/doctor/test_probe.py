"""Measurements: what is seen inside is what was there, tolerances rest on measured noise, nothing is left behind."""

import copy

import pytest
import torch
from torch import nn

from foreword.core.compile import compile
from foreword.core.forward import forward
from foreword.doctor.foreign import from_vectors
from foreword.doctor.probe import reference
from foreword.doctor.probe.attention import AttentionWatch
from foreword.doctor.probe.layers import find_layers, foreign_rows, layers_watched
from foreword.doctor.probe.logits import LENGTHS, ProbeFailed, divergences, padded, run_rows, text_rows
from foreword.doctor.probe.measurements import FLOORS, MATCH, Measurements
from foreword.doctor.probe.seen import relative_error
from foreword.doctor.probe.state import left_as_found, state_sha256
from tests.doctor.planted import NUM, cached, deep, embedded, made
from tests.tiny import NAMES, tiny


def front(rows, heads):
    rows = rows[0, :, :NUM]
    return rows[:: rows.shape[0] // heads]


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_seen_as_it_was_computed(name):
    base = tiny(name)
    prefix = compile(base, made(base, "prefix"))
    ids = torch.tensor(text_rows(base, [7]))
    with AttentionWatch() as watch:
        watched = forward(base, ids, prefix)
    assert torch.equal(watched, forward(base, ids, prefix))
    assert len(watch.calls) == base.spec.num_layers
    for call, key, value in zip(watch.calls, prefix.keys, prefix.values, strict=True):
        assert (call.num_queries, call.num_keys) == (7, 7 + NUM)
        assert torch.equal(front(call.keys, len(key)), key)
        assert torch.equal(front(call.values, len(value)), value)
        torch.testing.assert_close(call.weights.sum(-1), torch.ones_like(call.weights[..., 0]))
        assert call.visible[0].tolist() == [[column <= NUM + query for column in range(7 + NUM)] for query in range(7)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3"])
def test_eager_and_fused_attention_are_seen_alike(name):
    base = tiny(name)
    prefix, ids = compile(base, made(base, "kv")), torch.tensor(text_rows(base, [7]))
    other = copy.deepcopy(base.model)
    other.set_attn_implementation("eager" if base.model.config._attn_implementation == "sdpa" else "sdpa")
    seen = []
    for model in (base.model, other):
        with torch.no_grad(), AttentionWatch() as watch:
            model(input_ids=ids, past_key_values=prefix.cache(), position_ids=NUM + torch.arange(7)[None])
        seen.append(watch.calls)
    for one, two in zip(*seen, strict=True):
        torch.testing.assert_close(one.weights, two.weights, rtol=1e-4, atol=1e-5)
        assert torch.equal(one.visible, two.visible)


def test_dropout_can_be_left_out_without_a_change_of_any_module():
    base = tiny("gpt2")
    model = copy.deepcopy(base.model).train()
    ids = torch.tensor(text_rows(base, [7]))
    with torch.no_grad():
        with AttentionWatch(dropout=False):
            quiet = model(input_ids=ids).logits
        noisy = model(input_ids=ids).logits
    torch.testing.assert_close(quiet, base.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert model.training
    assert float((noisy - quiet).abs().max()) > 0.01


def test_layers_show_lengths_and_rows_from_outside():
    base = tiny("llama")
    vectors = made(base, "prefix")
    for keep, lengths in ((False, [12, 12, 12]), (True, [12, 17, 22])):
        module = deep(base, vectors, keep_outputs=keep).model
        layers = find_layers(module, 3)
        assert layers == list(base.layers)
        with torch.no_grad(), layers_watched(layers) as passes:
            module(torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), torch.ones(1, 7, dtype=torch.long))
        assert [one.inputs.shape[1] for one in passes] == lengths
        for rows, own in zip(foreign_rows(passes), vectors.vectors[1:], strict=True):
            assert torch.equal(rows, own)
    assert not any("forward" in vars(layer) for layer in base.layers)


def test_rows_that_a_hook_puts_in_during_the_forward_are_seen():
    base = tiny("gpt2")
    vectors = made(base, "prefix")
    with torch.no_grad(), layers_watched(base.layers) as passes:
        compile(base, vectors)
    assert [rows.shape[0] for rows in foreign_rows(passes)] == [NUM, NUM]
    assert torch.equal(passes[0].inputs[0], vectors.vectors[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_right_and_wrong_rows_lie_far_on_both_sides_of_the_limit(name, dtype):
    base = tiny(name, dtype)
    good = Measurements(embedded(base, made(base, "prompt")))
    errors = [error for error in (*good.key_errors, *good.value_errors) if error is not None]
    assert len(errors) == 6
    assert max(errors) < MATCH[dtype] / 3
    vectors = made(base, "prefix")
    tied = cached(base, vectors, prefix=compile(base, reference.tied(vectors, 0)))
    assert min(Measurements(tied).value_errors[1:]) > 5 * MATCH[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_limits_hold_on_every_architecture(name, dtype):
    base = tiny(name, dtype)
    found = Measurements(embedded(base, made(base, "prompt")))
    errors = [error for error in (*found.key_errors, *found.value_errors) if error is not None]
    assert max(errors) < MATCH[dtype]
    assert float(found.difference.max()) <= found.tolerance.max_kl
    assert found.tolerance.max_kl >= FLOORS[dtype]
    other = made(base, "prompt", seed=1)
    wrong = [relative_error(b, a) for a, b in zip(found.prefix.values, compile(base, other).values, strict=True)]
    assert min(wrong) > 4 * MATCH[dtype]


@pytest.mark.parametrize("start", [0, 3, NUM])
def test_the_texts_position_is_read_from_its_keys(start):
    for name in ("llama", "gpt2"):
        base = tiny(name)
        assert Measurements(cached(base, made(base, "kv"), start=start)).text_start[0] == start
    alibi = tiny("bloom")
    assert Measurements(cached(alibi, made(alibi, "kv"))).text_start is None


def test_rounding_noise_is_of_the_order_of_another_kernel():
    """SDPA against eager attention in bfloat16; the tolerance is six times the noise."""
    from foreword.core.model import load_base
    from tests.bundled import BASE

    bases = [load_base(str(BASE), dtype="bfloat16", attention=kind) for kind in ("eager", "sdpa")]
    rows = text_rows(bases[0], LENGTHS)
    prefix = [compile(base, made(base, "prompt")) for base in bases]
    logits = [reference.reference_logits(base, rows, one) for base, one in zip(bases, prefix, strict=True)]
    kernel = max(float(divergences(a, b).max()) for a, b in zip(*logits, strict=True))
    shaken = reference.rounding_noise(bases[0], rows, prefix[0])
    noise = max(float(divergences(a, b).max()) for a, b in zip(logits[0], shaken, strict=True))
    assert noise / 10 < kernel < 4 * noise


def test_hypotheses_are_what_the_faults_compute():
    base = tiny("llama")
    vectors = made(base, "prefix")
    row, prefix = text_rows(base, [9])[0], compile(base, vectors)
    found = {}
    for guess in reference.hypotheses(base, vectors, prefix):
        found.setdefault(guess.fault, []).append(guess)
    assert set(found) == {
        "mask-blind", "embeddings-only", "layers-tied", "layers-dropped", "positions-unshifted", "keys-misrotated",
    }  # fmt: skip
    ids, mask = torch.tensor([row]), torch.ones(1, 9, dtype=torch.long)
    once = deep(base, vectors, sites=[0]).forward(ids, mask)[0].detach()
    single_site = reference.logits_at(base, row, found["embeddings-only"][1].prefix, NUM)
    assert float(divergences(single_site, once).max()) < 1e-9
    twice = reference.rotated(base, reference.rotated(base, prefix, -1), 1)
    assert max(relative_error(a, b) for a, b in zip(twice.keys, prefix.keys, strict=True)) < 1e-5
    assert all(
        torch.equal(a[:, 0], b[:, 0]) for a, b in zip(reference.rotated(base, prefix, 1).keys, prefix.keys, strict=True)
    )
    assert reference.rotated(tiny("gpt2"), compile(tiny("gpt2"), made(tiny("gpt2"), "kv")), 1) is None


def test_rows_are_padded_and_read_back_at_either_side():
    base = tiny("llama")
    subject = cached(base, made(base, "kv"))
    rows = text_rows(base, [6, 3])
    assert padded(base, rows, "left")[1].tolist() == [[1] * 6, [0] * 3 + [1] * 3]
    alone = run_rows(subject.forward, base, [rows[1]])[0][0]
    for side in ("left", "right"):
        torch.testing.assert_close(run_rows(subject.forward, base, rows, side)[0][1], alone, rtol=1e-4, atol=1e-4)


def test_what_a_forward_returns_or_raises_is_told():
    base = tiny("llama")
    with pytest.raises(ProbeFailed, match=r"forward raised ZeroDivisionError on one row of 3 tokens: division"):
        run_rows(lambda ids, mask: 1 / 0, base, [[5, 6, 7]])
    with pytest.raises(ProbeFailed, match=r"returned \[1, 2, 97\] for ids of \[1, 3\]"):
        run_rows(lambda ids, mask: torch.zeros(1, 2, 97), base, [[5, 6, 7]])
    with pytest.raises(ProbeFailed, match="returned list"):
        run_rows(lambda ids, mask: [], base, [[5, 6, 7]])


def test_divergence_is_zero_for_equals_and_infinite_for_nan():
    logits = torch.randn(4, 9)
    assert float(divergences(logits, logits + 3).max()) < 1e-6
    assert bool(divergences(logits, torch.full_like(logits, float("nan"))).isinf().all())


class Careless(nn.Module):
    """Moves everything that a probe could move."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(2))
        self.config = type("Config", (), {})()
        self.config.use_cache = True


def spoil(model):
    model.train(not model.training)
    model.linear.requires_grad_(False)
    model.linear.weight.grad = torch.ones(3, 3)
    model.linear.register_forward_hook(lambda *_: None)
    model.count += 1
    model.config.use_cache = False
    model.config.extra = 1
    model.linear.forward = lambda x: x
    torch.rand(3)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back_also_after_an_exception(fails):
    model = Careless()
    before = state_sha256([model])
    repr_before = vars(model.config).copy()
    try:
        with left_as_found([model]):
            spoil(model)
            assert state_sha256([model]) != before
            if fails:
                raise RuntimeError("a probe failed")
    except RuntimeError:
        assert fails
    assert state_sha256([model]) == before
    assert vars(model.config) == repr_before
    assert "forward" not in vars(model.linear)
    assert model.count.tolist() == [0, 0]


def test_without_its_model_a_black_box_is_still_seen():
    import dataclasses

    base = tiny("llama")
    box = dataclasses.replace(from_vectors(base, made(base, "kv")), model=None, vectors=None)
    found = Measurements(box)
    assert [seen.extra for seen in found.seen] == [NUM] * 3
    assert found.passes == []
