"""Contract 1: logits through a KVPrefix equal logits with the vectors written into the sequence."""

import pytest
import torch

from foreword.core.block import Block
from foreword.core.compile import compile, uncompiled_logits
from foreword.core.forward import forward
from foreword.core.prompt import SoftPrefix, SoftPrompt
from tests.tiny import NAMES, tiny

BLOCK = Block(((1,), 5, (7, 9), 2))
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2}


def ragged(base, count=3, longest=13):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 90, (longest - 4 * i,), generator=generator).tolist() for i in range(count)]


def scaled(logits):
    return logits.float() / logits.float().std()


def soft(base, method, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spec, num = base.spec, BLOCK.num_soft
    if method == "prompt":
        return SoftPrompt(torch.randn(num, spec.embed_size, generator=generator), BLOCK)
    return SoftPrefix(torch.randn(spec.num_layers, num, spec.hidden_size, generator=generator), BLOCK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_uncompiled_for_ragged_rows(name, method, dtype):
    base = tiny(name, dtype)
    vectors = soft(base, method)
    rows = ragged(base)
    with torch.no_grad():
        compiled = forward(base, rows, compile(base, vectors))
        plain = forward(base, rows)
        for index, row in enumerate(rows):
            reference = uncompiled_logits(base, torch.tensor([row]), vectors)[0]
            error = (scaled(compiled[index, : len(row)]) - scaled(reference)).abs().max()
            effect = (scaled(plain[index, : len(row)]) - scaled(reference)).abs().max()
            assert error <= TOLERANCE[dtype], f"row {index}: {error}"
            assert effect > 10 * TOLERANCE[dtype] or dtype == "bfloat16"
