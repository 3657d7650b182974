"""Checks of implementations: a planted fault is the first finding, healthy systems give none, nothing is changed."""

import copy
import dataclasses

import pytest
import torch

from foreword.core.compile import compile
from foreword.core.conformance import make_probes
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrefix
from foreword.doctor.diagnose import diagnose
from foreword.doctor.foreign import from_hf, from_vectors
from foreword.doctor.probe import reference
from foreword.doctor.probe.state import state_sha256, tensors_sha256
from tests.doctor.planted import (
    NUM,
    cached,
    conversing,
    deep,
    embedded,
    evicting,
    generating,
    made,
    rounded,
    training,
    zeroed,
)
from tests.tiny import NAMES, tiny


def one_for_all(base):
    return reference.tied(made(base, "prefix"), 0)


def misrotated(base, sign):
    vectors = made(base, "kv")
    return cached(base, vectors, prefix=reference.rotated(base, compile(base, vectors), sign))


def rotated_in_the_file(base):
    """The stored keys are rotated twice; the implementation uses them as stored, the probes come from training."""
    vectors = made(base, "kv")
    prefix = compile(base, vectors)
    probes = make_probes(base, prefix, [[5, 6, 7], [8, 9, 10, 11], [12, 13]])
    keys = reference.rotated(base, prefix, 1).keys
    return dataclasses.replace(from_vectors(base, SoftKV(keys, vectors.values, vectors.block)), probes=probes)


def with_dropout(base):
    own = FrozenModel(copy.deepcopy(base.model))
    for module in own.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    own.model.model.layers[1].register_forward_hook(
        lambda module, args, out: torch.nn.functional.dropout(out, 0.05, training=True)
    )
    return dataclasses.replace(cached(own, made(own, "kv")), base=base)


def drifting(base):
    """A forward that writes into the base."""
    own = FrozenModel(copy.deepcopy(base.model))
    whole = cached(own, made(own, "kv"))

    def forward(ids, mask):
        with torch.no_grad():
            own.embedding.weight[90, 0] += 0.1
        return whole.forward(ids, mask)

    return dataclasses.replace(whole, forward=forward)


