"""The artefact: one `.safetensors` file with a task's vectors and a JSON header that says what they belong to.

Reading and checking the header imports no torch, so that the registry and the gateway can do it; only
`load_artefact` and `save_artefact` touch tensors. The sha256 of the file is its identity.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.core.block import Block
from foreword.core.spec import Fingerprint, Method, ModelSpec
from foreword.core.template import TaskTemplate
from foreword.errors import ArtefactCorrupt, ArtefactError, ConfigError

if TYPE_CHECKING:
    import torch

    from foreword.core.prompt import Vectors

FORMAT = 1
METADATA_KEY = "foreword"
MAX_HEADER_BYTES = 16 * 2**20
MAX_DIGITS = 40
"""Of a whole number in a header: far above any size or seed, and no work to multiply."""
MAX_DIMENSIONS = 8
ITEMSIZES = {"F32": 4, "BF16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtefactHeader:
    """Everything about a task's vectors except the vectors."""

    method: Method
    task: str
    block: Block
    """Literal tokens and vectors that stand in front of every row's text."""
    soft_after: int = 0
    """Vectors behind the block (soft slots right of the input); the last rows of the tensor. Method `prompt` only."""
    base: Fingerprint
    spec: ModelSpec
    template: Mapping[str, Any] | None = None
    """How a row is rendered (`TaskTemplate.to_json`), or None for vectors made elsewhere."""
    labels: tuple[str, ...] = ()
    """The closed set of answers, where the task has one."""
    metric: str = ""
    max_new_tokens: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    """Resolved configuration, data hash, seed, steps, versions, curves' summary."""
    parent: str | None = None
    """sha256 of the artefact that training started from."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    conformance: tuple[Mapping[str, Any], ...] = ()
    """Probe inputs with the top-20 next-token log-probabilities as trained (core/conformance.py)."""
    created: str = ""
    foreword: str = ""

    @property
    def num_vectors(self) -> int:
        """P, with those behind the input."""
        return self.block.num_soft + self.soft_after

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_json` is its inverse."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["block"], data["base"], data["spec"] = self.block.to_json(), self.base.to_json(), self.spec.to_json()
        data["labels"], data["conformance"] = list(self.labels), list(self.conformance)
        return {"format": FORMAT, **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArtefactHeader:
        """Build the header from `to_json`'s dict. Raises ArtefactCorrupt on unknown or missing fields."""
        known = {f.name for f in dataclasses.fields(cls)}
        fields = dict(data)
        if fields.pop("format", None) != FORMAT:
            raise ArtefactCorrupt(
                f"artefact format {data.get('format')!r} is not {FORMAT}",
                hint="Update foreword, or export the artefact again with the version that wrote it.",
            )
        if unknown := sorted(fields.keys() - known):
            raise ArtefactCorrupt(f"unknown field {unknown[0]!r} in the artefact's header")
        try:
            for name in ("block", "labels", "conformance"):
                if not isinstance(fields.get(name, []), list):
                    raise ArtefactCorrupt(f"{name} {fields[name]!r} in the artefact's header is not a list")
            fields["block"] = Block.from_json(fields["block"])
            fields["base"] = Fingerprint(**fields["base"])
            fields["spec"] = ModelSpec.from_json(fields["spec"])
            fields["labels"] = tuple(fields.get("labels", ()))
            fields["conformance"] = tuple(fields.get("conformance", ()))
            header = cls(**fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtefactCorrupt(f"the artefact's header is incomplete: {error}") from error
        if odd := header.first_wrong_field():
            raise ArtefactCorrupt(f"the artefact's header has a wrong {odd}: {data.get(odd)!r:.200}")
        return header

    def first_wrong_field(self) -> str | None:
        """Return the name of the first field whose value is of a wrong kind or out of range, or None."""
        checks = {
            "method": self.method in ("prompt", "prefix", "kv"),
            "spec": _is_spec(self.spec),
            "base": all(isinstance(value, str) for value in self.base.to_json().values()),
            "soft_after": _is_count(self.soft_after) and (self.soft_after == 0 or self.method == "prompt"),
            "template": self.template is None or _is_template(self.template),
            "labels": all(isinstance(label, str) for label in self.labels),
            "max_new_tokens": self.max_new_tokens is None or _is_count(self.max_new_tokens, least=1),
            "training": isinstance(self.training, Mapping),
            "parent": self.parent is None or isinstance(self.parent, str),
            "evaluation": isinstance(self.evaluation, Mapping),
            "conformance": all(isinstance(probe, Mapping) for probe in self.conformance),
        }
        checks |= {name: isinstance(getattr(self, name), str) for name in ("task", "metric", "created", "foreword")}
        for name, holds in checks.items():
            if not holds:
                return name
        for segment in self.block.segments:
            ids = segment if isinstance(segment, tuple) else ()
            whole = isinstance(segment, tuple) or _is_count(segment)
            if not whole or not all(_is_count(token) and token < self.spec.vocab_size for token in ids):
                return "block"
        return None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors that the file must hold, by name."""
        num, spec = self.num_vectors, self.spec
        if self.method == "prompt":
            return {"prompt": (num, spec.embed_size)}
        if self.method == "prefix":
            return {"prefix": (spec.num_layers, num, spec.hidden_size)}
        shapes: dict[str, tuple[int, ...]] = {}
        for index, layer in enumerate(spec.layers):
            shapes[f"key.{index}"] = (layer.num_kv_heads, num, layer.head_dim)
            shapes[f"value.{index}"] = (layer.num_kv_heads, num, layer.value_dim)
        return shapes


def _is_count(value: object, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _is_spec(spec: ModelSpec) -> bool:
    sizes = [spec.hidden_size, spec.embed_size, spec.vocab_size]
    sizes += [size for layer in spec.layers for size in (layer.num_kv_heads, layer.head_dim, layer.value_dim)]
    limits = [spec.max_positions, *(layer.window for layer in spec.layers)]
    sizes += [limit for limit in limits if limit is not None]
    named = isinstance(spec.model_type, str) and _is_count(spec.num_parameters)
    return named and bool(spec.layers) and all(_is_count(size, least=1) for size in sizes)


def _is_template(template: object) -> bool:
    if not isinstance(template, Mapping):
        return False
    try:
        TaskTemplate.from_json(template)
    except (ConfigError, KeyError, TypeError, AttributeError, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Artefact:
    """A loaded artefact: header and tensors (on the CPU). `sha256` is that of the whole file."""

    header: ArtefactHeader
    tensors: Mapping[str, torch.Tensor]
    sha256: str
    path: Path | None = None

    @property
    def vectors(self) -> Vectors:
        """The vectors as SoftPrompt, SoftPrefix or SoftKV."""
        from foreword.core.prompt import vectors_from_tensors

        return vectors_from_tensors(self.tensors, self.header.block)

    @property
    def num_bytes(self) -> int:
        """Bytes of the vectors alone."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def read_header(path: str | Path) -> ArtefactHeader:
    """Read and check the header of an artefact without reading its tensors.

    Raises ArtefactCorrupt when the file is truncated, has foreign or missing tensors, a wrong shape or dtype, or an
    oversized header; ArtefactError when it cannot be opened.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _parse_header(path, size, file.read(8), file.read)
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}", hint="Check the path.") from error


def _parse_header(path: Path, size: int, prefix: bytes, read: Any) -> ArtefactHeader:
    metadata, found = read_layout(path, size, prefix, read, METADATA_KEY, ITEMSIZES)
    try:
        header = ArtefactHeader.from_json(metadata)
    except ArtefactCorrupt as error:
        raise _corrupt(path, error.message) from error
    expected = header.tensor_shapes()
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())[0]
        raise _corrupt(path, f"tensor {odd!r} is {'foreign' if odd in found else 'missing'} for method {header.method}")
    for name, (shape, _) in found.items():
        if shape != expected[name]:
            raise _corrupt(path, f"tensor {name!r} has shape {list(shape)}, the header says {list(expected[name])}")
    return header


Layout = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype (safetensors' code) of every tensor of a file."""


def read_layout(
    path: Path, size: int, prefix: bytes, read: Any, key: str, itemsizes: Mapping[str, int]
) -> tuple[Mapping[str, Any], Layout]:
    """Read the metadata under `key` and the tensors' layout of a safetensors file of `size` bytes, strictly.

    `prefix` is its first 8 bytes, `read(n)` gives the n bytes behind them. All tensors have one dtype of `itemsizes`,
    lie next to each other and fill the file. Raises ArtefactCorrupt.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise _corrupt(path, f"not a safetensors file (header of {length} bytes in a file of {size})")
    try:
        table = _read_json(read(length))
        metadata = _read_json(table.pop("__metadata__")[key])
        found = {name: _tensor_entry(info) for name, info in table.items()}
        metadata.keys()
    except ArtefactCorrupt as error:
        raise _corrupt(path, error.message) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(path, f"no foreword header ({type(error).__name__}: {error})") from error
    end, dtypes = 0, {dtype for _, dtype, _, _ in found.values()}
    if len(dtypes) > 1 or not dtypes <= itemsizes.keys():
        raise _corrupt(path, f"dtype {', '.join(sorted(dtypes))} where {' or '.join(itemsizes)} is allowed")
    for name, (shape, dtype, start, stop) in sorted(found.items(), key=lambda item: item[1][2:]):
        count = math.prod(shape) * itemsizes[dtype]
        if start != end or stop - start != count:
            raise _corrupt(path, f"tensor {name!r} lies at bytes {start} to {stop}, expected {end} to {end + count}")
        end = stop
    if 8 + length + end != size:
        raise _corrupt(path, f"{size} bytes where the header needs {8 + length + end}")
    return metadata, {name: (shape, dtype) for name, (shape, dtype, _, _) in found.items()}


def _corrupt(path: Path, what: str) -> ArtefactCorrupt:
    shown = what.encode(errors="backslashreplace").decode()[:400]  # it quotes the file, which may hold anything
    return ArtefactCorrupt(f"{path}: {shown}", hint="Get the file again; its sha256 tells whether it is whole.")


def _read_json(text: str | bytes) -> Any:
    """Parse JSON of a header. Raises ValueError or ArtefactCorrupt where it is none, or holds half a character."""
    data = json.loads(text, object_pairs_hook=_without_repeats, parse_int=_whole_number)
    json.dumps(data, ensure_ascii=False).encode()  # refuses halves of surrogate pairs
    return data


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ArtefactCorrupt(f"a number of {len(digits)} digits stands in the header")
    return int(digits)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; of two equal keys two readers may take different ones, so they are refused."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ArtefactCorrupt(f"{counts.most_common(1)[0][0]!r} stands twice in the header")
    return found


def _tensor_entry(info: Mapping[str, Any]) -> tuple[tuple[int, ...], str, int, int]:
    """Return (shape, dtype, start, stop) of one tensor. Raises KeyError, TypeError or ValueError where it is none."""
    shape, dtype, (start, stop) = info["shape"], info["dtype"], info["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise ValueError(f"dtype {dtype!r}, shape {shape!r}")
    if len(shape) > MAX_DIMENSIONS or not all(_is_count(number) for number in (*shape, start, stop)):
        raise ValueError(f"shape {shape!r}, data_offsets {[start, stop]!r}")
    return tuple(shape), dtype, start, stop


def read_whole(path: Path) -> bytes:
    """Return a file's bytes. Raises ArtefactError when it cannot be read or is larger than the memory."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}", hint="Check the path.") from error
    except MemoryError:
        raise ArtefactError(
            f"{path} has {path.stat().st_size} bytes, more than there is memory for", hint="Check what wrote it."
        ) from None


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_artefact(path: str | Path) -> Artefact:
    """Load an artefact: header and tensors (in the header's order), checked; needs no model.

    Raises ArtefactCorrupt as `read_header` does, and where a value is NaN or Inf.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    read_header(path)  # refuses a file whose size is not its header's before all of it is in memory
    data = read_whole(path)
    header = _parse_header(path, len(data), data[:8], lambda length: data[8 : 8 + length])
    try:
        loaded = load(data)  # in any order, another one in each process
    except SafetensorError as error:
        raise ArtefactCorrupt(f"{path}: {error}") from error
    tensors = {name: loaded[name] for name in header.tensor_shapes()}
    _check_finite(path, tensors)
    return Artefact(header, tensors, hashlib.sha256(data).hexdigest(), path)


def _check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ArtefactCorrupt(
                f"{path}: tensor {name!r} holds NaN or Inf", hint="Train again from the last good checkpoint."
            )


def save_artefact(path: str | Path, header: ArtefactHeader, tensors: Mapping[str, torch.Tensor]) -> Artefact:
    """Write an artefact to a temporary file, fsync and rename it to `path`; return it as `load_artefact` would.

    `tensors` must have the header's names and shapes and be all float32 or all bfloat16 (ValueError otherwise), without
    NaN or Inf (ArtefactCorrupt). Nothing is left behind on failure.
    """
    from safetensors.torch import save

    path = Path(path)
    expected = header.tensor_shapes()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        raise ValueError(f"tensors {shapes} do not fit the header's {expected}")
    if {str(tensor.dtype) for tensor in tensors.values()} not in ({"torch.float32"}, {"torch.bfloat16"}):
        raise ValueError(f"tensors of {sorted({str(t.dtype) for t in tensors.values()})}, not float32 or bfloat16")
    if odd := header.first_wrong_field():
        raise ValueError(f"the header's {odd} is {getattr(header, odd)!r:.200}")
    whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    _check_finite(path, whole)
    data = save(whole, metadata={METADATA_KEY: json.dumps(header.to_json(), sort_keys=True)})
    write_atomically(path, data)
    return Artefact(header, whole, hashlib.sha256(data).hexdigest(), path)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, also after a crash.

    Raises ArtefactError when the disk is full or the folder cannot be written; nothing is left behind then.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ArtefactError(
            f"cannot write {path} ({len(data)} bytes): {error.strerror}", hint="Free space or choose another folder."
        ) from error
