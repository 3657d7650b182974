"""`foreword serve`: the port, the ready line, signals, the exit status."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreword.errors import RegistryError, ServeError
from foreword.registry.store import Registry
from foreword.serve.run import bind, check_exposure, own_name, serve_base
from tests.serve.artefacts import BASE, write_artefact

COMMAND = [sys.executable, "-c", "from foreword.cli import main; main()", "serve", "--base", str(BASE)]


def test_a_port_in_use_is_told_before_anything_is_loaded() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} of 127.0.0.1 is in use") as caught:
            serve_base("/no/such/base", port=port)
        assert "--port" in caught.value.hint
        done = subprocess.run([*COMMAND, "--port", str(port)], capture_output=True, text=True)
        assert done.returncode == ServeError.exit_code
        assert f"error: port {port} of 127.0.0.1 is in use" in done.stderr and "Traceback" not in done.stderr


def test_addresses_that_are_none() -> None:
    with pytest.raises(ServeError, match=r"'no\.such\.host\.invalid' is no address"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(ServeError, match=r"cannot listen on port 0 of 192\.0\.2\.1"):
        bind("192.0.2.1", 0)


def test_a_port_can_be_taken_again_at_once() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            first.accept()[0].close()
    bind("127.0.0.1", port).close()


def test_own_names() -> None:
    assert own_name(str(BASE)) == "base-3m" and own_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert own_name(".") == Path.cwd().name


@contextmanager
def process(home: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Start the command on a free port; yield it and its ready line."""
    command = [*COMMAND, "--home", str(home), "--port", "0", "--json", *options]
    environment = {**os.environ, "FOREWORD_HOME": "/nonexistent"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as started:
        try:
            assert started.stdout is not None and started.stderr is not None
            line = started.stdout.readline()
            assert line, started.stderr.read()
            yield started, json.loads(line)
        finally:
            started.kill()


def test_serve_until_sigterm(tmp_path: Path) -> None:
    """Running answers end, nothing new is taken, the exit status is 0; text of requests is not on the terminal."""
    with Registry.open(tmp_path / "home") as registry:
        sha256 = registry.publish(write_artefact(tmp_path, "triage")).sha256
    with process(tmp_path / "home", "--preload", "triage", "--kv-memory", "64MiB") as (started, ready):
        assert {**ready, "url": ""} == {"event": "ready", "url": "", "base": "base-3m", "preloaded": ["triage"]}
        url = ready["url"]
        assert httpx.get(f"{url}/health").json()["resident_versions"] == 1
        body = {"model": "triage", "prompt": "tell nobody", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            assert answer.headers["x-foreword-digest"] == sha256
            lines = answer.iter_lines()
            next(lines)
            started.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        out, err = started.communicate(timeout=60)
        assert (started.returncode, out) == (0, "")
        assert "triage@1 200" in err and "Traceback" not in err
        assert "tell nobody" not in err


def test_preloading_what_cannot_be_loaded_ends_the_start(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "home") as registry:
        registry.path(registry.publish(write_artefact(tmp_path, "triage"))).unlink()
    for name, error in (("triage", "is gone"), ("triage@prod", "no alias 'prod'")):
        with pytest.raises(RegistryError, match=error):
            serve_base(str(BASE), port=0, home=tmp_path / "home", kv_memory="16MiB", preload=[name])


@pytest.mark.slow
def test_draining_has_an_end(tmp_path: Path) -> None:
    with process(tmp_path / "home", "--drain", "1") as (started, ready):
        body = {"model": "base-3m", "prompt": "x", "max_tokens": 2000, "n": 16, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{ready['url']}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            started.send_signal(signal.SIGINT)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        started.communicate(timeout=60)
        assert started.returncode == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_address_that_others_reach_needs_keys_or_a_word(host: str) -> None:
    with pytest.raises(ServeError, match="can be reached from other machines, and no keys are required") as caught:
        serve_base("/no/such/base", host=host, port=0)
    assert "--require-keys" in caught.value.hint and "--open" in caught.value.hint
    check_exposure(host, require_keys=True, is_open=False)
    check_exposure(host, require_keys=False, is_open=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "no.such.host.invalid"])
def test_this_machines_own_addresses_need_none(host: str) -> None:
    check_exposure(host, require_keys=False, is_open=False)