def revised(base, noise):
    """The model is another revision of the base, or the base with weights of 8 bits."""
    own = FrozenModel(copy.deepcopy(base.model))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in own.model.parameters():
            if parameter.ndim > 1 and noise:
                parameter.add_(noise * parameter.std() * torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim > 1:
                step = (parameter.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-9)
                parameter.copy_((parameter / step).round() * step)
    return dataclasses.replace(cached(own, made(base, "prompt")), base=base)


def one_number(base, value):
    vectors = made(base, "prefix")
    rows = vectors.vectors.clone()
    rows[1, 2, 3] = value
    return cached(base, SoftPrefix(rows, vectors.block))


def of_query_heads(base):
    """Keys and values for H heads of Dh/2 instead of Hkv of Dh, reshaped in silence."""
    right = made(base, "kv")
    wrong = [tuple(t.reshape(4, NUM, 8) for t in kind) for kind in (right.keys, right.values)]
    return dataclasses.replace(cached(base, right), vectors=SoftKV(*wrong, right.block))


ANYWHERE = {
    "mask-blind": lambda base: cached(base, made(base, "prefix"), seen=0),
    "positions-unshifted": lambda base: cached(base, made(base, "kv"), start=0),
    "positions-unshifted:2": lambda base: cached(base, made(base, "prompt"), start=2),
    "padding-between": lambda base: embedded(base, made(base, "prompt"), pads_between=True),
    "right-padded-generation": lambda base: generating(base, made(base, "prefix"), read_last=True),
    "logits-uncut": lambda base: embedded(base, made(base, "prompt"), cut=False),
    "layers-tied": lambda base: cached(base, made(base, "prefix"), prefix=compile(base, one_for_all(base))),
    "layers-tied:stored": lambda base: from_vectors(base, one_for_all(base)),
    "embeddings-only": lambda base: embedded(base, made(base, "prompt"), declared="prefix"),
    "checkpointing-drops-prefix": lambda base: training(base, made(base, "kv"), how="drops"),
    "checkpointing-drops-prefix:size": lambda base: training(base, made(base, "kv"), how="raises"),
    "wrong-shape": of_query_heads,
    "window-eviction": lambda base: evicting(base, made(base, "kv"), 14),
    "layers-dropped": lambda base: cached(
        base, made(base, "kv"), prefix=zeroed(compile(base, made(base, "kv")), [2])
    ),
    "injected-again": lambda base: generating(base, made(base, "prefix"), again=True),
    "injected-again:lost": lambda base: generating(base, made(base, "prefix"), lose=True),
    "injected-again:turn": lambda base: conversing(base, made(base, "kv"), second="again"),
    "injected-again:turn-lost": lambda base: conversing(base, made(base, "kv"), second="unadapted"),
    "injected-again:turn-fails": lambda base: conversing(base, made(base, "kv"), second="raises"),
    "injected-again:state": lambda base: cached(
        base, made(base, "kv"), keep=compile(base, made(base, "kv")).cache(1)
    ),
    "base-trainable": drifting,
    "other-base": lambda base: revised(base, 0.05),
    "numerics:8-bit": lambda base: revised(base, 0.0),
    "not-finite": lambda base: one_number(base, float("nan")),
    "not-finite:huge": lambda base: cached(base, SoftPrefix(1e5 * made(base, "prefix").vectors)),
    "numerics": lambda base: cached(
        base, made(base, "kv"), prefix=rounded(compile(base, made(base, "kv")), torch.float8_e4m3fn)
    ),
}  # fmt: skip
ROTARY = {
    "outputs-kept": lambda base: deep(base, made(base, "prefix"), keep_outputs=True),
    "embeddings-only:flows": lambda base: deep(base, made(base, "prefix"), sites=[0]),
    "layers-dropped:flows": lambda base: deep(base, made(base, "prefix"), sites=[0, 1]),
    "layers-tied:seen": lambda base: dataclasses.replace(deep(base, one_for_all(base)), vectors=None),
    "keys-misrotated": lambda base: misrotated(base, 1),
    "keys-misrotated:not": lambda base: misrotated(base, -1),
    "keys-misrotated:file": rotated_in_the_file,
    "nondeterminism": with_dropout,
}
FIRST = {"mask-blind", "padding-between", "layers-tied", "embeddings-only", "not-finite", "injected-again"}
"""What is planted where positions are learned."""


def check_found(made_by, name, base):
    subject = made_by(base)
    before = state_sha256([subject.model, base.model])
    diagnosis = diagnose(subject)
    assert diagnosis.first is not None, [finding.measured for finding in diagnosis.findings]
    assert diagnosis.first.fault == name.split(":")[0], (diagnosis.first.check, diagnosis.first.measured)
    assert diagnosis.first.measured
    assert diagnosis.first.fix
    if not name.startswith("base-trainable"):
        assert state_sha256([subject.model, base.model]) == before


ELSEWHERE = [
    pytest.param(
        arch, dtype, marks=[] if (arch, dtype) in {("gemma3", "float32"), ("bloom", "bfloat16")} else pytest.mark.lab
    )
    for arch in ("gpt2", "qwen3", "mistral", "gemma3", "gpt-neox", "falcon", "bloom")
    for dtype in ("float32", "bfloat16")
]


def quick(names):
    """All faults once in the quick run, their variants in the slow one."""
    return [pytest.param(name, marks=[pytest.mark.slow] if ":" in name else []) for name in names]


@pytest.mark.parametrize("name", quick(ANYWHERE | ROTARY))
def test_a_planted_fault_is_the_first_finding(name):
    check_found((ANYWHERE | ROTARY)[name], name, tiny("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIRST))
def test_a_planted_fault_is_the_first_finding_with_learned_positions(name):
    check_found(ANYWHERE[name], name, tiny("gpt2"))


@pytest.mark.slow
@pytest.mark.parametrize("arch,dtype", ELSEWHERE)
@pytest.mark.parametrize("name", [name for name in ANYWHERE if name != "wrong-shape"])
def test_faults_are_found_on_other_architectures_and_dtypes(name, arch, dtype):
    fault = name.split(":")[0]
    if arch == "bloom" and fault in ("positions-unshifted", "padding-between"):
        pytest.skip("it counts positions from the mask: the fault cannot be planted so")
    if arch == "bloom" and fault == "window-eviction":
        pytest.skip("its mask is not additive: the fault cannot be planted so")
    if dtype == "bfloat16" and fault == "numerics":
        pytest.skip("8 bits round nearly as bfloat16 does")
    check_found(ANYWHERE[name], name, tiny(arch, dtype))


@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_healthy_systems_give_no_finding(name, method):
    assert_healthy(from_vectors(tiny(name), made(tiny(name), method)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
@pytest.mark.parametrize("name", NAMES)
def test_healthy_systems_of_every_architecture_give_no_finding(name, method, dtype):
    base = tiny(name, dtype)
    vectors = made(base, method)
    assert_healthy(from_vectors(base, vectors))
    assert_healthy(training(base, vectors, how="right"))
    assert_healthy(cached(base, vectors))
    assert_healthy(dataclasses.replace(cached(base, vectors), model=None))
    assert_healthy(dataclasses.replace(cached(base, vectors), vectors=None))
    if method == "prompt":
        assert_healthy(embedded(base, vectors))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "smollm3"])
def test_a_healthy_layer_by_layer_prefix_gives_no_finding(name, dtype):
    base = tiny(name, dtype)
    assert_healthy(deep(base, made(base, "prefix")))


def assert_healthy(subject):
    before = state_sha256([subject.model, subject.base.model])
    diagnosis = diagnose(subject)
    assert diagnosis.ok, (diagnosis.first.check, diagnosis.first.measured)
    assert sum(not finding.skipped for finding in diagnosis.findings) >= 11
    assert state_sha256([subject.model, subject.base.model]) == before


def test_two_faults_at_once_are_both_shown_and_the_second_stays_after_the_first_cure():
    base = tiny("llama")
    both = diagnose(deep(base, one_for_all(base), keep_outputs=True))
    assert both.faults[:2] == ("outputs-kept", "layers-tied")
    assert diagnose(deep(base, one_for_all(base))).faults == ("layers-tied",)
    assert diagnose(deep(base, made(base, "prefix"))).ok


def test_the_measurements_are_the_proof():
    base = tiny("llama")
    kept = diagnose(deep(base, made(base, "prefix"), keep_outputs=True)).first
    assert kept.numbers["lengths"] == [16, 21, 26]
    assert "16, 21, 26" in kept.measured
    assert kept.expected.startswith("16 in every layer")
    blind = diagnose(cached(base, made(base, "kv"), seen=0)).first
    assert "prefix mass by layer 0, 0, 0" in blind.measured
    assert blind.numbers["max_kl"] < 1e-9
    moved = diagnose(cached(base, made(base, "kv"), start=2)).first
    assert "position 2" in moved.measured
    assert moved.expected == "a text that starts at position 5"


def test_no_effect_is_told_apart_by_what_stands_in_the_sequence():
    """The mask hides vectors that are there; a forward that never loaded them has no such keys."""
    base = tiny("llama")
    vectors = made(base, "kv")
    absent = dataclasses.replace(
        cached(base, vectors), forward=lambda ids, mask: base.model(input_ids=ids, attention_mask=mask).logits
    )
    assert diagnose(cached(base, vectors, seen=0)).first.fault == "mask-blind"
    lost = diagnose(absent).first
    assert lost.fault == "layers-dropped"
    assert "no layer has any key beside the text's own" in lost.measured


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lambda base: cached(base, made(base, "prefix"), seen=0), "mask-blind"),
        (lambda base: cached(base, made(base, "prefix"), start=0), "positions-unshifted"),
        (lambda base: deep(base, made(base, "prefix"), keep_outputs=True), "outputs-kept"),
        (lambda base: embedded(base, made(base, "prompt"), pads_between=True), "padding-between"),
    ],
)
def test_black_boxes_without_vectors_or_model_are_judged_by_what_they_show(given, expected):
    box = dataclasses.replace(given(tiny("llama")), model=None, vectors=None)
    diagnosis = diagnose(box)
    assert diagnosis.first.fault == expected
    needs = {finding.check: finding.measured for finding in diagnosis.findings if finding.skipped}
    assert needs["conformance"] == "not made: it needs `vectors` as SoftPrompt, SoftPrefix or SoftKV"
    assert needs["turns"] == "not made: it needs `turns`"


