"""The embeddings-only form, for platforms that allow no plug-in: a whole sequence goes to vLLM as `prompt_embeds`.

This process holds the base's input embedding, memory-mapped from its safetensors, and writes the rows of literal
tokens, trained vectors and text itself. Only prompt tuning can go this way, soft slots behind the text included.
Torch is imported with the first version, since vLLM reads `torch.save`; importing this file imports none.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.core.artefact import load_artefact
from foreword.core.block import Block
from foreword.engine.render import Prepared
from foreword.errors import BackendFailed, ConfigError, IncompatibleModel
from foreword.serve.engines.base_info import BaseInfo, check_served
from foreword.serve.engines.http_backend import Loaded
from foreword.serve.engines.vllm_backend import CompletionsBackend
from foreword.serve.vllm.wire import cache_salt

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
"""How the names of input embeddings end."""
TIED_NAME = "lm_head.weight"
PLAIN = frozenset(
    "llama mistral mixtral qwen2 qwen3 qwen3_moe phi3 olmo2 smollm3 starcoder2 cohere granite gpt2 gpt_neox opt bloom "
    "falcon stablelm".split()
)
"""Model types whose layers read the table's rows as they are, or change them the same way in vLLM and transformers."""
SCALED = frozenset({"gemma", "gemma2", "gemma3_text"})
"""Model types whose embedding multiplies its rows by the square root of D."""


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """The input embedding of a base: rows [..., D] of token ids, in the base's dtype."""

    weight: Tensor
    """[V, D], memory-mapped."""
    dtype: str
    scale: float = 1.0

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Return the rows [T, D] that a base's layers take for `ids`."""
        import torch

        rows = self.weight[torch.tensor(ids, dtype=torch.long)].to(getattr(torch, self.dtype))
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale).to(rows.dtype)


def open_table(base: BaseInfo) -> EmbeddingTable:
    """Map the input embedding of a base's folder.

    Raises IncompatibleModel for a model type whose rows are not known to be right, ConfigError where the folder has no
    such tensor of the base's shape in safetensors.
    """
    from safetensors import safe_open

    kind, spec = base.spec.model_type, base.spec
    if kind not in PLAIN | SCALED or spec.embed_size != spec.hidden_size:
        raise IncompatibleModel(
            f"how {kind!r} treats embeddings on vLLM is not known to be what it was trained with",
            hint="Serve this base with the plug-in (--vllm-mode plugin).",
        )
    scale = spec.hidden_size**0.5 if kind in SCALED else 1.0
    for suffixes in (NAMES, (TIED_NAME,)):
        for file, name in _tensor_names(Path(base.folder)):
            if name.endswith(suffixes):
                with safe_open(file, framework="pt") as tensors:
                    weight = tensors.get_tensor(name)
                if tuple(weight.shape) == (spec.vocab_size, spec.embed_size) and weight.is_floating_point():
                    return EmbeddingTable(weight, base.dtype, scale)
    raise ConfigError(
        f"{base.folder} holds no input embedding of shape {[spec.vocab_size, spec.embed_size]} in safetensors",
        hint="Save the base with save_pretrained; a quantised embedding cannot be read.",
    )


def _tensor_names(folder: Path) -> list[tuple[Path, str]]:
    """Return file and name of every tensor of a base."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        return [(folder / file, name) for name, file in sorted(names.items())]
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found += [(file, name) for name in tensors.keys()]  # not a dict
    return found


@dataclass(frozen=True, eq=False)
class _Rows:
    """A version's own rows, in the base's dtype."""

    block: Tensor
    """[N, D]."""
    after: Tensor | None
    """[S, D]."""


class EmbeddingsBackend(CompletionsBackend):
    """The backend over vLLM servers that were started with --enable-prompt-embeds, without the plug-in."""

    def __init__(self, base: BaseInfo, tokenizer: Any, urls: Sequence[str], **options: Any) -> None:
        super().__init__(base, tokenizer, urls, **options)
        self._table: EmbeddingTable | None = None

    async def load(self, sha256: str, path: Path) -> int:
        """Check an artefact, make its rows, prove it on the replica that its requests go to; return its bytes.

        Raises IncompatibleModel for a prefix, which no embeddings can carry.
        """
        await self.start()
        header = await self.read(path, sha256)
        check_served(self.base, header, max_model_len=self.pool.max_model_len, by_embeddings=True)
        rows = await self.in_thread(lambda: self._rows(path, header.block))
        task = Loaded.of(header, sha256, rows)
        await self.prove(task)
        self.loaded[sha256] = task
        return sum(part.nbytes for part in (rows.block, rows.after) if part is not None)

    def _rows(self, path: Path, block: Block) -> _Rows:
        import torch

        from foreword.core.prompt import SoftPrompt

        if self._table is None:
            self._table = open_table(self.base)
        vectors = load_artefact(path).vectors
        assert isinstance(vectors, SoftPrompt), "check_served lets nothing else through"
        rows = self._table.rows(block.literal_ids())
        rows[torch.tensor(block.soft_positions(), dtype=torch.long)] = vectors.vectors.to(rows.dtype)
        return _Rows(rows, None if vectors.after is None else vectors.after.to(rows.dtype))

    async def prompt_fields(self, task: Loaded, prepared: Prepared, scope: str) -> dict[str, Any]:
        """Return the whole sequence as embeddings."""
        data = await self.in_thread(lambda: self.encoded(task.payload, prepared))
        return {"prompt_embeds": data, "cache_salt": cache_salt(scope, task.sha256)}

    def encoded(self, own: _Rows, prepared: Prepared) -> str:
        """Return the rows of block and text as vLLM reads them. Raises BackendFailed where one is no number."""
        import torch

        assert self._table is not None
        text = self._table.rows(prepared.ids)
        for offset, first, count in prepared.slots:
            assert own.after is not None, "rendering checks that the slots have vectors"
            text[offset : offset + count] = own.after[first : first + count]
        rows = torch.cat([own.block, text])
        if rows.shape[1] != self.base.spec.hidden_size or not bool(rows.isfinite().all()):
            raise BackendFailed(
                f"embeddings of width {rows.shape[1]} for a base of {self.base.spec.hidden_size}, or not all finite",
                hint="Is the base's folder whole? `foreword doctor` checks it.",
            )
        file = io.BytesIO()
        torch.save(rows, file)
        return base64.b64encode(file.getbuffer()).decode()
