"""Is a file safe to open, and what it says it is? Read without loading, and without running anything in it."""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from foreword.core.artefact import MAX_HEADER_BYTES, METADATA_KEY, Artefact, load_artefact
from foreword.doctor.finding import Finding
from foreword.errors import ArtefactCorrupt, ForewordError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
MAX_PICKLE_BYTES = 16 * 2**20
"""Of a pickle's program, not its tensors; a checkpoint of vectors needs some hundred bytes."""
SAFE_IMPORTS = ("torch._utils ", "torch ", "collections OrderedDict", "torch._tensor ")
FIX = "Save the tensors as safetensors where they were made, and open that."


def open_artefact(path: Path) -> tuple[Artefact | None, Finding]:
    """Load an artefact after its header was checked; return it, or None, and the finding about the file.

    A pickle is never opened as one: its program is listed, without running it.
    """
    if finding := pickle_finding(path):
        return None, finding
    try:
        artefact = load_artefact(path)
    except ForewordError as error:
        fault = _fault_of(path) if isinstance(error, ArtefactCorrupt) else ""
        expected = "a safetensors file with a foreword header, whose shapes and bytes agree with it"
        return None, Finding(
            check="file",
            ok=False,
            measured=error.message,
            expected=expected,
            fix=error.hint,
            fault=_not_finite(error) or fault,
        )
    header = artefact.header
    what = f"{header.method}, P={header.num_vectors}, {artefact.num_bytes} bytes, {artefact.sha256[:12]}"
    return artefact, Finding(
        check="file",
        ok=True,
        measured=what,
        expected="a whole artefact",
        numbers={"num_bytes": artefact.num_bytes, "sha256": artefact.sha256},
    )


def pickle_finding(path: Path) -> Finding | None:
    """Return a finding where a file is a pickle, by its bytes or its name; what it would import is listed."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        return None  # opening it says why
    # a safetensors file may begin with the same two bytes: they are the length of its header then
    is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
    is_pickle = is_pickle and int.from_bytes(head, "little") + 8 > path.stat().st_size
    is_pickle = is_pickle or head[:4] == b"PK\x03\x04"
    if not is_pickle and path.suffix.lower() not in PICKLE_SUFFIXES:
        return None
    imports = _imports_of(path) if is_pickle else []
    foreign = [name for name in imports if not name.startswith(SAFE_IMPORTS)]
    kind = "a pickle, which can run code when it is loaded" if is_pickle else f"named {path.suffix}, as pickles are"
    asks = f"; it asks for {', '.join(name.replace(' ', '.') for name in foreign[:5])}" if foreign else ""
    return Finding(
        check="file",
        ok=False,
        measured=f"{path.name} is {kind}{asks}; it was not opened",
        expected="a safetensors file",
        fix="Do not load it; ask its maker for safetensors." if foreign else FIX,
        fault="unsafe-file",
        numbers={"imports": imports[:50]},
    )


def read_safetensors_table(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: shape, dtype and offsets by tensor, `__metadata__` where it has one.

    Raises ArtefactCorrupt where it is none, or its tensors do not fit the file; reads no tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, max(0, size - 8)):
                raise ArtefactCorrupt(f"{path}: a header of {length} bytes in a file of {size}")
            table = json.loads(file.read(length))
        with safe_open(path, "pt"):  # checks offsets and sizes
            pass
    except OSError as error:
        raise ArtefactCorrupt(f"cannot read {path}: {error.strerror}", hint="Check the path.") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ArtefactCorrupt(f"{path}: not a safetensors file ({error})", hint="Get the file again.") from error
    if not isinstance(table, dict):
        raise ArtefactCorrupt(f"{path}: its header is no object", hint="Get the file again.")
    return table


def _imports_of(path: Path) -> list[str]:
    """List what a pickle would import ("module name"), from its opcodes alone."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next((entry for entry in archive.namelist() if entry.endswith("data.pkl")), None)
                if name is None or archive.getinfo(name).file_size > MAX_PICKLE_BYTES:
                    return []
                program = archive.read(name)
        else:
            with path.open("rb") as file:
                program = file.read(MAX_PICKLE_BYTES)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError):
        return []
    found: list[str] = []
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
            if opcode.name == "GLOBAL":
                found.append(str(argument))
            elif opcode.name == "STACK_GLOBAL" and len(texts) >= 2:
                found.append(" ".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    except Exception:  # not a whole pickle; what was read so far counts
        pass
    return list(dict.fromkeys(found))


def _not_finite(error: ForewordError) -> str:
    return "not-finite" if "NaN or Inf" in error.message else ""


def _fault_of(path: Path) -> str:
    """Name what is wrong with a file that is no artefact: a prefix that holds a prompt, shapes, or just malformed."""
    from foreword.core.artefact import ArtefactHeader

    try:
        table = read_safetensors_table(path)
        header = ArtefactHeader.from_json(json.loads(table["__metadata__"][METADATA_KEY]))
    except (ArtefactCorrupt, ValueError, KeyError, TypeError):
        return "unsafe-file"
    shapes = {name: tuple(info["shape"]) for name, info in table.items() if name != "__metadata__"}
    expected = header.tensor_shapes()
    spec = header.spec
    if header.method != "prompt" and list(shapes.values()) == [(header.num_vectors, spec.embed_size)]:
        return "embeddings-only"
    odd = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    per_head = [len(shapes[name]) == 3 and shapes[name][1] == header.num_vectors for name in odd]
    if shapes.keys() == expected.keys() and header.method == "kv" and odd and all(per_head):
        return "wrong-shape"
    return "unsafe-file"
