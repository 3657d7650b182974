"""A light HTTP load: a stub engine that streams like vLLM, and an open-loop generator. Standard library only.

Both are raw asyncio, so that on one core they cost little beside the gateway that is measured on another.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field

CHUNK = (
    '{"id":"cmpl-0","object":"text_completion","created":1,"model":"base","choices":[{"index":0,"text":" word",'
    '"logprobs":null,"finish_reason":%s,"stop_reason":null,"token_ids":[%d],"prompt_token_ids":null}]}'
)
USAGE = (
    '{"id":"cmpl-0","object":"text_completion","created":1,"model":"base","choices":[],'
    '"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}'
)


class StubEngine(asyncio.Protocol):
    """Answers a completion with `max_tokens` tokens, one each `interval_s`; and the few GET pages that are asked."""

    interval_s = 0.02
    max_model_len = 4096

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.data = b""
        self.running: asyncio.Task[None] | None = None

    def connection_lost(self, error: Exception | None) -> None:
        if self.running is not None:
            self.running.cancel()

    def data_received(self, data: bytes) -> None:
        self.data += data
        while True:
            head, found, rest = self.data.partition(b"\r\n\r\n")
            if not found:
                return
            length = 0
            for line in head.split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            if len(rest) < length:
                return
            body, self.data = rest[:length], rest[length:]
            self.answer(head.split(b" ", 2), body)

    def answer(self, words: list[bytes], body: bytes) -> None:
        if words[0] == b"POST":
            asked = json.loads(body)
            if '"%s"' % ("0" * 64) in body.decode():  # a version that there is not, by which gateways know the plug-in
                self.transport.write(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n{}")
                return
            self.running = asyncio.ensure_future(self.stream(asked))
            return
        pages = {
            b"/v1/models": {"object": "list", "data": [{"id": "base", "max_model_len": self.max_model_len}]},
            b"/version": {"version": "0.32.0"},
        }
        text = json.dumps(pages.get(words[1], {})).encode()
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text)
        )

    async def stream(self, asked: dict) -> None:
        count = asked.get("max_tokens") or 16
        prompt = asked.get("prompt") or [0]
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for place in range(count):
            await asyncio.sleep(self.interval_s)
            self.event(CHUNK % ('"length"' if place == count - 1 else "null", 100 + place))
        self.event(USAGE % (len(prompt), count, len(prompt) + count))
        self.event("[DONE]")
        self.transport.write(b"0\r\n\r\n")

    def event(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


@dataclass
class Timing:
    """When a request was due, and what came when, in seconds from then."""

    first: float = 0.0
    last: float = 0.0
    num_events: int = 0
    status: int = 0


@dataclass
class Load:
    """Sends bodies to one server, on connections that are kept."""

    host: str
    port: int
    path: str = "/v1/completions"
    headers: dict[str, str] = field(default_factory=dict)
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def ask(self, body: bytes) -> Timing:
        started, timing = time.perf_counter(), Timing()
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
        extra = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{extra}\r\n"
        )
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        timing.status = int(answer.split(b" ", 2)[1])
        if timing.status != 200:
            writer.close()
            return timing
        tail = b""
        while True:
            data = await reader.read(65536)
            if not data:
                raise ConnectionError("the stream ended early")
            now = time.perf_counter() - started
            count = data.count(b"data: {")
            if count and not timing.num_events:
                timing.first = now
            timing.num_events += count
            tail = (tail + data)[-64:]
            if tail.endswith(b"0\r\n\r\n") and b"[DONE]" in tail:
                timing.last = now
                self.idle.append((reader, writer))
                return timing

    async def open_loop(self, body: bytes, *, rate: float, seconds: float, seed: int = 0) -> list[Timing]:
        """Send Poisson arrivals at `rate` per second, whatever the answers take."""
        random_ = random.Random(seed)
        tasks, due = [], time.perf_counter()
        end = due + seconds
        while due < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(self.ask(body)))
            due += random_.expovariate(rate)
        return list(await asyncio.gather(*tasks))

    async def closed_loop(self, bodies: list[bytes], *, inflight: int, seconds: float) -> tuple[list[Timing], float]:
        """Keep `inflight` requests open, taking bodies in turn; return the timings and the seconds it took."""
        self.close()
        timings: list[Timing] = []
        started = time.perf_counter()
        turn = 0

        async def one() -> None:
            nonlocal turn
            while time.perf_counter() - started < seconds:
                turn += 1
                timings.append(await self.ask(bodies[turn % len(bodies)]))

        await asyncio.gather(*(one() for _ in range(inflight)))
        return timings, time.perf_counter() - started

    def close(self) -> None:
        """Close the kept connections; servers close those that are idle for long."""
        while self.idle:
            self.idle.pop()[1].close()


async def serve_stub(port: int, interval_s: float) -> None:
    """Serve the stub engine; prints its port when ready."""
    StubEngine.interval_s = interval_s
    server = await asyncio.get_running_loop().create_server(StubEngine, "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve_stub(int(sys.argv[1]), float(sys.argv[2])))
