"""Costs against the worked table, against brute force, and on bases of every kind."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreword.advise.bases.find import KNOWN, from_config, from_numbers
from foreword.advise.cost import attention
from foreword.advise.cost.hardware import KNOWN as HARDWARE
from foreword.advise.cost.hardware import Hardware, find_hardware
from foreword.advise.cost.method_cost import COSTED, QUANTITIES, Load, method_cost
from foreword.advise.cost.quantity import human
from foreword.errors import ConfigError
from tests.advise.configs import DEEPSEEK, MORE, llama
from tests.tiny import CONFIGS, tiny

H100 = HARDWARE["h100"]
QWEN = from_numbers(
    {
        "name": "Qwen3-32B", "num_layers": 64, "hidden_size": 5120, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128,
        "ffn_size": 25600, "vocab_size": 151936, "gated": True, "num_parameters": 32.8e9,
    }
)  # fmt: skip
OPT = from_numbers(
    {
        "name": "OPT-30B", "num_layers": 48, "hidden_size": 7168, "num_heads": 56, "num_kv_heads": 56, "head_dim": 128,
        "ffn_size": 28672, "vocab_size": 50272, "gated": False, "num_parameters": 30e9,
    }
)  # fmt: skip
"""The two bases of the worked table, with the nominal parameter counts that it takes (32.8 and 30 billion)."""


def cost(method, base, hardware=H100, **load):
    return method_cost(method, base, Load(**load), hardware)


def shown(number):
    """A table's number as (value, half a unit of its last digit)."""
    digits, _, exponent = number.partition("e")
    places = len(digits.partition(".")[2])
    scale = 10.0 ** int(exponent or 0)
    return float(digits) * scale, 0.5 * 10**-places * scale


TABLE = [
    # method, quantity, load, Qwen3-32B, OPT-30B; None where the table has no cell, or cuts it off: see adapters below
    ("prompt", "bytes_per_task", {"num_vectors": 20}, "204.8e3", "286.7e3"),
    ("prompt", "bytes_per_task", {"num_vectors": 100}, "1.02e6", "1.43e6"),
    ("prompt", "bytes_all_tasks", {"num_vectors": 20}, "2.46e6", "3.44e6"),
    ("prompt", "bytes_all_tasks", {"num_vectors": 100}, "12.3e6", "17.2e6"),
    ("prefix", "bytes_per_task", {"num_vectors": 20}, "13.1e6", "13.8e6"),
    ("prefix", "bytes_per_task", {"num_vectors": 100}, "65.5e6", "68.8e6"),
    ("prefix", "bytes_all_tasks", {"num_vectors": 20}, "157e6", "165e6"),
    ("prefix", "bytes_all_tasks", {"num_vectors": 100}, "786e6", "826e6"),
    ("kv", "bytes_per_task", {"num_vectors": 20}, "5.24e6", "27.5e6"),
    ("kv", "bytes_per_task", {"num_vectors": 100}, "26.2e6", "138e6"),
    ("kv", "bytes_all_tasks", {"num_vectors": 20}, "62.9e6", "330e6"),
    ("kv", "bytes_all_tasks", {"num_vectors": 100}, "315e6", "1.65e9"),
    ("lora", "bytes_per_task", {}, "268e6", "198e6"),
    ("lora", "bytes_all_tasks", {}, "3.2e9", "2.4e9"),
    ("adapter", "bytes_per_task", {}, "169e6", None),
    ("ia3", "bytes_per_task", {}, "3.5e6", "4.1e6"),
    ("full", "bytes_all_tasks", {}, "787e9", "720e9"),
    ("prompt", "prefill_dense_s", {"num_vectors": 20}, "3.3e-3", "3.0e-3"),
    ("prompt", "prefill_dense_s", {"num_vectors": 100}, "16.4e-3", "15e-3"),
    ("kv", "decode_s_per_token", {"num_vectors": 20}, "1.6e-6", "8.2e-6"),
    ("kv", "decode_s_per_token", {"num_vectors": 100}, "7.8e-6", "41e-6"),
    ("kv", "decode_share_of_weights", {"num_vectors": 20}, "0.008e-2", "0.05e-2"),
    ("kv", "decode_share_of_weights", {"num_vectors": 100}, "0.04e-2", "0.23e-2"),
    ("few_shot", "kv_bytes_per_sequence", {}, "524e6", "2.75e9"),
    ("few_shot", "prefill_dense_s", {}, "328e-3", "300e-3"),
    ("prompt", "training_dense_hours", {"num_vectors": 20}, "0.29", "0.27"),
    ("prompt", "training_dense_hours", {"num_vectors": 100}, "0.36", "0.33"),
    ("prompt", "wire_bytes_per_request", {"num_vectors": 20}, "4.4e6", None),
]


