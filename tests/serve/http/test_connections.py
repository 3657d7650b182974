"""Connections that would never end, over real sockets: silent, endless, and such as take nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from foreword.serve.gateway import create_app
from foreword.serve.http import connections
from foreword.serve.http.connections import Connection
from tests.faults.client import read_response
from tests.serve.access.test_auth import wait_for
from tests.serve.fakes import FakeBackend, FakeRegistry, Served, served, version

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(Connection, "stall_s", 1.0)
    monkeypatch.setattr(connections, "MAX_UNREAD_BYTES", 100_000)
    backend = FakeBackend(words=("word ",) * 5)
    app = create_app(backend, FakeRegistry(version("triage", 1)), base_name="base", max_body_bytes=10_000)
    with served(app, backend) as running:
        yield running
    assert backend.num_running == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_s", 0.2)


def connect(stage: Served, receive_bytes: int | None = None) -> socket.socket:
    client = socket.socket()
    client.settimeout(5)
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    host, port = stage.url.removeprefix("http://").split(":")
    client.connect((host, int(port)))
    return client


def ends(client: socket.socket) -> bytes:
    """Read until the connection ends; return what came."""
    data = b""
    try:
        while piece := client.recv(65536):
            data += piece
    except ConnectionError:
        pass
    return data


@pytest.mark.usefixtures("impatient")
def test_a_connection_without_a_request_is_cut(stage: Served) -> None:
    with connect(stage) as silent, connect(stage) as slow:
        slow.sendall(HEAD)
        assert ends(silent) == b"" and ends(slow) == b""


@pytest.mark.usefixtures("impatient")
def test_line_ends_are_no_request(stage: Served) -> None:
    with connect(stage) as client:
        client.sendall(GET)
        assert read_response(client)[0] == 200
        client.sendall(b"\r\n")
        assert ends(client) == b""


@pytest.mark.usefixtures("impatient")
def test_a_connection_that_is_kept_may_wait_and_then_ask_again(stage: Served) -> None:
    with connect(stage) as client:
        for _ in range(2):
            client.sendall(GET)
            assert read_response(client)[0] == 200
            time.sleep(0.3)


def test_a_head_has_an_end(stage: Served) -> None:
    with connect(stage) as client, pytest.raises(ConnectionError):
        client.sendall(HEAD + b"x: ")
        for _ in range(100):
            client.sendall(b"y" * 65536)


def test_a_refused_body_is_not_read_to_its_end(stage: Served) -> None:
    """The answer comes; what is still sent is dropped for a while, and then the connection."""
    with connect(stage) as client:
        client.sendall(HEAD + b"content-length: 104857600\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 413")
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 104_857_600:
                sent += client.send(b"x" * 65536)
        assert sent < 20_000_000


def test_trailers_and_chunk_sizes_have_an_end(stage: Served) -> None:
    for endless in (b"5;" + b"x" * 1000, b"0\r\nx: " + b"y" * 1000):
        with connect(stage) as client, pytest.raises(ConnectionError):
            client.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n" + endless)
            for _ in range(100):
                client.sendall(b"y" * 65536)


def test_chunks_of_one_byte_are_a_body_too(stage: Served) -> None:
    body = b'{"model": "triage", "prompt": "x"}' + b" " * 9000
    with connect(stage) as client:
        chunks = b"".join(b"1\r\n" + body[place : place + 1] + b"\r\n" for place in range(len(body)))
        client.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_client_that_takes_nothing_is_cut_and_its_work_ends(stage: Served) -> None:
    backend = stage.app.state.gateway.backend
    backend.words = ("word " * 2000,) * 2000
    with connect(stage, receive_bytes=4096) as client:
        body = b'{"model": "triage", "prompt": "x", "stream": true}'
        client.sendall(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: backend.num_running == 1)
        wait_for(lambda: backend.num_aborted == 1)
        data = ends(client)
        assert data.startswith(b"HTTP/1.1 200") and b"[DONE]" not in data


def test_a_slow_client_that_takes_what_comes_is_served(stage: Served) -> None:
    backend = stage.app.state.gateway.backend
    backend.words = ("word " * 400,) * 300
    body = b'{"model": "triage", "prompt": "x", "stream": true}'
    with connect(stage, receive_bytes=65536) as client:
        client.sendall(HEAD + f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        data = b""
        while piece := client.recv(20_000):
            data += piece
            time.sleep(0.005)
        assert data.rstrip().endswith(b"0") and b"[DONE]" in data


def test_too_many_connections_are_closed_and_the_others_served(stage: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "max_connections", 5)
    clients = [connect(stage) for _ in range(8)]
    try:
        answers = []
        for client in clients:
            try:
                client.sendall(GET)
                answers.append(client.recv(65536)[:12])
            except ConnectionError:
                answers.append(b"")
        assert answers[:5] == [b"HTTP/1.1 200"] * 5 and answers[5:] == [b""] * 3
    finally:
        for client in clients:
            client.close()
    wait_for(lambda: not stage.server.server_state.connections)
    with stage.client() as client:
        assert client.get("/health").status_code == 200


def test_slow_bodies_cannot_fill_the_memory(stage: Served) -> None:
    gateway = stage.app.state.gateway
    gateway.pending.max_bytes = 5000
    with connect(stage) as first, stage.client() as client:
        first.sendall(HEAD + b"content-length: 9000\r\n\r\n" + b"x" * 4000)
        wait_for(lambda: gateway.pending.num_bytes == 4000)
        large = client.post("/v1/completions", content=b" " * 4000)
        assert large.status_code == 503 and "4000 bytes of bodies are being read" in large.text
        first.close()
        wait_for(lambda: gateway.pending.num_bytes == 0)
        assert client.post("/v1/completions", content=b" " * 4000).status_code == 400


def test_notice_is_given_before_the_port_closes() -> None:
    backend = FakeBackend()
    app = create_app(backend, FakeRegistry(version("triage", 1)), base_name="base")
    with served(app, backend) as running, running.client() as client:
        running.server.notice_s = 60.0
        running.server.handle_exit(15, None)
        assert client.get("/ready").status_code == 503
        assert client.post("/v1/completions", json={"model": "triage", "prompt": "x"}).status_code == 200
        with running.client() as another:
            assert another.get("/health").status_code == 200
        threading.Timer(0.1, running.server.handle_exit, (15, None)).start()
        running.thread.join(10)
        assert not running.thread.is_alive()
