"""`foreword top`: once, as JSON, live in a terminal, and in front of what is no gateway."""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from foreword.cli.top_screen import rate, screen, seconds, size
from foreword.engine.request import Chunk
from foreword.serve.backend import Timings
from foreword.serve.versions.residents import Residents
from foreword.serve.watch.metrics import Metrics
from foreword.serve.watch.readings import View, parse_page, view
from tests.command import Run, command_runner
from tests.serve.fakes import FakeBackend

Page = Callable[[], tuple[int, str]]


def fresh() -> Metrics:
    backend = FakeBackend()
    return Metrics(backend, Residents(backend, lambda version: Path(version.sha256)))


def traffic(metrics: Metrics, task: str, version: str, count: int, *, tenant: str = "") -> None:
    for _ in range(count):
        metrics.count((task, version), 200, tenant=tenant)
        timings = Timings(submitted=0.0, queue_s=0.004)
        for place in range(5):
            timings.add(Chunk(index=0, text="x", token_ids=(1,)), 0.03 + 0.02 * place)
        metrics.observe((task, version), 10, timings, tenant=tenant)


def busy() -> Page:
    """Pages of a gateway whose traffic goes on with each of them."""
    metrics = fresh()

    def page() -> tuple[int, str]:
        traffic(metrics, "triage", "7", 30, tenant="team-a")
        traffic(metrics, "clause", "2", 10, tenant="team-b")
        return 200, generate_latest(metrics.registry).decode()

    return page


