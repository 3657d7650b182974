"""Start the server, tell when it is ready, drain it on a signal. Imports no torch before the port is taken."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from foreword.errors import ServeError
from foreword.registry.store import Registry
from foreword.serve.access.control import Control
from foreword.serve.backend import Backend
from foreword.serve.engines.embedded import EmbeddedBackend
from foreword.serve.gateway import MAX_BODY_BYTES, create_app
from foreword.serve.http.connections import SEND_BUFFER_BYTES, Connection, raise_file_limit

KEEP_ALIVE_S = 60
"""Above the idle time after which clients drop a connection themselves, so that none is closed under a new request."""


def serve_base(
    base: str,
    *,
    base_name: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    kv_memory: str = "1GiB",
    max_batch: int = 64,
    max_queue: int = 256,
    **options: Any,
) -> None:
    """Serve a base on the embedded engine; `options` and errors are those of `serve_backend`.

    Raises ConfigError too, when the base cannot be loaded.
    """

    def make(registry: Registry, control: Control) -> Backend:
        from foreword.core.model import load_base
        from foreword.engine.engine import Engine

        engine = Engine(
            load_base(base, dtype=dtype, device=device),  # type: ignore[arg-type]  # it checks the dtype
            kv_memory=kv_memory,
            max_batch=max_batch,
            max_queue=max_queue,
        )
        engine.start()
        return EmbeddedBackend(engine)

    serve_backend(make, base_name=base_name or own_name(base), **options)


def serve_backend(
    make: Callable[[Registry, Control], Backend],
    *,
    base_name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    home: str | Path | None = None,
    preload: Sequence[str] = (),
    max_resident_versions: int = 256,
    max_resident_bytes: int | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    drain_s: float = 30.0,
    notice_s: float = 0.0,
    require_keys: bool = False,
    is_open: bool = False,
    allow_special_tokens: bool = False,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the backend that `make` returns, and the tasks of the registry in `home`, until SIGTERM or SIGINT.

    `on_ready` is told the URL. The port is taken first, before minutes of loading. Raises ServeError when it cannot be,
    and where an address that others reach would be served without keys, unless `is_open` says that this is meant;
    ConfigError when the registry cannot be opened; and what `make` and loading a version of `preload` raise.
    """
    check_exposure(host, require_keys=require_keys, is_open=is_open)
    with bind(host, port) as listener, Registry.open(home) as registry:
        control = Control(registry.access)
        backend = make(registry, control)
        app = create_app(
            backend,
            registry,
            base_name=base_name,
            control=control,
            max_body_bytes=max_body_bytes,
            max_resident_versions=max_resident_versions,
            max_resident_bytes=max_resident_bytes,
            preload=preload,
            require_keys=require_keys,
            allow_special_tokens=allow_special_tokens,
        )
        run(Server(app, drain_s=drain_s, notice_s=notice_s, on_ready=on_ready), listener, backend)


def check_exposure(host: str, *, require_keys: bool, is_open: bool) -> None:
    """Raise ServeError where whoever reaches this machine could use the server without a key, and nobody said so."""
    if require_keys or is_open:
        return
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return  # `bind` says that it is no address
    if all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        return
    raise ServeError(
        f"{host} can be reached from other machines, and no keys are required",
        hint="Give --require-keys, or --open where everyone who reaches it may use it.",
    )


def own_name(base: str) -> str:
    """Return the base's own name: a hub id as it is, of a folder the last part."""
    return Path(base).resolve().name if Path(base).exists() else base


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the port, not yet listening; port 0 is a free one.

    Raises ServeError with host, port and the cure.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ServeError(f"{host!r} is no address: {error}", hint="Give --host 127.0.0.1 or 0.0.0.0.") from None
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere this option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # what is accepted inherits it
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _bind_error(host, port, error) from None
    return listener


def _bind_error(host: str, port: int, error: OSError) -> ServeError:
    if error.errno == errno.EADDRINUSE:
        hint = "Stop the server that has it, or give another --port; --port 0 takes a free one."
        return ServeError(f"port {port} of {host} is in use", hint=hint)
    if error.errno == errno.EACCES:
        return ServeError(f"port {port} of {host} needs more rights", hint="Give a --port above 1023.")
    return ServeError(
        f"cannot listen on port {port} of {host}: {error.strerror}", hint="Give another --host or --port."
    )


class Server(uvicorn.Server):
    """uvicorn, with its ready moment told, and with an exit status of 0 after a signal.

    A first SIGTERM or SIGINT makes /ready say no, after `notice_s` seconds stops accepting, and lets running answers
    end, for at most `drain_s` seconds more; a second one ends at once.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        drain_s: float = 30.0,
        notice_s: float = 0.0,
        on_ready: Callable[[str], None] = lambda url: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",  # `run` does it, so that its errors keep their class
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(drain_s),
            )
        )
        self.app = app
        self.notice_s = notice_s
        self._ends: float | None = None
        self.on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then tell the URL."""
        assert sockets, "the socket is bound before"
        host, port = sockets[0].getsockname()[:2]
        try:
            sockets[0].listen(self.config.backlog)
        except OSError as error:  # another process bound it too, and was faster
            raise _bind_error(host, port, error) from None
        await super().startup(sockets)
        settle_memory()
        self.on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, or end at once if it is draining. The signal is not raised again, as uvicorn's own handler does."""
        if self._ends is not None:
            self.force_exit = self.should_exit = True
        else:
            self._ends = time.monotonic() + self.notice_s
            self.app.state.gateway.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Say whether it is time to stop accepting."""
        if self._ends is not None and time.monotonic() >= self._ends:
            self.should_exit = True
        return await super().on_tick(counter)


def settle_memory() -> None:
    """Keep the garbage collector away from what was made until now: looking through all of it takes 0.1 s and more."""
    gc.collect()
    gc.freeze()


def run(server: Server, listener: socket.socket, backend: Backend) -> None:
    """Serve on a bound socket until the server is told to stop; then close the backend."""
    if (num_files := raise_file_limit()) is not None:
        Connection.max_connections = num_files * 3 // 4  # the rest is for engines, the registry, artefacts
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(_serve(server, listener, backend))


def _new_loop() -> asyncio.AbstractEventLoop:
    """Return uvloop's loop where it is installed, which is on all systems but Windows."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _serve(server: Server, listener: socket.socket, backend: Backend) -> None:
    try:
        await backend.start()
        async with server.app.router.lifespan_context(server.app):
            await server.serve(sockets=[listener])
    finally:
        await backend.aclose()
