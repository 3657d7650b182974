"""`foreword serve` in front of engines elsewhere: options, what they lead to, and a whole process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from foreword.cli import app
from foreword.core.compile_file import compile_file
from foreword.errors import ConfigError
from foreword.registry.store import Registry
from foreword.serve import run_replicas as run_replicas_module
from foreword.serve.access.control import Control
from foreword.serve.engines.embeddings import EmbeddingsBackend
from foreword.serve.engines.http_backend import HttpBackend
from foreword.serve.engines.remote import RemoteBackend
from foreword.serve.engines.vllm_backend import VLLMBackend
from foreword.serve.run_replicas import KEY_VARIABLE, Mode, serve_replicas
from tests.serve.artefacts import BASE, demo_base, write_artefact
from tests.serve.http_cases import demo_info
from tests.serve.stub_vllm import StubVLLM


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--vllm", "http://a", "--replica", "http://b"], "--vllm and --replica are given"),
        (["--vllm", "http://a", "--device", "cuda"], "--device is for the engine in this process"),
        (["--replica", "http://a", "--kv-memory", "1GiB"], "--kv-memory is for the engine in this process"),
        (["--replica", "http://a", "--vllm-mode", "plugin"], "--vllm-mode is for --vllm"),
        (["--replica", "http://a", "--dtype", "bfloat16"], "--dtype is for the engine in this process"),
        (["--vllm", "http://a", "--vllm-mode", "embeddings", "--dtype", "auto"], "--dtype is for the engine"),
        (["--max-inflight", "5"], "--max-inflight is for engines elsewhere"),
        (["--first-token-timeout", "5"], "--first-token-timeout is for engines elsewhere"),
        (["--vllm", "10.0.0.1:8000"], "'10.0.0.1:8000' is no URL"),
        (["--vllm", "http://a", "--vllm", "http://a/"], "http://a is given twice"),
        (["--vllm", "http://a", "--port", "0"], "config.json is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together(options: list[str], what: str, tmp_path: Path) -> None:
    command = ["serve", "--base", str(tmp_path), "--home", str(tmp_path / "home"), *options]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ConfigError) and what in result.exception.message


@pytest.mark.parametrize(
    ("mode", "kind"), [("plugin", VLLMBackend), ("embeddings", EmbeddingsBackend), ("remote", RemoteBackend)]
)
def test_what_a_mode_leads_to(
    mode: Mode, kind: type[HttpBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def serve_backend(make: Any, **options: Any) -> None:
        with Registry.open(tmp_path) as registry:
            control = Control(registry.access)
            made.append(make(registry, control))
            registry.access.drain("http://b")
            asyncio.run(control.refresh())
            control.close()
        made.append(options)

    monkeypatch.setattr(run_replicas_module, "serve_backend", serve_backend)
    monkeypatch.setattr(run_replicas_module, "base_info", lambda base, cache: demo_info())
    monkeypatch.setattr(run_replicas_module, "load_tokenizer", lambda folder: demo_base().tokenizer)
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    serve_replicas(str(BASE), ["http://a/", "http://b"], mode, max_inflight=7, first_token_s=9.0, port=5)
    backend, options = made
    assert type(backend) is kind and (options["base_name"], options["port"]) == ("base-3m", 5)
    assert backend.client._headers["authorization"] == "Bearer secret"
    assert (backend.pool.max_inflight, backend.pool.timeouts.first_token_s) == (7, 9.0)
    assert [state.is_draining for state in backend.states()] == [False, True]
    if isinstance(backend, VLLMBackend):
        assert (backend.compiled.base, backend.compiled.dtype) == (demo_info().folder, "float32")


class Engines:
    """Stubs in a loop of their own, in a thread."""

    def __init__(self, count: int, **fields: Any) -> None:
        self.stubs = [StubVLLM(**fields) for _ in range(count)]
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        for stub in self.stubs:
            self.do(stub.start())

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        for stub in self.stubs:
            self.do(stub.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def engines() -> Iterator[Engines]:
    found = Engines(2)
    yield found
    found.close()


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command on a free port; yield it and its URL."""
    command = [sys.executable, "-m", "foreword", "serve", "--base", str(BASE), "--port", "0", "--json", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as started:
        try:
            assert started.stdout is not None and started.stderr is not None
            line = started.stdout.readline()
            assert line, started.stderr.read()
            yield started, json.loads(line)["url"]
        finally:
            started.kill()


@pytest.mark.slow
def test_a_gateway_in_front_of_two_engines(tmp_path: Path, engines: Engines) -> None:
    """Tasks by name, drain, a killed engine, and SIGTERM with an answer under way."""
    path = write_artefact(tmp_path, "triage")
    first, second = engines.stubs
    with Registry.open(tmp_path / "home") as registry:
        registry.publish(path)
        compile_file(demo_base(), path, tmp_path / "out.safetensors")
        registry.add_compiled(tmp_path / "out.safetensors")
        options = ["--home", str(tmp_path / "home"), "--vllm", first.url, "--vllm", second.url, "--preload", "triage"]
        with process(*options) as (gateway, url), httpx.Client(base_url=url, timeout=30) as client:
            body = {"model": "triage", "prompt": "hello", "max_tokens": 3}

            def ask() -> str:
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return str(answer.json()["choices"][0]["text"])

            assert ask() == "w0 w1 w2 "
            home = next(stub for stub in engines.stubs if len(stub.bodies) == 2)  # the proof of the load, and this one
            other = second if home is first else first
            registry.access.drain(home.url)
            wait_for(lambda: ask() and bool(other.bodies))
            asked = len(home.bodies)
            assert ask() == "w0 w1 w2 " and len(home.bodies) == asked
            registry.access.undrain(home.url)
            wait_for(lambda: ask() and len(home.bodies) > asked)
            engines.do(home.stop())
            assert {ask() for _ in range(5)} == {"w0 w1 w2 "}
            other.delay_s = 0.3
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
                lines = stream.iter_lines()
                next(lines)
                gateway.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
            _, err = gateway.communicate(timeout=60)
            assert gateway.returncode == 0 and "Traceback" not in err
            assert f"replica {home.url} lost a request" in err or f"replica {home.url} is down" in err


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
