"""Reading a body within its bounds, ending work from outside, errors as answers. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from foreword.errors import ForewordError, Overloaded
from foreword.serve.http.openai_errors import InvalidBody, error_headers, error_json
from foreword.serve.watch.logs import places

BODY_S = 120.0
"""How long a body may take to arrive."""

log = logging.getLogger("foreword.serve")


class ClientGone(Exception):
    """The client went away."""


class Halt:
    """Ends the block that it guards from outside: whoever calls it with an error has the block raise that error.

    One task enters it, one block after another; a call between two blocks ends the next one at once.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._is_ending = False

    def __call__(self, error: Exception) -> None:
        """End the block; only the first call counts."""
        if self.error is None:
            self.error = error
            if self._task is not None:
                self._is_ending = self._task.cancel()

    def __enter__(self) -> None:
        if self.error is not None:
            raise self.error
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        assert task is not None
        if self._is_ending:
            self._is_ending = False
            if task.uncancel() <= self._cancelling and kind is asyncio.CancelledError and self.error is not None:
                raise self.error from None


class Pending:
    """Bytes of bodies that are being read, all together: slow senders cannot fill the memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Take room. Raises Overloaded where there is none."""
        if self.num_bytes + num_bytes > self.max_bytes:
            raise Overloaded(
                f"{self.num_bytes} bytes of bodies are being read, {self.max_bytes} may", hint="Try again."
            )
        self.num_bytes += num_bytes


async def read_body(request: Request, limit: int, pending: Pending, *, timeout_s: float = BODY_S) -> bytes:
    """Read a body of at most `limit` bytes.

    Raises InvalidBody (413) as soon as it is known to have more, InvalidBody (408) where it takes too long, Overloaded,
    and ClientGone.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(f"{declared[:20]} bytes", limit)
    data = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece = message.get("body", b"")
                pending.add(len(piece))
                data += piece
                if len(data) > limit:
                    raise _too_large(f"{len(data)} bytes or more", limit)
                if not message.get("more_body"):
                    return bytes(data)
    except TimeoutError:
        raise InvalidBody(
            f"the body did not arrive within {timeout_s:g} s", hint="Send it faster.", status=408
        ) from None
    finally:
        pending.num_bytes -= len(data)


def _too_large(found: str, limit: int) -> InvalidBody:
    return InvalidBody(f"the body has {found}, {limit} are allowed", hint="Send less text.", status=413)


async def watch(request: Request, halt: Halt) -> None:
    """Halt with ClientGone when the client goes away; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    halt(ClientGone())


def translated(error: Exception) -> ForewordError:
    """Return the error for the user; an unexpected one is logged by class and place, never with values."""
    if isinstance(error, ForewordError):
        return error
    kind = type(error).__name__
    log.error("unexpected %s at %s", kind, places(error))
    return ForewordError(f"the server failed ({kind})", hint="Its log says where.")


def error_response(
    error: ForewordError, headers: Mapping[str, str] | None = None, *, is_about_model: bool = True
) -> Response:
    """Return an error in OpenAI's shape."""
    content = error_json(error, is_about_model=is_about_model)
    return JSONResponse(content, error.status, {**(headers or {}), **error_headers(error)})
