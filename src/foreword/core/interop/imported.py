"""What all imports share: reading files without trusting them, and making an artefact of foreign vectors."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from foreword import __version__
from foreword.core.artefact import Artefact, ArtefactHeader, file_sha256, save_artefact
from foreword.core.block import Block
from foreword.core.model import FrozenModel
from foreword.core.spec import Method
from foreword.core.template import TaskTemplate
from foreword.errors import ArtefactCorrupt, ArtefactError, ConfigError, IncompatibleModel

MAX_JSON_BYTES = 16 * 2**20
PICKLE_ERRORS: tuple[type[Exception], ...] = (pickle.UnpicklingError, struct.error, RuntimeError, OSError, EOFError)
PICKLE_ERRORS += (AssertionError, ImportError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What torch.load raises on files that are no checkpoint, or hold more than tensors."""


def make_artefact(
    base: FrozenModel,
    method: Method,
    tensors: Mapping[str, Tensor],
    *,
    file: Path,
    source: Mapping[str, Any],
    template: TaskTemplate | None = None,
    task: str | None = None,
    out: str | Path | None = None,
) -> Artefact:
    """Make an artefact of `tensors` that were read from `file`; write it to `out` where given.

    The vectors stand before BOS, as in the toolkits they come from; floats other than bfloat16 become float32. The
    header has the base's fingerprint, and in `training.imported_from` the file's name and sha256 and `source`.
    Raises IncompatibleModel where a shape does not fit the base or the base cannot hold the block, ArtefactCorrupt
    where a value is NaN or Inf.
    """
    num = next(iter(tensors.values())).shape[0 if method == "prompt" else 1]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    origin = {**source, "file": file.name, "sha256": file_sha256(file), "dtype": ", ".join(dtypes)}
    block = leading_block(base, num, template)
    rendering = {**template.to_json(), "sha256": template.sha256(base.tokenizer)} if template is not None else None
    header = ArtefactHeader(
        method=method,
        task=task or file.resolve().parent.name,
        block=block,
        base=base.fingerprint,
        spec=base.spec,
        template=rendering,
        training={"imported_from": origin},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        foreword=__version__,
    )
    expected = header.tensor_shapes()
    for name, tensor in tensors.items():
        check_shape(file, name, tuple(tensor.shape), expected[name])
    base.check_holds(header.block.num_positions)
    whole = {name: _storable(file, name, tensor) for name, tensor in tensors.items()}
    if len({tensor.dtype for tensor in whole.values()}) > 1:
        whole = {name: tensor.float() for name, tensor in whole.items()}
    if out is not None:
        return save_artefact(out, header, whole)
    with tempfile.TemporaryDirectory() as folder:  # written once, so that the sha256 is the file's own
        return dataclasses.replace(save_artefact(Path(folder, "artefact"), header, whole), path=None)


def leading_block(base: FrozenModel, num_vectors: int, template: TaskTemplate | None) -> Block:
    """Return the block with all vectors first; BOS and hard text follow them.

    A template must open with its one slot, of `num_vectors`, since that is where these vectors were trained. Raises
    ConfigError where it does not, or where `base` has no tokenizer to render it.
    """
    if template is None:
        return Block((num_vectors,))
    if base.tokenizer is None:
        raise ConfigError("a template needs the base's tokenizer", hint="Load the base with its tokenizer.")
    slot = f"{{soft:{num_vectors}}}"
    if template.num_after or template.num_left != num_vectors or not template.text.startswith(slot):
        raise ConfigError(
            f"template {template.text!r} has {template.num_left} vectors left of the input, {template.num_after} "
            f"right of it; the file has {num_vectors}, which stand before all text",
            hint=f"Open the template with {slot} and put in no other slot.",
        )
    segments = template.block(base.tokenizer).segments
    literals = [segment for segment in segments if not isinstance(segment, int)]
    return Block.of([num_vectors, *literals])