CELLS = [
    pytest.param(base, method, key, load, cell, id=f"{base.name}-{method}-{key}-{load.get('num_vectors', '')}")
    for method, key, load, qwen, opt in TABLE
    for base, cell in ((QWEN, qwen), (OPT, opt))
    if cell is not None
]


@pytest.mark.parametrize(("base", "method", "key", "load", "cell"), CELLS)
def test_the_worked_table(base, method, key, load, cell):
    expected, half = shown(cell)
    assert cost(method, base, num_tasks=12, **load).value(key) == pytest.approx(expected, abs=half * 1.0001)


def test_adapters_of_opt_are_177_5_mb():
    """The table has 177 MB: it cuts where its other cells round."""
    assert cost("adapter", OPT).value("bytes_per_task") == 2 * 48 * (2 * 7168 * 64 + 7168 + 64) * 2 == 177_549_312


def test_attention_comes_on_top_of_the_tables_dense_products():
    few_shot, prompt = cost("few_shot", QWEN), cost("prompt", QWEN, num_vectors=100)
    assert few_shot.value("prefill_s_uncached") == pytest.approx(0.328 + 5.45e12 / 400e12, rel=1e-3)
    assert prompt.value("training_hours") / prompt.value("training_dense_hours") == pytest.approx(1.0096, abs=2e-4)


def test_the_configurations_agree_with_the_table_but_for_nominal_parameter_counts():
    for name, numbers in (("qwen3-32b", QWEN), ("opt-30b", OPT)):
        for method, load in (("prompt", {}), ("prefix", {}), ("kv", {}), ("lora", {}), ("adapter", {}), ("ia3", {})):
            assert cost(method, KNOWN[name], **load).value("bytes_per_task") == cost(method, numbers).value(
                "bytes_per_task"
            )
    assert human(cost("full", KNOWN["qwen3-32b"], num_tasks=12).value("bytes_all_tasks"), "bytes") == "786 GB"
    assert human(cost("full", KNOWN["opt-30b"], num_tasks=12).value("bytes_all_tasks"), "bytes") == "719 GB"


def test_formula_and_numbers_are_shown():
    found = cost("kv", QWEN).quantities
    assert found["bytes_per_task"].formula == "2·L·P·Hkv·Dh·b"
    assert found["bytes_per_task"].worked == "2·64·20·8·128·2 = 5.24 MB"
    assert cost("prompt", QWEN).quantities["wire_bytes_per_request"].worked == "(20 + 300)·5120·2·4/3 = 4.37 MB"
    assert cost("ia3", QWEN).quantities["trained_parameters"].formula == "L·(2·Hkv·Dh + F)"


SAFE = {"__builtins__": {}}


@pytest.mark.parametrize("base", [QWEN, OPT, KNOWN["mistral-7b-v0.1"]], ids=lambda base: base.name)
@pytest.mark.parametrize("method", COSTED)
def test_worked_numbers_compute_to_the_value(base, method):
    """Reading `worked` as arithmetic gives the value: what is printed is what was computed."""
    for key, quantity in cost(method, base, num_tasks=12, batch=4).quantities.items():
        numbers, _, result = quantity.worked.rpartition(" = ")
        assert result == quantity.human()
        if numbers:
            written = numbers.replace("·10^", "e").replace("·", "*")
            assert eval(written, SAFE) == pytest.approx(quantity.value, rel=2e-3), (key, quantity.worked)


@pytest.mark.parametrize("method", COSTED)
def test_every_quantity_is_there_with_a_formula(method):
    found = cost(method, QWEN)
    assert list(found.quantities) == list(QUANTITIES)
    assert not found.impossible
    for key, quantity in found.quantities.items():
        assert quantity.formula and quantity.value >= 0, key
        assert quantity.value > 0 or quantity.formula.startswith(("0: ", "weights")) or key.startswith("decode"), key
    assert found.to_json()["quantities"]["bytes_per_task"]["unit"] == "bytes"


# ---- laws


@given(num=st.integers(1, 200), tasks=st.integers(1, 100), b=st.sampled_from([1, 2, 4]))
def test_bytes_grow_linearly_in_vectors_and_tasks(num, tasks, b):
    for method in ("prompt", "prefix", "kv"):
        one = cost(method, QWEN, num_vectors=1, bytes_per_element=1).value("bytes_per_task")
        many = cost(method, QWEN, num_vectors=num, num_tasks=tasks, bytes_per_element=b)
        assert many.value("bytes_per_task") == one * num * b
        assert many.value("bytes_all_tasks") == one * num * b * tasks


