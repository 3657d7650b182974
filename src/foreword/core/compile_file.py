"""Compile an artefact into a compiled file, in this process or, by `python -m`, in one of its own.

A gateway in front of engines that cannot compile holds no model and no torch: it has the work done by
`python -m foreword.core.compile_file BASE ARTEFACT OUT DTYPE`, which prints one line of JSON, the header's or an
error's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from foreword import errors
from foreword.core.artefact import load_artefact
from foreword.core.compiled import CompiledHeader, save_compiled
from foreword.errors import ForewordError

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel


def compile_file(
    base: str | Path | FrozenModel,
    artefact: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    allow_mismatch: bool = False,
) -> CompiledHeader:
    """Compile the file `artefact` on `base` (a folder, a hub id or a loaded one) and write it to `out`, atomically.

    `dtype` is that of the keys and values; "auto" is the checkpoint's own, which engines take by default. Raises what
    `load_base`, `load_artefact`, `compile` and `save_compiled` raise; nothing is written then.
    """
    from foreword.core.compile import compile
    from foreword.core.model import load_base

    loaded = load_artefact(artefact)
    kept = "checkpoint" if dtype == "auto" else dtype
    model = load_base(str(base) if isinstance(base, Path) else base, dtype=kept)  # type: ignore[arg-type]  # it checks
    prefix = compile(model, loaded, allow_mismatch=allow_mismatch)
    return save_compiled(out, prefix, base=model.fingerprint, spec=model.spec)


def main(arguments: list[str]) -> int:
    """Compile as the command line says; print the outcome as one line of JSON and return the exit status."""
    base, artefact, out, dtype = arguments
    try:
        header = compile_file(base, artefact, out, dtype=dtype)
    except ForewordError as error:
        print(json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint}))
        return error.exit_code
    print(json.dumps({"header": header.to_json()}))
    return 0


def told_error(line: str) -> ForewordError | None:
    """Return the error that a line of `main` tells, of its own class; None where the line is no such thing."""
    try:
        told = json.loads(line)
        kind = getattr(errors, told["error"], None)
        if isinstance(kind, type) and issubclass(kind, ForewordError):
            return kind(str(told["message"]), hint=str(told["hint"]))
    except (ValueError, KeyError, TypeError):
        pass
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
