"""Where training starts: initial vectors, as functions of a frozen base and a seed.

Rows for prompts come from the base's own embeddings. A `prefix` or `kv` starts from such rows run once through the
base, so that at step 0 it does what the prompt would do: its layer inputs, or its keys and values, are a real text's.
Everything is float32 on the CPU and the same for the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foreword.core.block import Block
from foreword.core.compile import compute_block
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt, Vectors
from foreword.core.spec import Method
from foreword.errors import ConfigError

VOCABULARY_FIRST = 5000
"""Ids from which a vocabulary sample is drawn: the most frequent tokens (google-research/prompt-tuning)."""
NORM_SAMPLE = 512
"""Tokens, spread over the vocabulary, whose rows give the typical norm."""
STATE_SAMPLE = 64
"""Tokens run through the base to find the typical norms of its layers."""
KINDS = ("text:...", "vocab", "labels", "random")


def initial_vectors(
    base: FrozenModel,
    method: Method,
    block: Block,
    spec: str,
    *,
    labels: Sequence[str] = (),
    seed: int = 0,
    after: int = 0,
) -> Vectors:
    """Return the vectors that training starts from, for the slots of `block` and `after` rows behind the text.

    `spec` is "text:..." (a real text), "vocab" (sampled tokens), "labels" (the task's answers, then sampled tokens) or
    "random" (Gaussian of typical norm). `prompt` takes these rows as they are; `prefix` and `kv` take the layer inputs,
    or the keys and values, that these rows leave at their places in the block, and for "random" Gaussian numbers of
    the norm that each layer sees. Raises ConfigError on an unknown `spec`, a text or label without tokens, more labels
    than vectors, or `after` for a method other than `prompt`.
    """
    num = block.num_soft
    if after and method != "prompt":
        raise ConfigError(
            f"method {method} has no vectors behind the input, the template asks for {after}",
            hint="Use method = prompt, or slots left of {input} only.",
        )
    if num + after == 0:
        raise ConfigError("there is no vector to train", hint="Give the template a slot such as {soft:20}.")
    if method == "prompt":
        rows = embedding_rows(base, spec, num + after, labels=labels, seed=seed)
        return SoftPrompt(rows[:num], block, rows[num:] if after else None)
    if method == "prefix":
        if spec == "random":
            return SoftPrefix(random_states(base, num, seed), block)
        return SoftPrefix(states_of(base, embedding_rows(base, spec, num, labels=labels, seed=seed), block), block)
    if spec == "random":
        return random_kv(base, block, seed)
    return kv_of(base, embedding_rows(base, spec, num, labels=labels, seed=seed), block)


def embedding_rows(base: FrozenModel, spec: str, num: int, *, labels: Sequence[str] = (), seed: int = 0) -> Tensor:
    """Return rows [num, D] as `spec` says (see `initial_vectors`), in the space of `inputs_embeds`."""
    if spec.startswith("text:"):
        return from_text(base, spec.removeprefix("text:"), num)
    if spec == "vocab":
        return from_vocabulary(base, num, seed)
    if spec == "labels":
        return from_labels(base, labels, num, seed)
    if spec == "random":
        return random_at_norm(base, num, seed)
    raise ConfigError(f"init {spec!r} is not known", hint=f"Known: {', '.join(KINDS)}, from:<version>.")


def from_text(base: FrozenModel, text: str, num: int) -> Tensor:
    """Return the embeddings [num, D] of a text, without special tokens; tiled when it is shorter, cut when longer.

    Raises ConfigError when the text has no tokens or the base no tokenizer. Source: Lester et al. 2021 in PEFT's form,
    less the special tokens that PEFT adds.
    """
    return _embed(base, _tiled(_token_ids(base, text), num))


def from_vocabulary(base: FrozenModel, num: int, seed: int, first: int = VOCABULARY_FIRST) -> Tensor:
    """Return embeddings [num, D] of tokens drawn from the `first` ids, special tokens left out, without repetition as
    far as they suffice. Source: Lester et al. 2021, section 3.2.
    """
    return _embed(base, _sampled_ids(base, num, seed, first))


def from_labels(base: FrozenModel, labels: Sequence[str], num: int, seed: int) -> Tensor:
    """Return rows [num, D]: each label's mean embedding in the order given, then a vocabulary sample.

    Raises ConfigError without labels, with more labels than `num`, or where a label has no tokens.
    Source: Lester et al. 2021, section 3.2.
    """
    if not labels:
        raise ConfigError("init = labels needs the task's labels", hint="Set labels in the task, or init = vocab.")
    if len(labels) > num:
        raise ConfigError(
            f"init = labels: {len(labels)} labels, {num} vectors", hint=f"Use {len(labels)} vectors, or init = vocab."
        )
    means = [_embed(base, _token_ids(base, label)).mean(0) for label in labels]
    return torch.cat([torch.stack(means), from_vocabulary(base, num - len(labels), seed)])


def random_at_norm(base: FrozenModel, num: int, seed: int) -> Tensor:
    """Return Gaussian rows [num, D] whose norm is about the median norm of the base's embeddings.

    A standard normal row is 50 times longer than an embedding of a base initialised at std 0.02.
    """
    size = base.spec.vocab_size
    spread = torch.linspace(0, size - 1, min(NORM_SAMPLE, size), dtype=torch.float64).long()
    scale = _typical(_embed(base, spread.tolist())[None])
    return torch.randn(num, base.spec.embed_size, generator=_generator(seed)) * scale


def states_of(base: FrozenModel, rows: Tensor, block: Block) -> Tensor:
    """Return the layer inputs [L, P, D] that prompt rows [P, D] have at their places in the block.

    As a hidden-state prefix they act as the prompt does, exactly: dropping their outputs changes nothing, since each
    layer's input is set to what it was.
    """
    with torch.no_grad(), _layer_inputs_kept(base) as inputs:
        compute_block(base, SoftPrompt(rows, block), block)
    places = torch.tensor(block.soft_positions(), device=base.device)
    return torch.stack([hidden[0].index_select(0, places).float().cpu() for hidden in inputs])


def kv_of(base: FrozenModel, rows: Tensor, block: Block) -> SoftKV:
    """Return the keys and values that prompt rows [P, D] leave at their places in the block.

    They act as the prompt does, exactly. Source: initialisation from real text, Li and Liang 2021; Cartridges.
    """
    with torch.no_grad():
        layers = compute_block(base, SoftPrompt(rows, block), block)
    places = torch.tensor(block.soft_positions(), device=base.device)
    keys, values = (
        [part[0].index_select(1, places).float().cpu() for part in kind] for kind in zip(*layers, strict=True)
    )
    return SoftKV(tuple(keys), tuple(values), block)


def random_states(base: FrozenModel, num: int, seed: int) -> Tensor:
    """Return Gaussian layer inputs [L, num, D] of about the median norm that each layer sees on sampled tokens."""
    rows = _sample_rows(base)
    states = states_of(base, rows, Block((len(rows),)))
    scales = _typical(states)
    noise = torch.randn(base.spec.num_layers, num, base.spec.hidden_size, generator=_generator(seed))
    return noise * scales[:, None, None]


def residual_scale(base: FrozenModel) -> Tensor:
    """Return the root mean square [] of the second layer's input on sampled tokens: embedding and first layer."""
    rows = _sample_rows(base)
    states = states_of(base, rows, Block((len(rows),)))
    return _root_mean_square(states[min(1, len(states) - 1)])


def kv_spreads(base: FrozenModel) -> list[Tensor]:
    """Return how far each head's keys and values lie from their mean on sampled tokens: root mean squares [Hkv, 1].

    First of the first layer's keys, then of its values, then of the second layer's.
    """
    rows = _sample_rows(base)
    sample = kv_of(base, rows, Block((len(rows),)))
    pairs = zip(sample.keys, sample.values, strict=True)
    return [_root_mean_square(x - x.mean(1, keepdim=True), (1, 2))[:, None] for pair in pairs for x in pair]


def random_kv(base: FrozenModel, block: Block, seed: int) -> SoftKV:
    """Return Gaussian keys and values of about the median norm of each layer and head on sampled tokens."""
    rows = _sample_rows(base)
    sample = kv_of(base, rows, Block((len(rows),)))
    generator = _generator(seed)

    def like(real: Tensor) -> Tensor:
        noise = torch.randn(real.shape[0], block.num_soft, real.shape[2], generator=generator)
        return noise * _typical(real)[:, None, None]

    return SoftKV(tuple(map(like, sample.keys)), tuple(map(like, sample.values)), block)


def from_vectors(vectors: Vectors, block: Block, *, after: int = 0) -> Vectors:
    """Return trained vectors as the start for `block` and `after` rows behind the text: tiled or cut to its length.

    Of more vectors the first are kept, fewer are repeated in order; rows behind the text are tiled or cut among
    themselves, and where the source has none in one place they are taken from the other. Keys keep the rotation of the
    position where they stood: for a `kv` of the same length at the same positions the start is exact, a repeated or
    moved row looks to the text as if it still stood at its old place, and training sees to the rest. Raises ConfigError
    where rows behind the text are asked of a method other than `prompt`.
    """
    num = block.num_soft
    if isinstance(vectors, SoftPrompt):
        front, behind = vectors.vectors, vectors.vectors if vectors.after is None else vectors.after
        front = front if len(front) else behind
        return SoftPrompt(_rows_tiled(front, num, 0), block, _rows_tiled(behind, after, 0) if after else None)
    if after:
        raise ConfigError(f"method {vectors.method} has no vectors behind the input, the template asks for {after}")
    if isinstance(vectors, SoftPrefix):
        return SoftPrefix(_rows_tiled(vectors.vectors, num, 1), block)
    return SoftKV(
        tuple(_rows_tiled(key, num, 1) for key in vectors.keys),
        tuple(_rows_tiled(value, num, 1) for value in vectors.values),
        block,
    )


def _root_mean_square(numbers: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    return numbers.float().square().mean(dims).sqrt().clamp_min(1e-6).cpu()


def _typical(rows: Tensor) -> Tensor:
    """Return the scale [N] that gives Gaussian rows of width W the median norm of `rows` [N, T, W]."""
    scale: Tensor = torch.linalg.vector_norm(rows, dim=-1).median(dim=1).values / math.sqrt(rows.shape[-1])
    return scale


def _rows_tiled(rows: Tensor, num: int, dim: int) -> Tensor:
    index = torch.arange(num) % rows.shape[dim]
    return rows.detach().to("cpu", torch.float32).index_select(dim, index)


def _tiled(ids: Sequence[int], num: int) -> list[int]:
    return [ids[place % len(ids)] for place in range(num)]


def _token_ids(base: FrozenModel, text: str) -> list[int]:
    if base.tokenizer is None:
        raise ConfigError("starting from text needs the base's tokenizer", hint="Load the base with its tokenizer.")
    ids = list(base.tokenizer(text, add_special_tokens=False).input_ids)
    if not ids:
        raise ConfigError(f"init: {text!r} has no tokens", hint="Write some text behind text:, or use init = vocab.")
    return ids


def _sampled_ids(base: FrozenModel, num: int, seed: int, first: int = VOCABULARY_FIRST) -> list[int]:
    special = set(base.tokenizer.all_special_ids) if base.tokenizer is not None else set()
    known = base.spec.vocab_size if base.tokenizer is None else min(base.spec.vocab_size, len(base.tokenizer))
    pool = [token for token in range(min(first, known)) if token not in special]
    order = torch.randperm(len(pool), generator=_generator(seed)).tolist()
    return _tiled([pool[place] for place in order], num)


def _sample_rows(base: FrozenModel) -> Tensor:
    longest = STATE_SAMPLE if base.spec.max_positions is None else min(STATE_SAMPLE, base.spec.max_positions - 1)
    return _embed(base, _sampled_ids(base, longest, seed=0))


def _embed(base: FrozenModel, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return base.embed(torch.tensor(ids, dtype=torch.long, device=base.device)).float().cpu()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def _layer_inputs_kept(base: FrozenModel) -> Iterator[list[Tensor]]:
    """While active, the list fills with each layer's input [B, T, D], in the layers' order."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append((args[0] if args else kwargs["hidden_states"]).clone())

    hook: Callable[..., None] = keep
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in base.layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
