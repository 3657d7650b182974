"""Faults 10, 11 and 12: clients that read or write a byte at a time, ten thousand connections, bodies of 100 MB."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Iterator

import pytest

from foreword.serve.http.connections import MAX_UNREAD_BYTES
from tests.faults.client import Answer, connect, read_all, read_response, request_bytes, together
from tests.faults.stage import EngineProcess, Gateway, Stage, staged, wait_until

pytestmark = pytest.mark.slow
STALL_S = HEAD_S = BODY_S = 1.5
TWEAK = f"""
from foreword.serve.http import exchange
from foreword.serve.http.connections import Connection
Connection.stall_s, Connection.head_s = {STALL_S}, {HEAD_S}
exchange.read_body.__kwdefaults__["timeout_s"] = {BODY_S}
"""
CUT_S = STALL_S + 3
"""The time in which a client that does nothing is cut off, on a busy machine."""
MB = 10**6
KERNELS = 20 * MB
"""What the kernel's buffers of both sides may hold, that the gateway has never read."""


class Room:
    """A gateway with one engine and one tenant; waits that are a minute long elsewhere end soon."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        stage.publish()
        self.engine: EngineProcess = stage.engine(interval_s=0.0)
        self.gateway: Gateway = stage.gateway(self.engine, tweak=TWEAK)
        self.key = stage.tenant("acme", "triage")
        wait_until(lambda: self.one().status == 200)

    def one(self) -> Answer:
        return together(self.gateway, self.key, lambda asker: asker.ask())

    def answers(self) -> None:
        """Check that other clients notice nothing."""
        answer = self.one()
        assert answer.status == 200 and answer.seconds < 2, answer

    def open_requests(self) -> int:
        with self.gateway.client() as client:
            return int(client.get("/health").json()["open_requests"])


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    with staged(tmp_path_factory.mktemp("connections")) as stage:
        yield Room(stage)


def test_a_client_that_does_not_read(room: Room) -> None:
    """Proves `Connection.stall_s` and the bound on its write buffer: the answer is given up, and the engine's work."""
    aborted = room.engine.told(interval_s=0.005)["aborted"]
    before = room.gateway.rss
    body = {"model": "triage", "prompt": "x", "max_tokens": 4000, "n": 32, "stream": True}
    with connect(room.gateway, receive_bytes=4096) as reader:
        reader.sendall(request_bytes(room.key, body))
        wait_until(lambda: room.engine.running == 1)
        room.answers()
        assert reader.recv(1)
        taken = wait_until(lambda: room.engine.told()["aborted"] == aborted + 1, CUT_S + 10)
        assert taken > STALL_S / 2
        wait_until(lambda: room.open_requests() == 0)
        # What came from the engine until the cut waits here: 32 tokens each 5 ms, of 500 bytes at most.
        assert room.gateway.rss - before < 32 / 0.005 * CUT_S * 500
        rest = read_all(reader)
    assert b"[DONE]" not in rest and len(rest) < 4 * MB
    room.engine.told(interval_s=0.0)
    room.answers()


def test_a_client_that_asks_twice_in_one_go_and_leaves(room: Room) -> None:
    """Proves `Connection._end_cycles`: the request that runs ends too, not the one alone that waits behind it."""
    aborted = room.engine.told(interval_s=0.05)["aborted"]
    asked = request_bytes(room.key, {"model": "triage", "prompt": "x", "max_tokens": 1000})
    with connect(room.gateway) as client:
        client.sendall(asked * 2)
        wait_until(lambda: room.engine.running == 1)
    wait_until(lambda: room.engine.told()["aborted"] == aborted + 1, 5)
    wait_until(lambda: room.open_requests() == 0 and room.engine.running == 0, 5)
    room.engine.told(interval_s=0.0)
    room.answers()


def test_a_client_that_reads_a_byte_a_second_is_served(room: Room) -> None:
    """A slow reader is no silent one: its short answer fits the buffers, and other clients notice nothing."""
    body = {"model": "triage", "prompt": "x", "max_tokens": 20, "stream": True}
    with connect(room.gateway, receive_bytes=4096) as reader:
        reader.sendall(request_bytes(room.key, body))
        for _ in range(3):
            assert len(reader.recv(1)) == 1
            time.sleep(1)
            room.answers()
        wait_until(lambda: room.open_requests() == 0)
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += reader.recv(65536)
    assert b"[DONE]" in data


def drip(room: Room, data: bytes) -> float:
    """Send a byte of `data` each 0.2 s; return after how long the gateway ends the connection."""
    started = time.monotonic()
    with connect(room.gateway) as writer:
        writer.settimeout(0.2)
        for byte in data:
            try:
                writer.sendall(bytes([byte]))
                if not writer.recv(65536):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            raise AssertionError("all of it was taken")
    return time.monotonic() - started


def test_clients_that_send_a_byte_at_a_time(room: Room) -> None:
    """Proves `Connection.head_s` (slowloris): a head that does not end is cut, however busily it is sent."""
    assert HEAD_S / 2 < drip(room, request_bytes(room.key, {"model": "triage"})[:80]) < CUT_S
    room.answers()
    with connect(room.gateway) as silent:
        started = time.monotonic()
        assert read_all(silent) == b""
        assert HEAD_S / 2 < time.monotonic() - started < CUT_S


