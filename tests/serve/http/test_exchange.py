"""Ending work from outside; reading bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from fastapi import Request

from foreword.errors import ForewordError, Overloaded
from foreword.serve.http.exchange import ClientGone, Halt, Pending, read_body, watch
from foreword.serve.http.openai_errors import InvalidBody


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_block_ends_with_the_error_it_is_halted_with() -> None:
    async def main() -> None:
        halt, seen = Halt(), []
        asyncio.get_running_loop().call_later(0.01, halt, ForewordError("enough"))
        with pytest.raises(ForewordError, match="enough"):
            with halt:
                try:
                    await asyncio.sleep(10)
                finally:
                    seen.append("cleaned")
        assert seen == ["cleaned"]
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0
        await asyncio.sleep(0)  # nothing is left that would end the task later
        with pytest.raises(ForewordError, match="enough"):
            with halt:
                raise AssertionError("it was entered")

    run(main())


def test_what_is_not_halted_goes_on_as_without() -> None:
    async def main() -> None:
        halt = Halt()
        with halt:
            await asyncio.sleep(0)
        with pytest.raises(KeyError):
            with halt:
                raise KeyError("its own")
        with halt:
            pass

    run(main())


def test_a_cancellation_from_elsewhere_is_one_still() -> None:
    async def main() -> None:
        async def work() -> None:
            with Halt():
                await asyncio.sleep(10)

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_both_at_once_end_the_task() -> None:
    async def main() -> None:
        halt = Halt()

        async def work() -> None:
            with halt:
                await asyncio.sleep(10)

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        halt(ForewordError("enough"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_only_the_first_halt_counts() -> None:
    async def main() -> None:
        halt = Halt()
        loop = asyncio.get_running_loop()
        loop.call_soon(halt, ForewordError("first"))
        loop.call_soon(halt, ForewordError("second"))
        with pytest.raises(ForewordError, match="first"):
            with halt:
                await asyncio.sleep(10)

    run(main())


def request(*messages: dict[str, Any], waits: bool = False, headers: dict[str, str] | None = None) -> Request:
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if left:
            return left.pop(0)
        await asyncio.sleep(10 if waits else 0)
        return {"type": "http.disconnect"}

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw, "query_string": b""}, receive)


def piece(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_bodies() -> None:
    async def main() -> None:
        pending = Pending(100)
        assert await read_body(request(piece(b"ab"), piece(b"c", False)), 3, pending) == b"abc"
        for faulty, status in (
            (request(piece(b"ab"), piece(b"cd")), 413),
            (request(headers={"content-length": "4"}), 413),
            (request(headers={"content-length": "9" * 5000}), 413),
            (request(piece(b"ab"), waits=True), 408),
        ):
            with pytest.raises(InvalidBody) as caught:
                await read_body(faulty, 3, pending, timeout_s=0.01)
            assert caught.value.status == status
        with pytest.raises(ClientGone):
            await read_body(request(piece(b"ab")), 3, pending)
        with pytest.raises(Overloaded):
            await read_body(request(piece(b"x" * 101)), 1000, pending)
        assert pending.num_bytes == 0

    run(main())


def test_a_client_that_goes_away_halts() -> None:
    async def main() -> None:
        halt = Halt()
        watcher = asyncio.create_task(watch(request(piece(b"", False)), halt))
        with pytest.raises(ClientGone):
            with halt:
                await asyncio.sleep(10)
        await watcher

    run(main())
