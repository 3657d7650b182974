"""Connections of clients that are slow, silent or endless: what uvicorn leaves open is bounded here. Imports no torch.

A connection is cut where the head of a request does not come or does not end, where its client leaves what was sent to
it lying, and where it goes on sending what nobody reads. A request under way then ends as if the client had gone away.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 20.0
"""How long the head of a request may take, from the connection's first moment, or from its first byte."""
MAX_HEAD_BYTES = 64 * 1024
MAX_UNREAD_BYTES = 4 * 2**20
"""What a client may go on sending of a body that was refused, so that it comes to read why."""
MAX_FRAMING = 8
"""Bytes of chunk sizes, trailers and the like for each byte of a body, beyond `MAX_HEAD_BYTES`."""
STALL_S = 60.0
"""How long buffers may stay full that only the client can empty."""
SEND_BUFFER_BYTES = 128 * 1024
"""Of the kernel, for each connection; `WRITE_BUFFER_BYTES` are ours."""
WRITE_BUFFER_BYTES = 16 * 1024

log = logging.getLogger("foreword.serve")


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with an end to every wait and a bound on every buffer."""

    head_s = HEAD_S
    stall_s = STALL_S
    max_connections: int | None = None
    """More are closed as they come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._is_in_head = False
        self._cycles: list[Any] = []
        self._num_bytes = 0  # of the head, then of everything behind it
        self._num_body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or close it at once where there are too many."""
        super().connection_made(transport)
        if self.max_connections is not None and len(self.connections) > self.max_connections:
            return transport.abort()
        transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._end_head_wait()
        self._end_client_wait()
        self._end_cycles()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read, within bounds."""
        self._num_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            if self._num_bytes > MAX_HEAD_BYTES + (MAX_FRAMING + 1) * self._num_body_bytes:
                self._cut("a body is nearly all framing")
        elif self._num_bytes > (MAX_HEAD_BYTES if self._is_in_head else MAX_UNREAD_BYTES):
            self._cut("a head does not end" if self._is_in_head else "a refused body does not end")
        elif self._head_timer is None:
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP. An answer that it follows ends, unmixed, as if the client had gone away."""
        if any(cycle.response_started and not cycle.response_complete for cycle in self._cycles):
            return self._cut("what follows a request is no HTTP")
        super().send_400_response(msg)
        self._end_cycles()

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._is_in_head = True
        self._num_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header; trailers, which come behind a body, mean nothing here."""
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """End a head."""
        self._is_in_head = False
        self._num_bytes = self._num_body_bytes = 0
        self._end_head_wait()
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        if self.cycle is not None and self.cycle not in self._cycles:
            self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Note a piece of a body."""
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a body."""
        self._end_head_wait()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, or close, which must end too."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_client()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that nobody uses."""
        super().timeout_keep_alive_handler()
        self._await_client()

    def pause_writing(self) -> None:
        """Wait for the client to take what lies there, and not for ever."""
        super().pause_writing()
        self._await_client()

    def resume_writing(self) -> None:
        """Go on: the client took it."""
        self._end_client_wait()
        super().resume_writing()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_s, self._cut, "no head of a request comes")

    def _await_client(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.stall_s, self._cut, "its client takes nothing")

    def _end_head_wait(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_client_wait(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _cut(self, why: str) -> None:
        log.info("a connection is cut: %s", why)
        self.transport.abort()
        self._end_cycles()

    def _end_cycles(self) -> None:
        """Tell all requests under way that the client is gone; uvicorn tells the last one of several sent in one go."""
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()


def raise_file_limit() -> int | None:
    """Let this process open as many files as it may; return how many, None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard or hard == resource.RLIM_INFINITY:
        return None if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