def test_a_body_that_comes_a_byte_at_a_time(room: Room) -> None:
    """Proves the time limit of `read_body`: 408, and what was held is given back."""
    data = request_bytes(room.key, {"model": "triage", "prompt": "x" * 100})
    head, _, body = data.partition(b"\r\n\r\n")
    with connect(room.gateway) as writer:
        writer.sendall(head + b"\r\n\r\n" + body[:1])
        started = time.monotonic()
        status, _ = read_response(writer)
        assert status == 408 and BODY_S / 2 < time.monotonic() - started < CUT_S
    assert room.open_requests() == 0
    room.answers()


def test_a_head_without_end_and_a_body_of_framing(room: Room) -> None:
    """Proves MAX_HEAD_BYTES and MAX_FRAMING: neither headers, trailers nor chunk sizes pile up."""
    before = room.gateway.rss
    with connect(room.gateway) as writer:
        assert (
            _send_until_cut(writer, b"GET / HTTP/1.1\r\nhost: x\r\n", b"x-filler: " + b"y" * 1000 + b"\r\n") < KERNELS
        )
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n" % room.key.encode()
    head += b"transfer-encoding: chunked\r\n\r\n"
    with connect(room.gateway) as writer:
        assert _send_until_cut(writer, head, b"1;" + b"y" * 1000 + b"\r\n \r\n") < KERNELS
    with connect(room.gateway) as writer:
        assert _send_until_cut(writer, head + b"0\r\n", b"x-filler: " + b"y" * 1000 + b"\r\n") < KERNELS
    assert room.gateway.rss - before < 8 * MB
    room.answers()


def _send_until_cut(writer: socket.socket, head: bytes, piece: bytes) -> int:
    """Send a head and a piece again and again; return how many bytes were taken until the connection was ended."""
    taken, pieces = 0, piece * 64
    writer.settimeout(CUT_S + 5)
    try:
        writer.sendall(head)
        while taken < 64 * MB:
            writer.sendall(pieces)
            taken += len(pieces)
    except ConnectionError:
        pass
    return taken


@pytest.mark.parametrize("is_chunked", [False, True])
def test_bodies_of_100_mb(room: Room, is_chunked: bool) -> None:
    """Proves the early 413 of `read_body`, and MAX_UNREAD_BYTES: the body is neither kept nor read to its end."""
    before = room.gateway.rss
    framing = "transfer-encoding: chunked" if is_chunked else f"content-length: {100 * MB}"
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {room.key}\r\n{framing}\r\n\r\n".encode()
    piece = b"x" * MB
    piece = b"%x\r\n%b\r\n" % (MB, piece) if is_chunked else piece
    sent = 0
    with connect(room.gateway) as writer:
        writer.sendall(head)
        try:
            while sent < 100:
                writer.sendall(piece)
                sent += 1
        except ConnectionError:
            pass
        assert sent * MB < KERNELS + MAX_UNREAD_BYTES + 4 * MB
    # A connection that is ended while its client sends may take the answer with it, so it is asked for again.
    with connect(room.gateway) as polite:
        polite.sendall(head + (piece * 5 if is_chunked else b""))
        status, told = read_response(polite)
    assert status == 413 and "4194304 are allowed" in json.loads(told)["error"]["message"]
    assert room.gateway.rss - before < 16 * MB  # one body of the largest size, twice, and the pieces in flight
    room.answers()


def files_left(wanted: int) -> int:
    """Raise this process's limit of open files as far as it goes; return how many of `wanted` sockets it may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(wanted, hard - 500)


def test_ten_thousand_connections(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Proves `Connection.max_connections` and the bounds per connection.

    Half of them are idle, half have sent half a head. A connection costs the kernel's memory, which is not ours, and
    some objects of Python: 16 KiB at most (a protocol, a parser, a transport, a timer, the half head).
    """
    count = files_left(10_000)
    assert count >= 5_000, f"{count} sockets are too few for this test: raise the hard limit of open files (ulimit -Hn)"
    limit = count - 500
    tweak = f"""
from foreword.serve import run
from foreword.serve.http.connections import Connection
run.raise_file_limit = lambda: {limit} * 4 // 3 + 1
"""
    made: list[socket.socket] = []
    with staged(tmp_path_factory.mktemp("many")) as stage:
        stage.publish()
        gateway = stage.gateway(stage.engine(), tweak=tweak)
        key = stage.tenant("acme", "triage")
        wait_until(lambda: together(gateway, key, lambda asker: asker.ask()).status == 200)
        before = gateway.rss
        try:
            for place in range(limit - 100):
                made.append(connect(gateway))
                if place % 2:
                    made[-1].sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-half: ")
            for _ in range(3):
                answer = together(gateway, key, lambda asker: asker.ask())
                assert answer.status == 200 and answer.seconds < 2
            assert gateway.rss - before < limit * 16 * 1024
            for _ in range(600):
                made.append(connect(gateway))
            time.sleep(1)
            ended = 0
            for late in made[-400:]:
                late.settimeout(0.5)
                ended += read_all_is_closed(late)
            assert ended >= 390  # beyond the limit: closed at once, not left in silence
        finally:
            for each in made:
                each.close()
        wait_until(lambda: together(gateway, key, lambda asker: asker.ask()).status == 200)
        assert gateway.popen.poll() is None and "Traceback" not in gateway.errors()


def read_all_is_closed(made: socket.socket) -> bool:
    try:
        return made.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False
