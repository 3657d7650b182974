"""Prefixes of all kinds, requests of all lengths, and references computed without the engine."""

import torch

from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.forward import forward
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt
from foreword.engine.engine import Engine
from foreword.engine.request import Request
from tests.tiny import tiny

LENGTHS = {"prompt": 7, "prefix": 12, "kv": 3, "blocked": 9}
"""Vectors of each prefix; with blocks of 4 positions aligned, unaligned, and shorter than a block."""


def prefixes(base, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spec = base.spec

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    def kv(width):
        return tuple(rand(layer.num_kv_heads, LENGTHS["kv"], getattr(layer, width)) for layer in spec.layers)

    vectors = {
        "prompt": SoftPrompt(rand(LENGTHS["prompt"], spec.embed_size)),
        "prefix": SoftPrefix(rand(spec.num_layers, LENGTHS["prefix"], spec.hidden_size)),
        "kv": SoftKV(kv("head_dim"), kv("value_dim")),
        "blocked": SoftPrompt(rand(LENGTHS["blocked"], spec.embed_size), Block(((1,), 5, (7, 9), 4))),
    }
    return {name: compile(base, found, name=name) for name, found in vectors.items()}


def engine_for(name, **options):
    base = tiny(name) if isinstance(name, str) else name
    engine = Engine(base, **{"kv_memory": "6MiB", "block_size": 4, "chunk_tokens": 24, **options})
    for key, prefix in prefixes(base).items():
        engine.add_prefix(key, prefix)
    return engine


def ids(count, seed):
    return torch.randint(3, 90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def mixed(**options):
    """Nine requests: plain and every kind of prefix, 1 to 37 prompt tokens, 1 to 14 new ones."""
    lengths = [5, 23, 1, 37, 11, 2, 17, 8, 30]
    names = [None, "prompt", "prefix", "kv", "blocked", "kv", None, "prefix", "prompt"]
    return [
        Request(prompt_ids=ids(length, seed=i), prefix=name, max_tokens=1 + (5 * i + 8) % 14, **options)
        for i, (length, name) in enumerate(zip(lengths, names, strict=True))
    ]


def tokens(outputs):
    return [[completion.token_ids for completion in output.completions] for output in outputs]


def expected_greedy(engine, request, answer):
    """Return the argmax after the prompt and after each answer token, by one forward without the engine."""
    prefix = engine.prefixes[request.prefix] if request.prefix else None
    row = [*request.prompt_ids, *answer]
    logits = forward(engine.base, [row], prefix)[0]
    return logits[len(request.prompt_ids) - 1 : -1].argmax(-1).tolist()
