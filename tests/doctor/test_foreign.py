"""Adapters: PEFT's and transformers' own models are healthy as far as they are, and their known defect is found."""

import copy

import pytest
import torch

from foreword.core.compile import compile
from foreword.doctor.diagnose import diagnose
from foreword.doctor.foreign import from_hf, from_peft
from foreword.doctor.probe.logits import run_rows, text_rows
from foreword.doctor.probe.state import state_sha256
from foreword.errors import ConfigError, IncompatibleModel
from tests.doctor.planted import NUM, made
from tests.tiny import tiny

peft = pytest.importorskip("peft")
# PEFT calls what transformers has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def wrapped(base, kind):
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": NUM}
    if kind != "PromptTuningConfig":
        options["encoder_hidden_size"] = 32
    torch.manual_seed(3)
    return peft.get_peft_model(copy.deepcopy(base.model), getattr(peft, kind)(**options))


KINDS = ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"]


def check_peft(base, kind):
    """PEFT puts prompt vectors before the padding, and counts a plain forward's positions through it: a true finding
    (with unpadded rows nothing is wrong)."""
    model = wrapped(base, kind)
    before = state_sha256([model, base.model])
    diagnosis = diagnose(from_peft(model, base))
    wrong = [finding.check for finding in diagnosis.findings if not finding.ok]
    assert diagnosis.first.fault == "padding-between", [(f.check, f.measured) for f in diagnosis.findings if not f.ok]
    assert set(wrong) <= {"padding", "generation-padding"}
    assert min(diagnosis.first.numbers["left"]) < 1e-4 < max(diagnosis.first.numbers["left"])
    assert state_sha256([model, base.model]) == before


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_peft_is_healthy_but_for_padding_at_the_left(kind):
    check_peft(tiny("llama"), kind)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "gpt-neox"])
def test_peft_is_healthy_but_for_padding_at_the_left_everywhere(name, kind, dtype):
    check_peft(tiny(name, dtype), kind)


def test_peft_logits_are_cut_to_the_text():
    base = tiny("llama")
    model = wrapped(base, "PromptTuningConfig")
    ids = torch.tensor(text_rows(base, [6]))
    assert model(input_ids=ids).logits.shape[1] == 6 + NUM
    assert from_peft(model, base).forward(ids, torch.ones_like(ids)).shape[1] == 6


def test_another_kind_of_adapter_is_refused():
    base = tiny("llama")
    lora = peft.get_peft_model(
        copy.deepcopy(base.model), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    with pytest.raises(IncompatibleModel, match="'LORA' is no soft prompt or prefix"):
        from_peft(lora, base)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_and_embeddings_of_transformers_users_are_healthy(name):
    base = tiny(name)
    vectors, prompt = made(base, "kv"), made(base, "prompt")
    prefix = compile(base, vectors)
    by_cache = from_hf(base.model, base, declared="kv", num_vectors=NUM, past_key_values=prefix.cache, vectors=vectors)
    by_rows = from_hf(base.model, base, declared="prompt", num_vectors=NUM, embeddings=prompt.vectors)
    for subject in (by_cache, by_rows):
        diagnosis = diagnose(subject)
        assert diagnosis.ok, (diagnosis.first.check, diagnosis.first.measured)
        rows = text_rows(base, [5, 2])
        alone = run_rows(subject.forward, base, [rows[1]])[0][0]
        for side in ("left", "right"):
            torch.testing.assert_close(run_rows(subject.forward, base, rows, side)[0][1], alone, rtol=1e-4, atol=1e-4)


def test_one_way_in_is_needed():
    base = tiny("llama")
    with pytest.raises(ConfigError, match="0 ways in which the vectors enter"):
        from_hf(base.model, base, declared="kv", num_vectors=NUM)
    with pytest.raises(ConfigError, match="2 ways"):
        from_hf(base.model, base, declared="kv", num_vectors=NUM, forward=print, embeddings=torch.zeros(NUM, 64))
