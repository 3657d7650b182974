"""The compiled file: a version's keys and values, ready for an engine that cannot compile (vLLM).

One `.safetensors` file with `key.{l}`, `value.{l}` [Hkv, N, Dh] for the N positions of the block (literal tokens and
vectors), keys rotated for positions 0..N-1, and a small JSON header. It is derived: the artefact stays the truth, and
compiling it again on the same base gives the same numbers. The sha256 of the file is the name under which an engine
asks for it. Reading the header imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.core.artefact import ITEMSIZES, MAX_HEADER_BYTES, read_layout, read_whole, write_atomically
from foreword.core.spec import Fingerprint, ModelSpec
from foreword.errors import ArtefactCorrupt, ArtefactError, IncompatibleModel

if TYPE_CHECKING:
    import torch

    from foreword.core.prompt import KVPrefix

FORMAT = 1
METADATA_KEY = "foreword_compiled"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledHeader:
    """What a compiled file holds and what it was made from."""

    source: str
    """sha256 of the artefact."""
    task: str
    base: Fingerprint
    spec: ModelSpec
    num_positions: int
    """N: literal tokens of the block and vectors."""
    dtype: str
    """float32, bfloat16 or float16: that of the base it was compiled on."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_json` is its inverse."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"format": FORMAT, **data, "base": self.base.to_json(), "spec": self.spec.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CompiledHeader:
        """Build the header from `to_json`'s dict. Raises ArtefactCorrupt on a wrong format, field or kind."""
        fields = dict(data)
        if fields.pop("format", None) != FORMAT:
            raise ArtefactCorrupt(
                f"compiled format {data.get('format')!r} is not {FORMAT}", hint="Compile the version again."
            )
        try:
            fields["base"] = Fingerprint(**fields["base"])
            fields["spec"] = ModelSpec.from_json(fields["spec"])
            header = cls(**fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtefactCorrupt(f"the compiled file's header is incomplete: {error}") from error
        texts = (header.source, header.task, header.dtype)
        if not all(isinstance(text, str) for text in texts) or header.dtype not in DTYPES.values():
            raise ArtefactCorrupt(f"the compiled file's header has a wrong source, task or dtype: {texts!r:.200}")
        if type(header.num_positions) is not int or header.num_positions < 1:
            raise ArtefactCorrupt(f"the compiled file's header has a wrong num_positions: {header.num_positions!r}")
        return header

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors that the file must hold, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for index, layer in enumerate(self.spec.layers):
            shapes[f"key.{index}"] = (layer.num_kv_heads, self.num_positions, layer.head_dim)
            shapes[f"value.{index}"] = (layer.num_kv_heads, self.num_positions, layer.value_dim)
        return shapes


def read_compiled_header(path: str | Path) -> CompiledHeader:
    """Read and check a compiled file's header and layout, not its values.

    Raises ArtefactCorrupt when it is truncated, or its tensors are not those of its header; ArtefactError when it
    cannot be opened.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _parse(path, path.stat().st_size, file.read(8), file.read)
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}", hint="Check the path.") from error


def _parse(path: Path, size: int, prefix: bytes, read: Any) -> CompiledHeader:
    metadata, layout = read_layout(path, size, prefix, read, METADATA_KEY, ITEMSIZES | {"F16": 2})
    try:
        header = CompiledHeader.from_json(metadata)
    except ArtefactCorrupt as error:
        raise ArtefactCorrupt(f"{path}: {error.message:.400}", hint=error.hint) from error
    expected = header.tensor_shapes()
    found = {name: shape for name, (shape, _) in layout.items()}
    if found != expected:
        odd = next(name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name))
        raise ArtefactCorrupt(
            f"{path}: tensor {odd!r:.200} has shape {found.get(odd)}, the header says {expected.get(odd)}",
            hint="Compile the version again.",
        )
    if dtypes := {dtype for _, dtype in layout.values()} - {code for code in DTYPES if DTYPES[code] == header.dtype}:
        raise ArtefactCorrupt(f"{path}: dtype {sorted(dtypes)[0]}, the header says {header.dtype}")
    return header


def load_compiled(
    path: str | Path, *, sha256: str | None = None
) -> tuple[CompiledHeader, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Read a compiled file: its header, and each layer's keys and values [Hkv, N, Dh] on the CPU.

    Raises ArtefactCorrupt as `read_compiled_header` does, where the file's digest is not `sha256`, and where a value
    is NaN or Inf; ArtefactError when it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    read_compiled_header(path)  # refuses a file whose size is not its header's before all of it is in memory
    data = read_whole(path)
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ArtefactCorrupt(
            f"{path} has sha256 {found}, {sha256} was asked for", hint="Compile the version again, or restore the blob."
        )
    header = _parse(path, len(data), data[:8], lambda length: data[8 : 8 + length])
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ArtefactCorrupt(f"{path}: {error}") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ArtefactCorrupt(f"{path}: tensor {name!r} holds NaN or Inf", hint="Compile the version again.")
    count = header.spec.num_layers
    return header, [(tensors[f"key.{layer}"], tensors[f"value.{layer}"]) for layer in range(count)]


def save_compiled(path: str | Path, prefix: KVPrefix, *, base: Fingerprint, spec: ModelSpec) -> CompiledHeader:
    """Write a compiled prefix atomically (temporary file, fsync, rename); return its header.

    Raises IncompatibleModel where the prefix has soft slots behind the text: they cannot lie in a cache.
    """
    from safetensors.torch import save

    if prefix.after is not None:
        raise IncompatibleModel(
            f"{prefix.name!r} has {prefix.after.shape[0]} soft slots behind the text, which no compiled file can hold",
            hint="Serve it by embeddings (--vllm-mode embeddings), or on the embedded engine.",
        )
    header = CompiledHeader(
        source=prefix.digest,
        task=prefix.name,
        base=base,
        spec=spec,
        num_positions=prefix.num_positions,
        dtype=str(prefix.keys[0].dtype).removeprefix("torch."),
    )
    tensors = {}
    for index, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        tensors[f"key.{index}"], tensors[f"value.{index}"] = key.cpu().contiguous(), value.cpu().contiguous()
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != header.tensor_shapes():
        raise ValueError(f"the prefix {prefix.name!r} does not fit the base's shapes")
    write_atomically(path, save(tensors, metadata={METADATA_KEY: json.dumps(header.to_json(), sort_keys=True)}))
    return header


__all__ = ["MAX_HEADER_BYTES", "CompiledHeader", "load_compiled", "read_compiled_header", "save_compiled"]
