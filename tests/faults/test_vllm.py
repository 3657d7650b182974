"""Faults 1 and 8 with a real vLLM behind the gateway: it is killed in the middle of answers and of loads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from pathlib import Path

import httpx
import psutil
import pytest

from foreword.core.artefact import load_artefact
from foreword.core.compile import compile
from foreword.engine.engine import Engine
from foreword.engine.request import Request
from tests.faults.client import Answer, Asker, together, until
from tests.faults.stage import Process, Stage, staged, wait_until
from tests.serve.artefacts import BASE, demo_base
from tests.vllm.server import BLOCK, NAME, SETTINGS, connector, environment

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
UP_S = 240.0
TASKS = [f"task-{place}" for place in range(5)]
LENGTH = 200
"""Tokens of an answer that is under way for a while."""


class VLLM:
    """A real server that can be killed and started again on its port, with its cache."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.port = 0
        self.seen: list[psutil.Process] = []
        self.process = self._start()

    def __enter__(self) -> VLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _start(self) -> Process:
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        config = connector(self.stage.registry.blobs.url, self.stage.folder / "vllm-cache")
        command = [environment() / "bin/vllm", "serve", BASE, "--served-model-name", NAME, "--host", "127.0.0.1"]
        command += ["--port", self.port, "--dtype", "float32", "--max-model-len", 512, "--block-size", BLOCK]
        command += ["--enforce-eager", "--enable-prefix-caching", "--kv-transfer-config", json.dumps(config)]
        return self.stage.run([str(part) for part in command], SETTINGS)

    def tree(self) -> list[psutil.Process]:
        """Return its processes, the front end first."""
        front = psutil.Process(self.process.pid)
        found = [front, *front.children(recursive=True)]
        self.seen += found
        return found

    def kill(self, only: str = "") -> None:
        """SIGKILL all of its processes, or the one of this name."""
        for each in self.tree():
            if not only or only in each.name() + " ".join(each.cmdline()):
                os.kill(each.pid, signal.SIGKILL)
        if not only:
            self.process.wait()

    def end(self) -> None:
        """Kill all of its processes, also those that outlived their parents."""
        if self.process.popen.poll() is None:
            self.tree()
        for each in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.seen.clear()
        self.process.wait()

    def restart(self) -> None:
        self.end()
        self.process = self._start()


@pytest.mark.timeout(600)
def test_vllm_killed_in_the_middle_of_answers_and_of_loads(tmp_path: Path) -> None:
    """Proves: open answers end with an error and not with less text; what vLLM has on disk after a SIGKILL in the
    middle of its loads is whole or not used; the gateway finds it again, and its answers are right."""
    with staged(tmp_path) as stage, VLLM(stage) as server:
        versions = {task: stage.publish(task) for task in TASKS}
        alone = Engine(demo_base(), kv_memory="64MiB")
        expected = {}
        for task, version in versions.items():
            alone.add_prefix(version.sha256, compile(demo_base(), load_artefact(stage.registry.path(version))))
            asked = Request(prompt="hello", prefix=version.sha256, max_tokens=12, ignore_eos=True)
            expected[task] = alone.generate([asked])[0].text
        key = stage.tenant("acme", *TASKS)
        greedy = {"temperature": 0, "ignore_eos": True, "max_tokens": 12}
        _await_up(server)
        gateway = stage.gateway(options=("--vllm", server.url))

        def is_right(task: str) -> bool:
            answer = together(gateway, key, lambda asker: asker.ask(model=task, **greedy))
            assert answer.status != 200 or answer.text == expected[task], (task, answer)
            return answer.status == 200

        wait_until(lambda: is_right(TASKS[0]), 30)

        async def killed(asker: Asker, only: str) -> tuple[list[Answer], Answer]:
            begun = await asker.streams(2, model=TASKS[0], max_tokens=LENGTH, ignore_eos=True)
            _, whole = asker.begin(model=TASKS[0], max_tokens=LENGTH, ignore_eos=True)
            loads = [asker.begin(model=task, **greedy)[1] for task in TASKS[1:]]
            await asyncio.sleep(0.05)
            await asyncio.to_thread(server.kill, only)
            for answer in await asyncio.gather(*loads):
                assert answer.status in (200, 502), answer
            return [await task for _, task in begun], await whole

        for only in ("", "EngineCore"):
            streams, whole = together(gateway, key, lambda asker, only=only: killed(asker, only))
            for answer in streams:
                assert answer.status == 200 and not answer.is_whole and answer.error is not None and not answer.broken
                assert answer.error["code"] == "backend_failed"
            assert whole.status == 502 and whole.error is not None
            wait_until(lambda: together(gateway, key, lambda asker: asker.ask(model=TASKS[0])).status == 502, 20)
            with gateway.client() as client:
                wait_until(lambda client=client: client.get("/ready").status_code == 503, 20)
                assert client.get("/health").json()["open_requests"] == 0
            server.restart()
            _await_up(server)
            for task in TASKS:
                wait_until(lambda task=task: is_right(task), 30)
        assert "Traceback" not in gateway.errors()


def _await_up(server: VLLM) -> None:
    async def up() -> None:
        await until(lambda: server.process.popen.poll() is not None or _is_up(server), UP_S)

    asyncio.run(up())
    assert server.process.popen.poll() is None, server.process.errors()[-3000:]


def _is_up(server: VLLM) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=2, verify=False).status_code == 200
    except httpx.TransportError:
        return False