@contextlib.contextmanager
def pages(page: Page) -> Iterator[str]:
    """Serve pages of metrics; yields the URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            key = self.headers.get("authorization")
            code, text = page() if key in (None, "Bearer good") else (401, "no")
            self.send_response(code if self.path == "/metrics" else 404)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `foreword top`; return (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("FOREWORD_KEY", raising=False)
    return command_runner(monkeypatch, capsys, first=["top"])


def test_once(run: Run) -> None:
    with pages(busy()) as url:
        code, out, _ = run("--url", f"{url}/v1/", "--once", "--interval", "0.1")
    lines = [line.rstrip() for line in out.splitlines()]
    assert code == 0 and lines[0].startswith(f"foreword top   {url}")
    header = next(line for line in lines if line.startswith("task "))
    assert header.split() == "task version req/s err/s tok/s in tok/s out first p50 p95 token p50 p95".split()
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("triage", "clause", "team-"))}
    assert rows["triage"][1] == "7" and rows["clause"][1] == "2"
    assert list(rows) == ["triage", "clause", "team-a", "team-b"]  # by traffic
    assert float(rows["triage"][2].replace(",", "")) == pytest.approx(
        3 * float(rows["clause"][2].replace(",", "")), rel=0.01
    )
    triage, clause = (line for line in lines if line.startswith(("triage", "clause")))
    assert len(triage) == len(clause) == len(header)  # aligned


def test_json_for_scripts(run: Run) -> None:
    with pages(busy()) as url:
        code, out, _ = run("--url", url, "--once", "--json", "--interval", "0.1", "--key", "good")
    found = json.loads(out)
    assert code == 0 and found["tasks"][0]["task"] == "triage"
    assert found["requests"] == pytest.approx(40 / found["seconds"])
    assert 0.02 < found["first_token"]["p50"] < 0.06


def test_json_goes_on_a_line_for_each_look() -> None:
    with pages(busy()) as url:
        command = [sys.executable, "-m", "foreword", "top", "--url", url, "--json", "--interval", "0.1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            found = [json.loads(running.stdout.readline()) for _ in range(3)]
            running.send_signal(signal.SIGINT)
            assert running.wait(10) == 0
    assert all(look["requests"] > 0 for look in found)


def test_clear_errors(run: Run, unused_port: int) -> None:
    code, _, err = run("--url", f"http://127.0.0.1:{unused_port}", "--once")
    assert code == 7 and "no answer from" in err and "Is `foreword serve` running there?" in err
    for url in ("127.0.0.1:8000", "ftp://x", "http://x:port"):
        code, _, err = run("--url", url, "--once")
        assert code == 7 and "is no URL" in err, (url, err)
    with pages(lambda: (401, "no")) as url:
        code, _, err = run("--url", url, "--once")
        assert code == 7 and "needs a key (401)" in err and "--key" in err
        code, _, err = run("--url", url, "--once", "--key", "bad")
        assert code == 7 and "does not accept this key (401)" in err
    for text in ("<html>hello</html>", "vllm_running 1.0\n"):
        with pages(lambda text=text: (200, text)) as url:
            code, _, err = run("--url", url, "--once")
            assert code == 7 and "Give the URL of `foreword serve`" in err and "\n" in err.strip()
    with pages(lambda: (500, "broken")) as url:
        code, _, err = run("--url", url, "--once")
        assert code == 7 and "answers 500" in err


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_live_view_needs_a_terminal(run: Run) -> None:
    code, _, err = run("--url", "http://127.0.0.1:1")
    assert code == 2 and "--once" in err


class Terminal:
    """A terminal with a command in it."""

    def __init__(self, *command: str, rows: int = 30, columns: int = 120) -> None:
        self.primary, secondary = pty.openpty()
        fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        environment["TERM"] = "xterm-256color"
        self.process = subprocess.Popen(
            command, stdin=secondary, stdout=secondary, stderr=secondary, env=environment, start_new_session=True
        )
        os.close(secondary)
        self.data = b""

    def read_until(self, pattern: str, timeout_s: float = 30.0) -> str:
        """Return all that came, without styles, up to the pattern."""
        end = time.monotonic() + timeout_s
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, f"{pattern!r} never came:\n{self.text}"
            if select.select([self.primary], [], [], 0.1)[0]:
                self.data += os.read(self.primary, 65536)
        return self.text

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.data.decode(errors="replace")).replace("\r\n", "\n")

    def interrupt(self) -> int:
        """Press Ctrl+C; return the exit code."""
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):
            while data := os.read(self.primary, 65536):
                self.data += data
        code = self.process.wait(10)
        os.close(self.primary)
        return code


def test_live_in_a_terminal() -> None:
    """It draws itself anew in place, says when the gateway is gone and when it is back, and leaves the screen clean."""
    state = {"code": 200}
    page = busy()

    def moody() -> tuple[int, str]:
        return page() if state["code"] == 200 else (state["code"], "broken")

    with pages(moody) as url:
        command = (sys.executable, "-m", "foreword", "top", "--url", url, "--interval", "0.1")
        terminal = Terminal(*command)
        terminal.read_until(r"triage +7 +[\d,.]+ +0 ")
        assert "engine up" in terminal.read_until("team-a")
        state["code"] = 500
        terminal.read_until("answers 500; what is shown is old")
        state["code"] = 200
        terminal.data = b""
        assert "what is shown is old" not in terminal.read_until("versions loaded").rpartition("foreword top")[2]
        code = terminal.interrupt()
    assert code == 0
    assert terminal.data.count(b"\x1b[2J") == 0  # it never blanks the screen, which would flicker
    assert terminal.data.endswith(b"\x1b[?25h\x1b[?1049l")  # cursor and old screen are back


def drawn(seen: View, *, width: int, height: int | None = None) -> list[str]:
    from rich.console import Console

    console = Console(width=width, height=height, color_system=None, file=io.StringIO(), record=True)
    console.print(screen(seen, "http://x", width=width, height=height))
    return [line.rstrip() for line in console.export_text().splitlines()]


def many(num: int) -> View:
    metrics = fresh()
    old = parse_page(generate_latest(metrics.registry).decode(), 0.0)
    for number in range(num):
        traffic(metrics, f"task{number:02}", "1", num - number, tenant=f"team{number}")
    return view(old, parse_page(generate_latest(metrics.registry).decode(), 1.0))


@pytest.mark.parametrize("height", [24, 30, 50])
@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_the_terminal_and_says_what_is_left_out(width: int, height: int) -> None:
    lines = drawn(many(40), width=width, height=height)
    assert len(lines) <= height and max(map(len, lines)) <= width
    assert sum(line.startswith("and ") for line in lines) == 2
    shown = [line for line in lines if line.startswith("task") and not line.startswith("task ")]
    left = int(next(line for line in lines if line.startswith("and ")).split()[1])
    assert len(shown) + left == 40 and shown[0].startswith("task00")
    assert all(line.startswith("…") is False and "…" not in line[20:] for line in shown)


def test_everything_is_shown_where_there_is_no_screen() -> None:
    lines = drawn(many(40), width=120)
    assert sum(line.startswith("task") for line in lines) == 41 and not any(line.startswith("and ") for line in lines)


def test_names_cannot_speak_to_the_terminal() -> None:
    metrics = fresh()
    old = parse_page(generate_latest(metrics.registry).decode(), 0.0)
    traffic(metrics, "a\x1b[31m", "1", 1, tenant="t\x07")
    lines = drawn(view(old, parse_page(generate_latest(metrics.registry).decode(), 1.0)), width=120)
    assert all(line.isprintable() for line in lines) and any("a\\x1b[31m" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (0.123, "0.12"), (3.44, "3.4"), (99.94, "99.9"), (128.4, "128"), (4312, "4,312")]
)
def test_rates_have_three_digits(value: float, expected: str) -> None:
    assert rate(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "-"), (0.00081, "0.8 ms"), (0.0182, "18 ms"), (0.9996, "1.00 s"), (1.239, "1.24 s")],
)
def test_times_have_units(value: float | None, expected: str) -> None:
    assert seconds(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**30, "1.0 GiB")],
)
def test_sizes_have_units(value: float, expected: str) -> None:
    assert size(value) == expected
