"""The three kinds of trained vectors, and the one runtime form they compile to.

Letters: P vectors, D hidden size, L layers, Hkv key/value heads, Dh head dimension. All are unbatched data; how they
join a batch is another room's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from foreword.core.block import Block
from foreword.core.spec import Method

if TYPE_CHECKING:
    from foreword.core.template import TaskTemplate


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """Prompt tuning: `vectors` [P, D] stand before the token embeddings, at layer 1 only.

    They lie in the space of `inputs_embeds`: whatever a model does to that input afterwards (Gemma 2's scale,
    GPT-2's positions) it does to them too. `after` [S, D] are the rows of soft slots behind the text.
    Source: Lester et al. 2021, arXiv:2104.08691.
    """

    vectors: Tensor
    block: Block | None = None
    after: Tensor | None = None

    @property
    def method(self) -> Method:
        """The method's name."""
        return "prompt"

    @property
    def num_vectors(self) -> int:
        """P of the block."""
        return self.vectors.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return the artefact's tensors."""
        return {"prompt": self.vectors if self.after is None else torch.cat([self.vectors, self.after])}


@dataclass(frozen=True, eq=False)
class SoftPrefix:
    """Prefix tuning, hidden-state form: layer l reads `[p^l ; h^(l-1)]`, of its output only the text's rows are kept.

    `vectors` [L, P, D] are inputs of the layers, after embedding scale and learned positions.
    Source: Li and Liang 2021, arXiv:2101.00190, in the form of Xiao and Zhu 2025, arXiv:2501.09223, chapter 3.
    """

    vectors: Tensor
    block: Block | None = None

    @property
    def method(self) -> Method:
        """The method's name."""
        return "prefix"

    @property
    def num_vectors(self) -> int:
        """P."""
        return self.vectors.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the artefact's tensors."""
        return {"prefix": self.vectors}


@dataclass(frozen=True, eq=False)
class SoftKV:
    """Prefix tuning, key/value form: `keys[l]` and `values[l]` [Hkv, P, Dh] lie in layer l's cache.

    Keys are as in the cache, that is after key norm and rotary embedding for the positions where they stand.
    Source: Li and Liang 2021; P-tuning v2, arXiv:2110.07602; Cartridges, arXiv:2506.06266.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    block: Block | None = None

    @property
    def method(self) -> Method:
        """The method's name."""
        return "kv"

    @property
    def num_vectors(self) -> int:
        """P."""
        return self.keys[0].shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the artefact's tensors."""
        named: dict[str, Tensor] = {}
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            named[f"key.{index}"], named[f"value.{index}"] = key, value
        return named


Vectors = SoftPrompt | SoftPrefix | SoftKV


def vectors_from_tensors(tensors: Mapping[str, Tensor], block: Block) -> Vectors:
    """Build vectors from an artefact's tensors, the inverse of `.tensors()`; prompt rows over the block's stand behind
    the text."""
    if "prompt" in tensors:
        rows, num = tensors["prompt"], block.num_soft
        return SoftPrompt(rows[:num], block, rows[num:] if len(rows) > num else None)
    if "prefix" in tensors:
        return SoftPrefix(tensors["prefix"], block)
    layers = range(len(tensors) // 2)
    return SoftKV(
        tuple(tensors[f"key.{layer}"] for layer in layers), tuple(tensors[f"value.{layer}"] for layer in layers), block
    )


@dataclass(frozen=True, eq=False)
class KVPrefix:
    """The runtime form: a sequence that starts with it has `num_positions` already computed positions.

    `keys[l]` and `values[l]` [Hkv, N, Dh] in the model's dtype, N = literal tokens of the block + P; the keys are
    rotated for positions 0..N-1, so the block comes first and the text starts at position N.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    digest: str
    """Identity: the artefact's sha256, or a hash of the tensors for vectors made elsewhere."""
    name: str = ""
    method: str = ""
    block: Block | None = None
    template: TaskTemplate | None = None
    labels: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    after: Tensor | None = None
    """Rows [S, D] of soft slots behind the text; they take the embeddings path."""

    @property
    def num_positions(self) -> int:
        """N."""
        return self.keys[0].shape[1]

    @property
    def num_after(self) -> int:
        """S."""
        return 0 if self.after is None else self.after.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def cache(
        self, batch_size: int = 1, kind: Literal["dynamic", "static"] = "dynamic", max_len: int = 0, config: Any = None
    ) -> Any:
        """Return a transformers cache that holds this prefix for `batch_size` rows.

        `static` needs the model's `config` and `max_len`, the longest sequence in tokens, prefix included.
        """
        from transformers import DynamicCache, StaticCache

        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=config, max_cache_len=max_len)
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(key.expand(batch_size, -1, -1, -1), value.expand(batch_size, -1, -1, -1), index)
        return cache


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a sha256 over names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