def check_shape(file: Path, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise IncompatibleModel with both shapes where they differ."""
    if tuple(found) != tuple(expected):
        raise IncompatibleModel(
            f"{file}: {name!r} has shape {list(found)}, this base needs {list(expected)}",
            hint="Give the base that these vectors were trained for.",
        )


def check_number(file: Path, name: str, found: object, expected: int) -> None:
    """Raise IncompatibleModel with both numbers where a file's own figure is not the base's; None is unknown."""
    if found is not None and found != expected:
        raise IncompatibleModel(
            f"{file}: {name} is {found!r} in the file, {expected} in this base",
            hint="Give the base that these vectors were trained for.",
        )


def uniform_heads(base: FrozenModel) -> tuple[int, int]:
    """Return (Hkv, Dh) of all layers. Raises IncompatibleModel where layers, or keys and values, differ."""
    layers = base.spec.layers
    first = layers[0]
    for index, layer in enumerate(layers):
        shape = (layer.num_kv_heads, layer.head_dim, layer.value_dim)
        if shape != (first.num_kv_heads, first.head_dim, first.head_dim):
            raise IncompatibleModel(
                f"layer {index} of this base keeps {shape[0]} heads of {shape[1]} (keys) and {shape[2]} (values), "
                f"layer 0 {first.num_kv_heads} of {first.head_dim}; this format has one shape for all",
                hint="Keep these vectors in foreword's own file.",
            )
    return first.num_kv_heads, first.head_dim


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ArtefactError when it cannot be opened, ArtefactCorrupt when it is not one."""
    try:
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise ArtefactCorrupt(f"{file}: {size} bytes where at most {MAX_JSON_BYTES} are read")
        data = json.loads(file.read_bytes())
    except OSError as error:
        refuse_unreadable(file, error)
    except (ValueError, RecursionError) as error:
        raise ArtefactCorrupt(f"{file}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ArtefactCorrupt(f"{file}: holds a {type(data).__name__}, not an object")
    return data


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ArtefactError when it cannot be opened, ArtefactCorrupt when it is broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(file.read_bytes())
    except OSError as error:
        refuse_unreadable(file, error)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtefactCorrupt(f"{file}: {error}") from error
    return tensors


def read_pickle(file: Path, allowed: Sequence[type] = ()) -> Any:
    """Read a torch checkpoint that holds tensors in plain containers, and `allowed` classes; nothing in it is run.

    Raises ArtefactError when the file is missing, ArtefactCorrupt when it asks for anything else.
    """
    if not file.is_file():
        refuse_unreadable(file, FileNotFoundError(2, "No such file"))
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols; what they cannot say is an error below
            return torch.load(file, map_location="cpu", weights_only=True)
    except PICKLE_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ArtefactCorrupt(
            f"{file}: not a plain checkpoint of tensors ({type(error).__name__}: {reason})",
            hint="Nothing in it was run. Where you trust it, save its tensors as .safetensors yourself.",
        ) from error


def is_plain(tensor: object) -> bool:
    """Return whether this is a dense floating point tensor that owns as many bytes as its shape says."""
    return (
        isinstance(tensor, Tensor)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_floating_point()
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def refuse_unreadable(file: Path, error: OSError) -> NoReturn:
    """Raise ArtefactError for a file that cannot be opened."""
    raise ArtefactError(f"cannot read {file}: {error.strerror}", hint="Check the path.") from error


def _storable(file: Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ArtefactCorrupt(f"{file}: {name!r} is {str(tensor.dtype).removeprefix('torch.')}, not floating point")
    tensor = tensor.detach() if tensor.dtype is torch.bfloat16 else tensor.detach().float()
    if not bool(torch.isfinite(tensor).all()):
        raise ArtefactCorrupt(f"{file}: {name!r} holds NaN or Inf", hint="Get the file again, or train again.")
    return tensor.contiguous()
