"""Constraints that tests start from: a base of two layers as numbers, so that a decision takes milliseconds."""

from functools import lru_cache
from pathlib import Path

from foreword.advise.constraints import from_tables, load_constraints
from foreword.advise.decide import decide
from foreword.advise.essay.write import write_essay

EXAMPLES = Path(__file__).parents[2] / "examples/advise"
CASES = (
    "thirty_b_twelve_tasks",
    "startup_ten_tasks",
    "latency_thirty_tasks",
    "business_units",
    "small_base_tagging",
    "text_only_api",
)
TWO_LAYERS = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 128,
    "vocab_size": 1000,
    "context_tokens": 4096,
    "num_parameters": 8_000_000_000,
}


def made(base=None, **tables):
    """Constraints from tables; `base` is two layers that count as 8 billion parameters."""
    return from_tables({"base": base or TWO_LAYERS, **tables})


def case(name, *overrides):
    """One of the six case files."""
    return load_constraints(EXAMPLES / f"{name}.toml", overrides)


@lru_cache
def essay(name):
    """The report of one of the six, made once."""
    return write_essay(decide(case(name)))
