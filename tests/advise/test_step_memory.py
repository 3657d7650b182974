"""The memory of a training step: against the advice's own counts, a measurement, and the page that prints it."""

from pathlib import Path

import pytest

from foreword.advise.bases.find import find_base
from foreword.advise.cost.hardware import find_hardware
from foreword.advise.cost.load import Load
from foreword.advise.cost.method_cost import method_cost
from foreword.advise.cost.step_memory import OPTIMISED, saved_numbers, step_memory, untied

PAGE = Path(__file__).parents[2] / "docs/large-bases.md"
QWEN = {
    "model_type": "qwen3",
    "num_hidden_layers": 64,
    "hidden_size": 5120,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 25600,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
STEP = {"tokens": 8 * 256 + 20, "targets": 8 * 32}


def lines():
    """The rows of the page's table."""
    for name, config in (("Qwen3-32B", QWEN), ("Llama-3-70B", LLAMA)):
        base = find_base(config)
        vectors = 20 * sum(layer.elements_per_token for layer in base.layers)
        for gpus in (1, 2, 4, 8):
            cells = [step_memory(base, **STEP, vectors=vectors, gpus=gpus, recompute=again) for again in (False, True)]
            numbers = [cells[0].weights, cells[0].activations, cells[1].activations, cells[0].logits, cells[0].vectors]
            totals = [cells[0].total, cells[1].total]
            shown = " | ".join(f"{number / 1e9:.1f}" for number in numbers + totals)
            yield f"| {name} | {gpus} | {shown} | {fits(totals, 80)} | {fits(totals, 141)} |"


def fits(totals, size):
    """A tenth is left to the allocator and the kernels' work space."""
    plain, again = (total / 1e9 <= 0.9 * size for total in totals)
    return "yes" if plain else "with `--recompute`" if again else "no"


def test_weights_are_those_of_the_advice():
    for config in (QWEN, LLAMA):
        base = find_base(config)
        found = step_memory(base, tokens=0, targets=0, vectors=0)
        assert untied(base) == 2
        assert found.total == found.weights == pytest.approx(2 * base.num_parameters)


def test_vectors_are_those_of_the_advice():
    base = find_base(QWEN)
    load = Load(num_tasks=1, num_vectors=20)
    stored = method_cost("kv", base, load, find_hardware("H100")).value("bytes_per_task")
    count = 20 * sum(layer.elements_per_token for layer in base.layers)
    assert stored == count * load.bytes_per_element
    assert step_memory(base, tokens=0, targets=0, vectors=count).vectors == OPTIMISED * count


def test_activations_are_near_a_measured_step():
    """22.6 GiB over the model, measured on this shape with compiled layers and packed rows."""
    found = step_memory(find_base(QWEN), **STEP, vectors=20 * 5120)
    over = (found.total - found.weights) / 2**30
    assert over == pytest.approx(22.6, rel=0.15)


def test_shares_add_up_and_recomputing_saves():
    base = find_base(LLAMA)
    one, eight = (step_memory(base, **STEP, vectors=0, gpus=gpus) for gpus in (1, 8))
    assert eight.activations * 8 == pytest.approx(one.activations)
    assert eight.weights > one.weights / 8
    again = step_memory(base, **STEP, vectors=0, recompute=True)
    assert again.activations < 0.2 * one.activations
    assert saved_numbers(base) == 2 * 28672 + 2 * 8192 + 2 * 8 * 128 + 2 * 8192


@pytest.mark.parametrize("line", list(lines()))
def test_the_page_prints_these_numbers(line):
    assert line in PAGE.read_text().splitlines()
