"""Compiled files for engines that cannot compile: from the registry, else compiled now by a process of its own.

Compiling loads the base, which takes as long and as much memory as that does; whoever publishes can have it done
before (`foreword compile`). Imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

from foreword.core.compile_file import told_error
from foreword.errors import BackendFailed
from foreword.registry.records import CompiledBlob

LIMIT_S = 1800.0
"""How long one compilation may take."""

log = logging.getLogger("foreword.serve")


class CompiledStore(Protocol):
    """What is asked of a registry. Calls may block; they run in threads."""

    def compiled(self, source: str, dtype: str) -> CompiledBlob | None:
        """Return the file compiled from an artefact, by its sha256."""

    def add_compiled(self, path: Path) -> CompiledBlob:
        """Store a compiled file."""


class CompiledSource:
    """The compiled files of one base in one dtype. One is compiled at a time; used by one event loop."""

    def __init__(self, store: CompiledStore, base: str, dtype: str) -> None:
        self.store = store
        self.base = base
        self.dtype = dtype
        self._lock = asyncio.Lock()

    async def get(self, sha256: str, path: Path) -> CompiledBlob:
        """Return what an artefact compiles to; `path` is its file.

        Raises what `compile_file` raises, what the registry raises, BackendFailed where the compiling process dies.
        """
        if (found := await asyncio.to_thread(self.store.compiled, sha256, self.dtype)) is not None:
            return found
        async with self._lock:
            if (found := await asyncio.to_thread(self.store.compiled, sha256, self.dtype)) is not None:
                return found
            with tempfile.TemporaryDirectory(prefix="foreword-compile-") as folder:
                out = Path(folder) / "compiled.safetensors"
                await self._compile(path, out)
                return await asyncio.to_thread(self.store.add_compiled, out)

    async def _compile(self, path: Path, out: Path) -> None:
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "foreword.core.compile_file", self.base, str(path), str(out), self.dtype),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(LIMIT_S):
                stdout, stderr = await process.communicate()
        except BaseException as error:
            process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise BackendFailed(f"compiling {path.name[:12]} takes more than {LIMIT_S:.0f} s") from None
            raise
        if process.returncode:
            if (known := told_error(_last_line(stdout))) is not None:
                raise known
            log.error("compiling %s ended with status %s: %s", path.name, process.returncode, _last_line(stderr))
            raise BackendFailed(
                f"the process that compiles ended with status {process.returncode}",
                hint="The server's log says more; is there memory for the base?",
            )
        log.info("compiled %s in %.1f s", path.name, time.monotonic() - started)


def _last_line(data: bytes) -> str:
    return (data.decode(errors="replace").strip().splitlines() or [""])[-1]
