"""Conformance: probes pass on the same base in any dtype and kernel, and fail on every real fault."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.conformance import TOLERANCES, divergence, judge, make_probes, replay
from foreword.core.forward import forward
from foreword.core.init import initial_vectors
from foreword.core.model import load_base
from foreword.errors import ArtefactCorrupt
from tests.bundled import BASE
from tests.tiny import NAMES, tiny

BLOCK = Block(((1,), 16))
TEXTS = [
    "I want my money back for the order of last week.",
    "Where is my parcel? It should have come on Monday.",
    "The agreement may be terminated by either party upon thirty days notice.",
    "How do I change the address of delivery",
    "It was a bright cold day in April.",
    "Please cancel my subscription.",
    "Nothing works.",
    "The manager of the project is in Paris and the deadline is in June.",
]


@pytest.fixture(scope="module")
def bases():
    return {
        (dtype, kernel): load_base(str(BASE), dtype=dtype, attention=kernel)
        for dtype in ("float32", "bfloat16")
        for kernel in ("sdpa", "eager")
    }


@pytest.fixture(scope="module")
def prefixes(bases):
    start = initial_vectors(
        bases["float32", "sdpa"], "prompt", BLOCK, "text:Give the intent of the customer in one word."
    )
    noise = torch.randn(start.vectors.shape, generator=torch.Generator().manual_seed(0))
    trained = dataclasses.replace(start, vectors=start.vectors + 0.5 * start.vectors.std() * noise)
    return {key: compile(base, trained) for key, base in bases.items()}


@pytest.fixture(scope="module")
def rows(bases):
    tokenizer = bases["float32", "sdpa"].tokenizer
    turns = [[{"role": "user", "content": text}] for text in TEXTS]
    return [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False)[1:] for t in turns]


@pytest.mark.parametrize("there", ["float32", "bfloat16"])
@pytest.mark.parametrize("here", ["float32", "bfloat16"])
def test_probes_hold_across_dtypes_and_kernels(there, here, bases, prefixes, rows):
    probes = make_probes(bases[there, "sdpa"], prefixes[there, "sdpa"], rows)
    for kernel in ("sdpa", "eager"):
        result = replay(bases[here, kernel], prefixes[here, kernel], probes)
        assert result.ok, result.message
        assert result.dtypes == (there, here)
        assert result.tolerance is TOLERANCES["bfloat16" if "bfloat16" in (there, here) else "float32"]
        assert "holds over 8 probes" in result.message
        assert f"{result.max_kl:.2g}" in result.message
        assert f"{result.mean_kl_allowed:.2g}" in result.message


def faults(base, prefix):
    zero = tuple(torch.zeros_like(value) for value in prefix.values)
    last = (*prefix.values[:-1], zero[-1])
    third = tuple(torch.zeros_like(key) if layer == 2 else key for layer, key in enumerate(prefix.keys))
    return {
        "no prefix": None,
        "another prompt": compile(base, initial_vectors(base, "prompt", BLOCK, "vocab", seed=3)),
        "a layer's keys lost": dataclasses.replace(prefix, keys=third),
        "the last layer's values lost": dataclasses.replace(prefix, values=last),
        "a vector lost": dataclasses.replace(
            prefix, keys=tuple(k[:, :-1] for k in prefix.keys), values=tuple(v[:, :-1] for v in prefix.values)
        ),
        "values in another order": dataclasses.replace(prefix, values=tuple(v.flip(1) for v in prefix.values)),
        "values lost": dataclasses.replace(prefix, values=zero),
        "NaN": dataclasses.replace(prefix, values=tuple(v * math.nan for v in prefix.values)),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_faults_fail(dtype, bases, prefixes, rows):
    base, prefix = bases[dtype, "sdpa"], prefixes[dtype, "sdpa"]
    probes = make_probes(base, prefix, rows)
    for name, faulty in faults(base, prefix).items():
        result = replay(base, faulty, probes)
        assert not result.ok, f"{name}: {result.message}"
        assert "FAILS" in result.message


def test_noise_below_the_coarser_dtype_shows_in_float32(bases, prefixes, rows):
    base, prefix = bases["float32", "sdpa"], prefixes["float32", "sdpa"]
    probes = make_probes(base, prefix, rows)
    generator = torch.Generator().manual_seed(1)
    noisy = tuple(key + 0.01 * key.std() * torch.randn(key.shape, generator=generator) for key in prefix.keys)
    assert not replay(base, dataclasses.replace(prefix, keys=noisy), probes).ok


@pytest.mark.parametrize("name", NAMES)
def test_probes_hold_on_every_architecture(name):
    base = tiny(name)
    prefix = compile(base, initial_vectors(base, "prompt", Block((5,)), "random"))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 90, (3 + i,), generator=generator).tolist() for i in range(10)]
    probes = make_probes(base, prefix, rows)
    result = replay(base, prefix, probes)
    assert result.ok, result.message
    assert result.max_kl < 1e-8
    other = compile(base, initial_vectors(base, "prompt", Block((5,)), "random", seed=1))
    assert not replay(base, other, probes).ok


def test_a_probe_is_json_and_holds_the_best_tokens(bases, prefixes, rows):
    base, prefix = bases["float32", "sdpa"], prefixes["float32", "sdpa"]
    probes = make_probes(base, prefix, rows[:2], top=4)
    assert json.loads(json.dumps(probes)) == list(probes)
    for row, probe in zip(rows, probes, strict=False):
        expected = torch.log_softmax(forward(base, [row], prefix)[0, -1].float(), dim=-1)
        assert probe["ids"] == row
        assert probe["top"] == expected.topk(4).indices.tolist()
        assert probe["logprobs"] == pytest.approx(expected.topk(4).values.tolist(), abs=3e-5)
        assert all(round(value, 5) == value for value in probe["logprobs"])
        assert probe["dtype"] == "float32"
    with pytest.raises(ValueError, match="at least one token"):
        make_probes(base, prefix, [[]])
    assert len(make_probes(tiny("llama"), None, [[3]], top=1000)[0]["top"]) == 97


def test_no_probes_object_to_nothing(bases, prefixes):
    result = replay(bases["float32", "sdpa"], prefixes["float32", "sdpa"], ())
    assert result.ok
    assert result.message == "no conformance probes: nothing was compared"


GOOD = {"ids": [5], "top": [7, 9], "logprobs": [-0.5, -2.0], "dtype": "float32"}


@pytest.mark.parametrize(
    "change",
    [
        {"ids": []},
        {"ids": [97]},
        {"ids": ["5"]},
        {"ids": 5},
        {"top": [7, 7]},
        {"top": [7, -1]},
        {"top": [7]},
        {"top": [], "logprobs": []},
        {"logprobs": [-0.5, math.nan]},
        {"logprobs": [-0.5, 3.0]},
        {"logprobs": ["a", "b"]},
        {"logprobs": None},
        {"dtype": 3},
    ],
)
def test_malformed_probes_are_refused(change):
    with pytest.raises(ArtefactCorrupt, match="probe is malformed"):
        replay(tiny("llama"), None, [GOOD | change])
    with pytest.raises(ArtefactCorrupt, match="probe is malformed"):
        replay(tiny("llama"), None, [{k: v for k, v in GOOD.items() if k not in change}])


def test_near_ties_are_no_disagreement():
    tied = {**GOOD, "top": [7, 9, 11], "logprobs": [-1.0, -1.0004, -1.2]}
    assert judge([tied], [{7: -1.0004, 9: -1.0, 11: -1.2}], "float32").num_agree == 1
    assert judge([tied], [{7: -1.0, 9: -1.0004, 11: -0.9}], "float32").num_agree == 0
    assert judge([tied], [{7: -1.0, 9: -1.0004, 11: -0.9}], "bfloat16").num_agree == 1
    assert judge([tied], [{7: -1.0, 9: -1.0004, 5: -0.9}], "float32").num_agree == 0
    assert judge([tied], [{7: -1.0, 9: -1.0004, 11: -1.2}], "float8_e4m3fn").tolerance is TOLERANCES["bfloat16"]


def test_a_server_that_knows_fewer_tokens_can_be_judged():
    result = judge([GOOD], [{7: -0.5}], "float32")
    assert result.ok
    assert result.max_kl == pytest.approx(0.0, abs=1e-12)
    assert not judge([GOOD], [{7: -0.6}], "float32").ok
    assert judge([GOOD], [{7: math.nan}], "float32").max_kl == math.inf


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-8, 8), min_size=6, max_size=6), st.lists(st.floats(-8, 8), min_size=6, max_size=6))
def test_bucketed_divergence_is_at_most_the_whole(one, other):
    """Merging tokens into a tail bucket can only lower KL (the data-processing inequality); equal gives zero."""
    p, q = (torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0) for logits in (one, other))
    whole = float((p.exp() * (p - q)).sum())
    best = p.topk(3).indices.tolist()
    bucketed = divergence({i: float(p[i]) for i in best}, {i: float(q[i]) for i in best})
    assert -1e-12 <= bucketed <= whole + 1e-4
    assert divergence({i: float(p[i]) for i in best}, {i: float(p[i]) for i in best}) == pytest.approx(0.0, abs=1e-12)
