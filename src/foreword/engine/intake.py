"""What may enter: prefixes that fit the base, requests that fit base and pool, and the rows made of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foreword.engine.answer import accept_forced
from foreword.engine.kvpool import BlockPool, count_blocks
from foreword.engine.render import Prepared
from foreword.engine.request import Chunk, Request
from foreword.engine.sequence import PrefixEntry, Sequence, Siblings
from foreword.engine.stream import TextStream
from foreword.errors import BadRequest, ConfigError, IncompatibleModel

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.core.prompt import KVPrefix
    from foreword.core.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was checked and rendered, and the prefix that its name meant at that time."""

    request: Request
    prepared: Prepared
    entry: PrefixEntry | None
    tokenizer: Any

    @property
    def num_prefix(self) -> int:
        """Positions of the prefix."""
        return self.entry.num_positions if self.entry else 0


def check_prefix(name: str, prefix: KVPrefix, base: FrozenModel, pool: BlockPool) -> None:
    """Raise IncompatibleModel where a prefix does not fit the base, ConfigError where it does not fit the pool."""
    _check_shapes(name, prefix, base.spec)
    base.check_holds(prefix.num_positions)
    num_after = prefix.after.shape[0] if prefix.after is not None else 0
    num_places = prefix.template.num_after if prefix.template is not None else num_after
    if num_after != num_places:
        raise IncompatibleModel(
            f"prefix {name!r} has {num_after} vectors for slots behind the text, its template has {num_places} slots"
        )
    needed = count_blocks(prefix.num_positions, pool.block_size) + 1
    if needed > pool.num_blocks:
        raise ConfigError(
            f"prefix {name!r} and one token behind it need {needed} blocks of {pool.block_size} positions, "
            f"the pool has {pool.num_blocks}",
            hint="Give the engine more kv_memory.",
        )


def _check_shapes(name: str, prefix: KVPrefix, spec: ModelSpec) -> None:
    for kind, tensors in (("keys", prefix.keys), ("values", prefix.values)):
        if len(tensors) != spec.num_layers:
            raise IncompatibleModel(
                f"prefix {name!r} has {kind} of {len(tensors)} layers, this base has {spec.num_layers}"
            )
        for index, (layer, tensor) in enumerate(zip(spec.layers, tensors, strict=True)):
            width = layer.head_dim if kind == "keys" else layer.value_dim
            expected = (layer.num_kv_heads, prefix.num_positions, width)
            if tuple(tensor.shape) != expected:
                raise IncompatibleModel(
                    f"prefix {name!r} has {kind} of shape {tuple(tensor.shape)} in layer {index}, "
                    f"this base needs {expected}"
                )


def check_length(job: Job, spec: ModelSpec, pool: BlockPool) -> None:
    """Raise BadRequest where a request is longer than the base or the pool can ever hold."""
    num_prompt, max_tokens = len(job.prepared.ids), job.prepared.max_tokens
    num_positions = job.num_prefix + num_prompt + max_tokens
    parts = f"prefix {job.num_prefix} + prompt {num_prompt} + max_tokens {max_tokens} = {num_positions} positions"
    if spec.max_positions is not None and num_positions > spec.max_positions:
        raise BadRequest(f"{parts}, the base takes {spec.max_positions}", hint="Send less text or lower max_tokens.")
    size = pool.block_size
    needed = count_blocks(job.num_prefix, size) + count_blocks(num_positions, size) - job.num_prefix // size
    needed += job.request.n > 1  # the prompt's last block is kept apart for the siblings
    if needed > pool.num_blocks:
        raise BadRequest(
            f"{parts} need {needed} blocks of {size}, the pool has {pool.num_blocks}",
            hint="Send less text, lower max_tokens, or give the engine more kv_memory.",
        )


def make_rows(job: Job, on_chunk: Callable[[Chunk], None], *, is_streaming: bool) -> list[Sequence]:
    """Return one row per completion; one whose choices leave nothing to decide has ended already."""
    request, prepared = job.request, job.prepared
    has_stream = job.tokenizer is not None and prepared.trie is None
    siblings = Siblings(request.n) if request.n > 1 else None
    soft = {place for offset, _, count in prepared.slots for place in range(offset, offset + count)}
    rows = []
    for index in range(request.n):
        row = Sequence(
            request=request,
            index=index,
            tokens=list(prepared.ids),
            num_prompt=len(prepared.ids),
            max_tokens=prepared.max_tokens,
            seed=request.seed if request.seed is not None else random.getrandbits(63),
            prefix=job.entry,
            slots=prepared.slots,
            siblings=siblings,
            on_chunk=on_chunk,
            is_streaming=is_streaming,
            stream=TextStream(job.tokenizer, request.stop) if has_stream else None,
            node=prepared.trie,
            seen={token for place, token in enumerate(prepared.ids) if place not in soft},
        )
        accept_forced(row)
        rows.append(row)
    return rows
