"""Vectors for explaining: random ones for tiny bases, dead ones for the bundled base."""

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foreword.core.block import Block
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt
from foreword.explain.ablate import form_without, text_batch
from foreword.explain.examples import Example

BLOCK = Block(((1, 3), 3, (17, 9), 1))
EXAMPLES = [
    Example((5, 6, 7, 8, 9, 10), 2),
    Example((11, 12, 13), 1),
    Example(tuple(range(20, 34)), 4),
    Example((40, 41, 42, 43), 2),
]


def make(base, method, block=BLOCK, seed=1, after=0):
    """Random vectors of about the size of what the base sees."""
    torch.manual_seed(seed)
    spec, num = base.spec, block.num_soft
    if method == "prompt":
        scale = float(base.embedding.weight.std())
        rows = torch.randn(num + after, spec.embed_size) * scale
        return SoftPrompt(rows[:num], block, rows[num:] if after else None)
    if method == "prefix":
        return SoftPrefix(torch.randn(spec.num_layers, num, spec.hidden_size), block)
    return SoftKV(
        tuple(torch.randn(layer.num_kv_heads, num, layer.head_dim) for layer in spec.layers),
        tuple(torch.randn(layer.num_kv_heads, num, layer.value_dim) for layer in spec.layers),
        block,
    )


def dead_kv(base, examples, block):
    """Keys that every query of these rows turns away from: scores so negative that nothing is attended to.

    Needs a base whose attention runs through transformers' interface. For each group of heads a direction is sought
    that has a positive product with all queries; the keys point the other way.
    """
    queries = []
    kind = base.config._attn_implementation
    own = ALL_ATTENTION_FUNCTIONS[kind]

    def spy(module, query, *rest, **options):
        queries.append(query.detach().float())
        return own(module, query, *rest, **options)

    none = form_without(base, make(base, "kv", block), range(block.num_soft))
    batch = text_batch(base, none, examples)
    ALL_ATTENTION_FUNCTIONS[kind] = spy
    try:
        with torch.no_grad():
            base.run_decoder(batch.embeds, positions=batch.positions, cache=batch.cache, mask=batch.mask)
    finally:
        ALL_ATTENTION_FUNCTIONS[kind] = own
    keys, values = [], []
    for layer, query in zip(base.spec.layers, queries, strict=True):
        groups = query.transpose(1, 2)[batch.is_text].unflatten(1, (layer.num_kv_heads, -1))
        found = []
        for group in range(layer.num_kv_heads):
            rows = F.normalize(groups[:, group].flatten(0, 1), dim=-1)
            away = rows.mean(0)
            while float((rows @ F.normalize(away, dim=0)).min()) < 0.05:  # the perceptron's rule
                away = away + 0.1 * rows[(rows @ away).argmin()]
            found.append(-3000.0 * F.normalize(away, dim=0))
        keys.append(torch.stack(found)[:, None].repeat(1, block.num_soft, 1))
        values.append(torch.randn(layer.num_kv_heads, block.num_soft, layer.value_dim))
    return SoftKV(tuple(keys), tuple(values), block)