@given(layers=st.integers(1, 40), heads=st.sampled_from([1, 2, 4, 8]), dim=st.integers(1, 64), num=st.integers(1, 50))
def test_kv_to_hidden_state_bytes_are_2_hkv_dh_over_d(layers, heads, dim, num):
    numbers = {"num_layers": layers, "hidden_size": 96, "num_heads": 8, "num_kv_heads": heads, "head_dim": dim}
    base = from_numbers(numbers)
    ratio = cost("kv", base, num_vectors=num).value("bytes_per_task") / cost("prefix", base, num_vectors=num).value(
        "bytes_per_task"
    )
    assert ratio == pytest.approx(2 * heads * dim / 96)


@given(before=st.integers(0, 12), after=st.integers(0, 12), window=st.none() | st.integers(1, 30))
def test_pairs_are_what_a_mask_has(before, after, window):
    length = before + after
    sees = [
        [key <= query and (window is None or query - key < window) for key in range(length)] for query in range(length)
    ]
    assert attention.pairs_within(length, window) == sum(map(sum, sees))
    assert attention.pairs_across(before, after, window) == sum(sum(row[:before]) for row in sees[before:])
    if after:
        assert attention.visible(before, after - 1, window) == sum(sees[-1][:before])


@given(num=st.integers(1, 64), text=st.integers(1, 400))
def test_prefill_of_full_attention_is_the_notes_formula(num, text):
    found = cost("prompt", QWEN, num_vectors=num, input_tokens=text)
    assert found.value("prefill_dense_flops") == 2 * 32.8e9 * num
    assert found.value("prefill_s_cached") * 400e12 == pytest.approx(4 * 64 * num * 64 * 128 * text)
    assert found.value("prefill_attention_flops") == 4 * 64 * 64 * 128 * (num * text + num * (num + 1) // 2)


def test_imported_positions_pay_no_dense_prefill_and_a_name_on_the_wire():
    for method in ("kv", "compiled_prompt", "prefix", "cartridge"):
        found = cost(method, QWEN)
        assert found.value("prefill_dense_flops") == 0
        assert found.value("wire_bytes_per_request") == 64
        assert found.value("prefill_s_uncached") > found.value("prefill_s_cached")
    same = ("kv_bytes_per_sequence", "prefill_s_uncached", "decode_bytes_per_token", "context_tokens")
    assert [cost("kv", QWEN).value(key) for key in same] == [cost("compiled_prompt", QWEN).value(key) for key in same]


def test_blocks_are_shared_whole():
    found = cost("kv", QWEN, num_vectors=20, block_tokens=16)
    assert found.value("kv_bytes_per_task") == found.value("kv_bytes_per_sequence") / 20 * 32
    assert any("32 would be" in note for note in found.notes)
    assert not any("multiple" in note for note in cost("kv", QWEN, num_vectors=32).notes)


def test_layers_with_windows_stop_reading_the_prefix():
    base = from_config(llama(model_type="mistral", sliding_window=24))
    near, far = (cost("kv", base, num_vectors=10, input_tokens=t).value("decode_bytes_per_token") for t in (10, 20))
    per_position = base.kv_bytes_per_token(2)
    assert (near, far) == (10 * per_position, 3 * per_position)
    assert cost("kv", base, num_vectors=10, input_tokens=40).value("decode_bytes_per_token") == 0
    assert cost("kv", base, num_vectors=10).value("kv_bytes_per_sequence") == 10 * per_position
    note = next(note for note in cost("kv", base, num_vectors=10).notes if "sliding window" in note)
    assert "first 69 tokens" in note  # 3 layers, 23 positions each
    mixed = from_config(CONFIGS["gemma2"]().to_dict())
    read = cost("kv", mixed, num_vectors=10, input_tokens=40).value("decode_bytes_per_token")
    assert read == cost("kv", mixed, num_vectors=10, input_tokens=1).value("decode_bytes_per_token") / 3


def test_the_reach_under_windows_is_what_the_model_shows():
    """L·(W-1)-1 is the last text token whose output moves with the prompt: one fewer than the tokens reached."""
    frozen, base = tiny("mistral-window"), from_config(CONFIGS["mistral-window"]().to_dict())
    length = attention.reach_tokens(base) + 6
    ids = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))
    rows = [frozen.embed(ids)[0]] * 2
    block = [torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    with torch.no_grad():
        one, two = (
            frozen.model(inputs_embeds=torch.cat([b, r])[None]).logits[0, 4:] for b, r in zip(block, rows, strict=True)
        )
    moved = (one - two).abs().amax(-1)
    assert moved[: attention.reach_tokens(base)].gt(0).all()
    assert moved[attention.reach_tokens(base) :].eq(0).all()


# ---- bases that cannot


LATENT = from_config(MORE["deepseek-v3"]().to_dict(), "latent")
STATE = from_config(MORE["mamba"]().to_dict(), "state")


@pytest.mark.parametrize("method", ["kv", "cartridge"])
@pytest.mark.parametrize(("base", "word"), [(LATENT, "MLA"), (STATE, "state of fixed size")])
def test_free_keys_and_values_cannot_be_had_without_plain_ones(method, base, word):
    found = cost(method, base)
    assert f"layer 0 of {base.name}" in found.impossible and word in found.impossible
    assert found.quantities["bytes_per_task"] is None and found.value("kv_bytes_per_sequence") is None
    assert found.value("context_tokens") > 0


def test_latents_are_counted_for_what_compiles():
    found = cost("compiled_prompt", LATENT, num_vectors=5, input_tokens=100)
    assert not found.impossible
    assert found.value("kv_bytes_per_sequence") == 3 * 5 * (DEEPSEEK["kv_lora_rank"] + 8) * 2
    assert found.quantities["kv_bytes_per_sequence"].formula == "L·P·(latent + rope)·b"
    assert any("plain keys and values only" in note for note in found.notes)


def test_states_hold_no_positions():
    for method in ("prompt", "hard_text"):
        found = cost(method, STATE)
        assert not found.impossible and found.value("kv_bytes_per_sequence") == 0
        assert found.quantities["kv_bytes_per_sequence"].formula.startswith("0: state layers")
        assert found.value("prefill_attention_flops") == 0
    assert "state of fixed size" in cost("compiled_prompt", STATE).impossible


def test_a_window_that_the_block_fills_is_named():
    base = from_config(llama(model_type="mistral", sliding_window=24))
    found = cost("kv", base, num_vectors=24, input_tokens=10)
    assert "layer 0" in found.impossible and "24 tokens" in found.impossible
    assert not cost("kv", base, num_vectors=23, input_tokens=10).impossible


def test_positions_beyond_the_base_are_named():
    found = cost("few_shot", KNOWN["opt-30b"])
    assert found.impossible == "opt-30b takes 2048 positions; 2000 of the method, 300 of the input and 32 of the " \
        "answer are 2332"  # fmt: skip
    assert not cost("few_shot", KNOWN["opt-30b"], input_tokens=16).impossible


def test_formulas_speak_of_windows_only_where_they_hide_something():
    base = KNOWN["mistral-7b-v0.1"]
    for tokens, is_cut in ((300, False), (4076, False), (4077, True)):
        found = cost("kv", base, num_vectors=20, input_tokens=tokens).quantities
        for key in ("prefill_attention_flops", "training_attention_flops"):
            assert found[key].formula.endswith("less what windows hide") is is_cut
        full = 4 * 32 * 32 * 128 * 20 * tokens
        assert (found["prefill_attention_flops"].value < full) is is_cut


def test_a_teacher_that_cannot_read_the_context_is_said():
    assert any("2,048 positions" in note for note in cost("cartridge", KNOWN["opt-30b"]).notes)
    assert any("generation" in note for note in cost("cartridge", QWEN).notes)


def test_moe_bases_count_picked_experts_in_products_and_all_in_bytes():
    base = from_config(MORE["mixtral"]().to_dict())
    found = cost("prompt", base)
    assert found.value("prefill_dense_flops") == 2 * base.num_active_parameters * 20
    assert cost("full", base).value("bytes_per_task") == 2 * base.num_parameters
    assert any("experts carry no LoRA here" in note for note in cost("lora", base).notes)
    assert base.weight_bytes > base.active_weight_bytes == 2 * base.num_active_parameters


def test_quantised_bases_read_less_and_compute_the_same():
    four = from_config(llama(quantization_config={"quant_method": "awq", "bits": 4}))
    plain = from_config(llama())
    small, full = cost("kv", four), cost("kv", plain)
    assert small.value("decode_share_of_weights") > full.value("decode_share_of_weights")
    for key in ("bytes_per_task", "training_flops", "prefill_attention_flops"):
        assert small.value(key) == full.value(key)


def test_layers_that_borrow_keys_and_values_store_none_and_read_them_again():
    base = from_config(llama(num_kv_shared_layers=1))
    found, plain = cost("kv", base), cost("kv", from_config(llama()))
    assert found.value("bytes_per_task") == plain.value("bytes_per_task") * 2 / 3
    assert found.value("decode_bytes_per_token") == plain.value("decode_bytes_per_token")


# ---- training


def test_training_orders_as_the_gradients_do():
    hours = {method: cost(method, QWEN).value("training_dense_flops") for method in COSTED}
    tokens = 2000 * 5 * 300
    assert hours["kv"] == 4 * 32.8e9 * tokens
    assert hours["prompt"] == 4 * 32.8e9 * tokens * 320 / 300
    assert hours["full"] == 6 * 32.8e9 * tokens
    assert hours["kv"] < hours["prefix"] < hours["prompt"]
    assert hours["lora"] / hours["full"] == pytest.approx(2 / 3, abs=0.01)
    assert hours["hard_text"] == hours["few_shot"] == 0
    teacher = cost("cartridge", QWEN, cartridge_context_tokens=8192).value("training_dense_flops") - hours["kv"]
    assert teacher == 2 * 32.8e9 * (8192 + 300) * 2000


def test_a_tweak_is_training_evaluation_and_transfer():
    text, full = cost("hard_text", QWEN), cost("full", QWEN)
    evaluation = 500 * 2 * 32.8e9 * 300 / 400e12 + 16 * 32 * 65.6e9 / 3.35e12
    assert text.value("tweak_hours") * 3600 == pytest.approx(evaluation)
    transfer = 65.6e9 / 1.25e9
    assert full.value("tweak_hours") * 3600 == pytest.approx(
        full.value("training_hours") * 3600 + evaluation + transfer
    )


def test_what_does_not_fit_one_accelerator_is_said():
    assert any("at least 7 H100" in note for note in cost("full", QWEN).notes)
    assert any("the weights take 141 GB: at least 2 H100" in note for note in cost("kv", KNOWN["llama-3.1-70b"]).notes)
    assert not any("H100" in note for note in cost("kv", QWEN).notes)


def test_layer_methods_read_each_task_of_a_batch_once():
    alone, mixed, same = (cost("lora", QWEN, batch=b, num_tasks=t) for b, t in ((1, 12), (8, 12), (8, 2)))
    size = alone.value("bytes_per_task")
    read = [found.value("decode_bytes_per_token") for found in (alone, mixed, same)]
    assert read == [size, size, size / 4]
    assert cost("full", QWEN, batch=8, num_tasks=2).value("decode_bytes_per_token") == 65.6e9 / 8


# ---- what is asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tasks": 0}, "num_tasks = 0 is not above 0"),
        ({"num_vectors": 2.5}, "num_vectors = 2.5 is not a whole number"),
        ({"rows": -1}, "rows = -1 is not 0 or more"),
        ({"batch": "8"}, "batch = '8' is not a whole number"),
        ({"bytes_per_element": float("nan")}, "bytes_per_element = nan"),
        ({"num_tasks": True}, "num_tasks = True"),
    ],
)
def test_loads_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Load(**changes)