def test_windows_that_cannot_hold_or_hardly_pass_on_the_vectors_are_told():
    import transformers as tf
    from transformers import AutoModelForCausalLM

    from tests.tiny import COMMON

    torch.manual_seed(0)
    for window, fault, said in ((8, "window-eviction", "reach the first 16 text tokens"), (5, "window-eviction", "5")):
        config = tf.MistralConfig(**COMMON, sliding_window=window)
        base = FrozenModel(AutoModelForCausalLM.from_config(config))
        vectors = made(tiny("mistral"), "kv")
        subject = dataclasses.replace(cached(tiny("mistral"), vectors), base=base, model=base.model)
        if window == 8:
            subject = from_vectors(base, vectors)
        diagnosis = diagnose(subject)
        assert diagnosis.first.fault == fault
        assert said in diagnosis.first.measured


def test_a_forward_that_fails_is_said_and_the_other_checks_go_on():
    base = tiny("llama")
    broken = dataclasses.replace(cached(base, made(base, "kv")), forward=lambda ids, mask: 1 / 0)
    before = state_sha256([base.model])
    diagnosis = diagnose(broken)
    assert diagnosis.first.check == "forward"
    assert "ZeroDivisionError on one row of 11 tokens" in diagnosis.first.measured
    assert {finding.check for finding in diagnosis.findings if not finding.skipped} >= {"shapes", "forward"}
    assert all("ZeroDivisionError" in finding.measured for finding in diagnosis.findings if finding.check == "padding")
    assert state_sha256([base.model]) == before


def test_parameters_that_ask_for_gradients_are_a_note_only():
    base = tiny("qwen2")
    own = FrozenModel(copy.deepcopy(base.model))
    own.model.requires_grad_(True)
    diagnosis = diagnose(cached(own, made(own, "kv")))
    assert diagnosis.ok
    note = next(finding for finding in diagnosis.findings if finding.check == "base")
    count = sum(1 for _ in own.model.parameters())
    assert f"{count} of its {count} parameters ask for gradients" in note.measured
    assert all(parameter.requires_grad for parameter in own.model.parameters())


def test_dead_vectors_are_no_fault_of_the_implementation():
    base = tiny("gpt2")
    subject = from_hf(base.model, base, declared="prompt", num_vectors=1, embeddings=torch.zeros(1, 64))
    effect = next(finding for finding in diagnose(subject).findings if finding.check == "effect")
    assert effect.ok


def test_hash_of_tensors_sees_one_bit():
    model = torch.nn.Linear(2, 2)
    before = tensors_sha256(model)
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert tensors_sha256(model) != before
