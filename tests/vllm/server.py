"""A stock `vllm serve` with the plug-in, as a process of its own. Used by these tests, the gateway's and the bench."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
NAME = "base"
"""The model's name at the server."""
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""One GiB of pages, one core, no calls home."""
BLOCK = 32
"""Page size in positions: the smallest that vLLM's CPU backend takes."""


def environment() -> Path:
    """Return the folder of the vLLM environment: FOREWORD_VLLM, or .venv-vllm as `make test-vllm` builds it."""
    folder = Path(os.environ.get("FOREWORD_VLLM", ROOT / ".venv-vllm"))
    if not (folder / "bin/vllm").exists():
        raise RuntimeError(f"no vLLM in {folder}: run `make test-vllm`, which builds it")
    return folder


def connector(blobs: str | Path, cache: str | Path, **extra: Any) -> dict[str, Any]:
    """Return the `--kv-transfer-config` of the plug-in; `extra` are more of its settings (base, host_bytes, …)."""
    return {
        "kv_connector": "ForewordConnector",
        "kv_connector_module_path": "foreword.serve.vllm_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"blobs": str(blobs), "cache": str(cache), **extra},
    }


class Server(str):
    """The URL of a running server (no slash at the end), with its `process` and the path of its `log`."""

    process: subprocess.Popen[bytes]
    log: Path


def start(command: Sequence[str | Path], port: int, log: Path, env: Mapping[str, str]) -> Server:
    """Start a server in a session of its own; its workers die with it."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=file, env=env, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}")
    server.process, server.log = process, log
    return server


def wait_until_up(server: Server, timeout_s: float) -> None:
    """Return when the server answers. Raises RuntimeError with the end of its log when it dies or takes too long."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and server.process.poll() is None:
        try:
            if httpx.get(f"{server}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"vLLM did not start (exit {server.process.poll()}):\n{server.log.read_text()[-6000:]}")


def stop(server: Server) -> None:
    """End the server, its engine and its workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.process.pid, number)
        except ProcessLookupError:
            break
        try:
            server.process.wait(10)
        except subprocess.TimeoutExpired:
            continue
    server.process.wait()


@contextmanager
def vllm_server(
    model: str | Path,
    blobs: str | Path | None,
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    transfer: Mapping[str, Any] | None = None,
    max_model_len: int = 256,
    dtype: str = "float32",
    eager: bool = True,
    timeout_s: float = 240,
) -> Iterator[Server]:
    """Serve a model folder as NAME and yield the server's URL, a `Server`.

    `blobs` is where the compiled files lie, None for a server without the plug-in. `args` are more of vLLM's options,
    `extra` more of the plug-in's settings, `transfer` more of the transfer config.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="foreword-vllm-") as folder:
        command: list[str | Path] = [environment() / "bin/vllm", "serve", model, "--served-model-name", NAME]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
        command += ["--max-model-len", str(max_model_len), "--block-size", str(BLOCK), "--enable-prefix-caching"]
        if blobs is not None:
            config = connector(blobs, Path(folder) / "cache", **(extra or {})) | dict(transfer or {})
            command += ["--kv-transfer-config", json.dumps(config)]
        command += [*(["--enforce-eager"] if eager else []), *args]
        settings = SETTINGS | {"TMPDIR": folder}
        server = start(command, port, Path(folder) / "log", {**os.environ, **settings, **(env or {})})
        try:
            wait_until_up(server, timeout_s)
            yield server
        finally:
            stop(server)