def test_unknown_methods_and_hardware_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'lorra'") as caught:
        cost("lorra", QWEN)
    assert "lora" in caught.value.hint
    with pytest.raises(ConfigError, match="h1000") as caught:
        find_hardware("h1000")
    assert "h100" in caught.value.hint
    assert find_hardware("H100") is H100
    with pytest.raises(ConfigError, match=r"utilisation = 1\.5"):
        dataclasses.replace(H100, utilisation=1.5)
    with pytest.raises(ConfigError, match="memory_bytes = 0 is"):
        dataclasses.replace(H100, memory_bytes=0)


def test_hardware_says_what_is_reached():
    assert H100.flops_per_s == pytest.approx(400e12)
    assert all(hardware.source and isinstance(hardware, Hardware) for hardware in HARDWARE.values())


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (204800, "bytes", "205 KB"), (999.6e6, "bytes", "1 GB"), (12, "bytes", "12 B"), (0, "bytes", "0 B"),
        (3.28e-3, "s", "3.28 ms"), (1.564e-6, "s", "1.56 µs"), (150, "s", "2.5 min"), (0.0, "s", "0 s"),
        (9e3, "s", "2.5 h"), (4e-10, "s", "0.4 ns"), (0.2916, "hours", "0.292 h"), (7.99e-5, "share", "0.00799 %"),
        (4.2e17, "FLOP", "420 PFLOP"), (20, "tokens", "20 tokens"), (32.8e9, "parameters", "32.8 billion parameters"),
        (102400, "parameters", "102,400 parameters"),
    ],
)  # fmt: skip
def test_numbers_are_shown_to_three_digits(value, unit, text):
    assert human(value, unit) == text
