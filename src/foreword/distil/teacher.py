"""The teacher's top-k log-probabilities at every learned token: computed once, kept on disk in small files.

A file's name is the hash of all that its numbers follow from: base, block, rows, learned places and k. So a refresh
computes only the rows that are new, and a killed run loses one file's rows at most.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from foreword.core.artefact import write_atomically
from foreword.core.forward import forward_rows
from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix
from foreword.train.data import Example, SoftTargets

VERSION = 1
ROWS_PER_FILE = 64
TOKENS_AT_ONCE = 8192
"""Padded tokens of one forward at most, those of the context in front of each row included."""

Count = Callable[[int, int], None]
"""Told how many files are done, and of how many."""


def teacher_targets(
    base: FrozenModel,
    block: KVPrefix,
    rows: Sequence[Example],
    k: int,
    cache: Path | None = None,
    on_file: Count | None = None,
) -> list[SoftTargets]:
    """Return the teacher's `k` likeliest tokens and their log-probabilities at each row's learned places.

    `block` is the context as a prefix. With `cache`, a folder, what is there is read and what is missing is written; a
    file that is broken is computed again, with a warning. k is at most the vocabulary.
    """
    k = min(k, base.spec.vocab_size)
    found: list[SoftTargets] = []
    parts = [rows[start : start + ROWS_PER_FILE] for start in range(0, len(rows), ROWS_PER_FILE)]
    for number, part in enumerate(parts, start=1):
        path = None if cache is None else cache / f"{_key(base, block, part, k)}.safetensors"
        whole = _read(path, part, k, base.spec.vocab_size) if path is not None else None
        if whole is None:
            whole = _compute(base, block, part, k)
            if path is not None:
                _write(path, whole)
        counts = [len(row.learned) for row in part]
        found += map(SoftTargets, torch.split(whole.ids, counts), torch.split(whole.log_probs, counts))
        if on_file is not None:
            on_file(number, len(parts))
    return found


def batches(rows: Sequence[Example], behind: int, tokens: int = TOKENS_AT_ONCE) -> Iterator[list[int]]:
    """Cut rows into parts of similar length, `tokens` padded tokens at most; yield their places.

    `behind` positions in front of each row count too.
    """
    part: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place].ids)):
        if part and (behind + len(rows[place].ids)) * (len(part) + 1) > tokens:
            yield part
            part = []
        part.append(place)
    if part:
        yield part


def logits_at_learned(base: FrozenModel, rows: Sequence[Example], prefixes: Sequence[KVPrefix | None]) -> Tensor:
    """Return the logits [N, V], float32, that predict the rows' learned tokens, each row behind its prefix."""
    longest = max(len(row.ids) for row in rows)
    places = [number * longest + place - 1 for number, row in enumerate(rows) for place in row.learned]
    select = torch.tensor(places, device=base.device)
    with torch.no_grad():
        return forward_rows(base, [row.ids for row in rows], prefixes, select=select).float()


def _compute(base: FrozenModel, block: KVPrefix, rows: Sequence[Example], k: int) -> SoftTargets:
    ids: list[Tensor] = [torch.empty(0)] * len(rows)
    log_probs: list[Tensor] = [torch.empty(0)] * len(rows)
    for part in batches(rows, block.num_positions):
        chosen = [rows[place] for place in part]
        top = logits_at_learned(base, chosen, [block] * len(part)).log_softmax(-1).topk(k)
        counts = [len(row.learned) for row in chosen]
        parts = zip(part, torch.split(top.indices, counts), torch.split(top.values, counts), strict=True)
        for place, own_ids, own in parts:
            ids[place], log_probs[place] = own_ids.cpu(), own.cpu()
    return SoftTargets(torch.cat(ids), torch.cat(log_probs))


def _key(base: FrozenModel, block: KVPrefix, rows: Sequence[Example], k: int) -> str:
    literal = block.block.literal_ids() if block.block is not None else [block.digest]
    what = [VERSION, base.fingerprint.to_json(), str(base.dtype), literal, k, [(row.ids, row.learned) for row in rows]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _write(path: Path, targets: SoftTargets) -> None:
    from safetensors.torch import save

    tensors = {"ids": targets.ids.to(torch.int32).contiguous(), "log_probs": targets.log_probs.contiguous()}
    write_atomically(path, save(tensors, metadata={"sha256": _digest(tensors)}))


def _read(path: Path, rows: Sequence[Example], k: int, vocab_size: int) -> SoftTargets | None:
    """Return what a file holds; None where there is none, or where it is broken, which is warned of."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    shape = [sum(len(row.learned) for row in rows), k]
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("ids", "log_probs")}
            is_whole = (file.metadata() or {}).get("sha256") == _digest(tensors)
    except (SafetensorError, OSError, TypeError) as error:
        why = str(error)
    else:
        ids, log_probs = tensors["ids"].long(), tensors["log_probs"]
        fits = list(ids.shape) == list(log_probs.shape) == shape and log_probs.dtype == torch.float32
        if is_whole and fits and bool((ids < vocab_size).all()) and bool((log_probs <= 0).all()):
            return SoftTargets(ids, log_probs)
        why = "its numbers are not those that were written"
    warnings.warn(f"{path} is broken ({why}); the teacher computes these rows again", stacklevel=4)
    return None


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{list(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
