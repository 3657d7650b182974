"""What a gateway must know of the base that runs elsewhere. Imports no torch.

The facts need the weights (the fingerprint samples them), so a process of its own reads them once; the answer is kept
in a file beside the registry's cache, under the names, sizes and times of the base's files.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreword.core.artefact import ArtefactHeader, write_atomically
from foreword.core.spec import Fingerprint, ModelSpec
from foreword.errors import ConfigError, IncompatibleModel

FORMAT = 1
SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseInfo:
    """A base's identity and shapes."""

    folder: str
    """The folder or hub id that it was read from."""
    fingerprint: Fingerprint
    spec: ModelSpec
    stop_ids: frozenset[int]
    """Token ids that end an answer."""
    dtype: str
    """The checkpoint's own: float32, bfloat16 or float16."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_json` is its inverse."""
        return {
            "format": FORMAT,
            "folder": self.folder,
            "fingerprint": self.fingerprint.to_json(),
            "spec": self.spec.to_json(),
            "stop_ids": sorted(self.stop_ids),
            "dtype": self.dtype,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BaseInfo:
        """Build it from `to_json`'s dict. Raises ValueError, KeyError or TypeError where that is not what it is."""
        if data.get("format") != FORMAT:
            raise ValueError(f"format {data.get('format')!r}")
        return cls(
            folder=data["folder"],
            fingerprint=Fingerprint(**data["fingerprint"]),
            spec=ModelSpec.from_json(data["spec"]),
            stop_ids=frozenset(data["stop_ids"]),
            dtype=data["dtype"],
        )


def base_info(base: str | Path, cache: Path) -> BaseInfo:
    """Return the facts of a base folder, from `cache` where its files are the same ones, else read now.

    Raises ConfigError when the folder holds no base that can be loaded.
    """
    folder = Path(base).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no base: config.json is missing", hint="Give the base's folder to --base.")
    stored = cache / "bases" / f"{_files_key(folder)}.json"
    try:
        return BaseInfo.from_json(json.loads(stored.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    command = [sys.executable, "-m", "foreword.serve.engines.base_info", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        info = BaseInfo.from_json(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(
            f"cannot read the base in {folder}: {last}", hint="Check it with `foreword doctor`."
        ) from None
    write_atomically(stored, json.dumps(info.to_json(), sort_keys=True).encode())
    return info


def check_fingerprint(info: BaseInfo, header: ArtefactHeader) -> None:
    """Raise IncompatibleModel naming the first field in which the artefact's base differs from this one."""
    if difference := header.base.first_difference(info.fingerprint):
        field, trained, found = difference
        raise IncompatibleModel(
            f"{header.task!r} was trained for another base: {field} {trained} there, {found} in {info.folder}",
            hint="Serve it on the base it was trained for, or train again.",
        )


def check_served(info: BaseInfo, header: ArtefactHeader, *, max_model_len: int | None, by_embeddings: bool) -> None:
    """Raise IncompatibleModel or ConfigError where an artefact cannot be served on this base in this way."""
    check_fingerprint(info, header)
    if by_embeddings and header.method != "prompt":
        raise IncompatibleModel(
            f"{header.task!r} is a {header.method}, which no embeddings can carry",
            hint="Use the plug-in: --mode plugin.",
        )
    if header.soft_after and not by_embeddings:
        raise IncompatibleModel(
            f"{header.task!r} has {header.soft_after} soft slots behind the text, which lie in no cache",
            hint="Serve it by embeddings: --mode embeddings.",
        )
    needed = header.block.num_positions + 2
    limit = max_model_len or info.spec.max_positions
    if limit is not None and needed > limit:
        raise ConfigError(
            f"{header.task!r} takes {header.block.num_positions} positions, the longest sequence has {limit}",
            hint="Give a longer --max-model-len.",
        )


def _files_key(folder: Path) -> str:
    digest = hashlib.sha256(str(folder).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES:
            stat = path.stat()
            digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _read(folder: str) -> BaseInfo:
    from foreword.core.model import load_base

    base = load_base(folder, dtype="checkpoint")
    return BaseInfo(
        folder=folder,
        fingerprint=base.fingerprint,
        spec=base.spec,
        stop_ids=base.stop_ids,
        dtype=str(base.dtype).removeprefix("torch."),
    )


if __name__ == "__main__":
    print(json.dumps(_read(sys.argv[1]).to_json()))
