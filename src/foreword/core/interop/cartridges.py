"""Cartridges' `.pt`: keys and values per layer, without a word on the base they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foreword.core.artefact import Artefact
from foreword.core.interop.imported import check_number, is_plain, make_artefact, read_pickle
from foreword.core.model import FrozenModel
from foreword.core.template import TaskTemplate
from foreword.errors import ArtefactCorrupt, IncompatibleModel

FIXED_NAMES = ("fixed", "frozen")


def import_cartridge_pt(
    path: str | Path,
    base: FrozenModel,
    *,
    template: TaskTemplate | None = None,
    task: str | None = None,
    out: str | Path | None = None,
) -> Artefact:
    """Import a cartridge: `trainable_keys`, `trainable_values` and their `fixed_` or `frozen_` rows, which come first.

    Each is a list of L tensors [1, Hkv, n, Dh], or all are [1, n, Hkv, Dh] where only that fits the base; fixed lists
    may be empty. Keys lie as in the cache, rotated for positions 0..P-1, so the vectors stand before BOS; a `template`
    says what else follows them; `task` defaults to the file's name. Of classes the file may name torch.nn.ParameterList
    alone: anything else is refused with ArtefactCorrupt and not run. Raises IncompatibleModel where layers, heads or
    head dimension are not the base's. Source: github.com/HazyResearch/cartridges, arXiv:2506.06266.
    """
    path = Path(path)
    data = read_pickle(path, allowed=[nn.ParameterList])
    if not isinstance(data, dict) or not {"trainable_keys", "trainable_values"} <= data.keys():
        found = ", ".join(sorted(map(str, data))) if isinstance(data, dict) else type(data).__name__
        raise ArtefactCorrupt(
            f"{path}: a cartridge has trainable_keys and trainable_values, this has {found or 'none'}"
        )
    known = {f"{part}_{kind}" for part in ("trainable", *FIXED_NAMES) for kind in ("keys", "values")}
    if foreign := sorted(map(str, data.keys() - known)):
        raise ArtefactCorrupt(f"{path}: foreign entry {foreign[0]!r} in a cartridge")
    entries = {name: _tensors(path, data, name, base) for name in _entry_names(path, data)}
    head_axis = 1 if all(_fits(entries, base, 1)) else 2
    _check_heads(path, entries, base, head_axis)
    tensors: dict[str, Tensor] = {}
    for kind, kept in (("keys", "key"), ("values", "value")):
        parts = [rows for name, rows in entries.items() if name.endswith(kind)]
        for index, layer in enumerate(zip(*parts, strict=True)):
            rows = torch.cat([part[0].transpose(0, head_axis - 1) for part in layer], dim=1)  # [Hkv, P, Dh]
            tensors[f"{kept}.{index}"] = rows
    num_fixed = sum(rows[0].shape[3 - head_axis] for name, rows in entries.items() if name.endswith("keys"))
    num_fixed -= entries["trainable_keys"][0].shape[3 - head_axis]
    source = {"format": "cartridges", "num_fixed": num_fixed}
    task = task or path.stem
    return make_artefact(base, "kv", tensors, file=path, source=source, template=template, task=task, out=out)


def _entry_names(path: Path, data: Mapping[str, Any]) -> list[str]:
    """Return the entries that hold rows, fixed ones first."""
    names = []
    for kind in ("keys", "values"):
        fixed = [name for prefix in FIXED_NAMES if (name := f"{prefix}_{kind}") in data and _is_filled(data[name])]
        if len(fixed) > 1:
            raise ArtefactCorrupt(f"{path}: both {fixed[0]} and {fixed[1]}")
        names += [*fixed, f"trainable_{kind}"]
    return names


def _is_filled(entry: object) -> bool:
    return not isinstance(entry, nn.ParameterList | list | tuple) or len(entry) > 0


def _tensors(path: Path, data: Mapping[str, Any], name: str, base: FrozenModel) -> list[Tensor]:
    entry = data[name]
    if not isinstance(entry, nn.ParameterList | list | tuple):
        raise ArtefactCorrupt(f"{path}: {name} is a {type(entry).__name__}, not a list of tensors")
    check_number(path, f"the number of layers in {name}", len(entry), base.spec.num_layers)
    tensors = list(entry)
    for index, tensor in enumerate(tensors):
        if not is_plain(tensor) or tensor.ndim != 4:
            raise ArtefactCorrupt(f"{path}: {name}[{index}] is not a dense floating point tensor [1, Hkv, P, Dh]")
    return [tensor.detach() for tensor in tensors]


def _fits(entries: Mapping[str, Sequence[Tensor]], base: FrozenModel, head_axis: int) -> Iterator[bool]:
    """Yield for each tensor whether its heads on `head_axis` and its width are the base's."""
    for name, tensors in entries.items():
        for tensor, layer in zip(tensors, base.spec.layers, strict=True):
            width = layer.head_dim if name.endswith("keys") else layer.value_dim
            yield (tensor.shape[0], tensor.shape[head_axis], tensor.shape[3]) == (1, layer.num_kv_heads, width)


def _check_heads(path: Path, entries: Mapping[str, Sequence[Tensor]], base: FrozenModel, head_axis: int) -> None:
    places = [(name, index, tensor) for name, tensors in entries.items() for index, tensor in enumerate(tensors)]
    for (name, index, tensor), fits in zip(places, _fits(entries, base, head_axis), strict=True):
        if not fits:
            layer = base.spec.layers[index]
            width = layer.head_dim if name.endswith("keys") else layer.value_dim
            needed = f"[1, {layer.num_kv_heads}, P, {width}]"
            raise IncompatibleModel(
                f"{path}: {name}[{index}] has shape {list(tensor.shape)}, this base needs {needed}",
                hint="Give the base that these vectors were trained for.",
            )
