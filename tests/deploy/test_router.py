"""What vllm-project/router does to our requests, with the options of `deploy/router/vllm-router.sh`.

Runs where vllm-router is installed: `make test-deploy`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from foreword.serve.engines.http_stream import HttpClient, Post
from foreword.serve.engines.replicas import Facts, Replica
from foreword.serve.vllm.wire import Wanted, scope_of
from tests.deploy.stub import Stub, free_port

SCRIPT = Path(__file__).parents[2] / "deploy/router/vllm-router.sh"
ROUTER = Path(sys.executable).with_name("vllm-router")
WANTED = Wanted("c" * 64, 3, scope_of("acme"))
BODY = {
    "model": "base",
    "prompt": [0, 0, 0, 5, 6],
    "max_tokens": 3,
    "temperature": 0.0,
    "cache_salt": WANTED.salt,
    "kv_transfer_params": WANTED.to_params(),
    "prompt_embeds": "QUJD",
    "return_token_ids": True,
    "structured_outputs": {"choice": ["a"]},
}
KEYS = [f"digest-{index}" for index in range(40)]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def until_up(session: aiohttp.ClientSession) -> None:
    while True:
        try:
            async with session.get("/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.05)


@asynccontextmanager
async def routed(
    stubs: Sequence[Stub], command: Sequence[str | Path] | None = None
) -> AsyncIterator[aiohttp.ClientSession]:
    """Start the stubs and a router in front of them; yield a client of the router."""
    for stub in stubs:
        await stub.start()
    port = free_port()
    command = command or [SCRIPT, str(port)]
    command = [str(part).replace("PORT", str(port)) for part in (*command, *(stub.url for stub in stubs))]
    environment = {**os.environ, "VLLM_ROUTER": str(ROUTER), "METRICS_PORT": str(free_port())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            await until_up(session)
            yield session
    finally:
        process.terminate()
        process.wait(20)
        for stub in stubs:
            await stub.stop()


async def ask(session: aiohttp.ClientSession, key: str, **fields: Any) -> tuple[int, str | None]:
    """Return the status and the stub that answered."""
    headers = {"x-session-id": key, "x-request-id": os.urandom(8).hex()}
    async with session.post("/v1/completions", json={"model": "base", "prompt": "x", **fields}, headers=headers) as got:
        await got.read()
        return got.status, got.headers.get("x-served-by")


async def owners(session: aiohttp.ClientSession) -> Mapping[str, tuple[int, str | None]]:
    return {key: await ask(session, key) for key in KEYS}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.deploy
def test_every_field_and_header_of_ours_arrives(is_stream: bool) -> None:
    async def main() -> None:
        stub = Stub("a")
        async with routed([stub]) as session:
            sent = {"x-session-id": WANTED.sha256, "x-request-id": "r1", "authorization": "Bearer inner"}
            body = {**BODY, "stream": is_stream}
            async with session.post("/v1/completions", json=body, headers=sent) as response:
                assert response.status == 200 and response.headers["x-served-by"] == "a"
                text = await response.text()
            assert text.endswith("data: [DONE]\n\n") is is_stream
        headers, arrived = stub.seen[-1]
        assert {name: arrived.get(name) for name in body} == body
        assert {name: headers.get(name) for name in sent} == sent

    run(main())


def test_the_gateways_client_names_the_version_to_routers() -> None:
    async def main() -> None:
        stub = await Stub("a").start()
        client, replica = HttpClient(), Replica(stub.url)
        replica.facts = Facts(model="base", max_model_len=None)
        try:
            post = Post(
                path="/v1/completions", body=b'{"prompt":"x"}', key=WANTED.sha256, headers={"x-request-id": "r1"}
            )
            async with client.post(replica, post) as response:
                assert response.status == 200
        finally:
            await client.aclose()
            await stub.stop()
        headers, _ = stub.seen[0]
        assert headers["x-session-id"] == WANTED.sha256 and headers["x-request-id"] == "r1"

    run(main())


@pytest.mark.deploy
def test_a_digest_stays_on_its_replica_while_another_one_dies_and_returns() -> None:
    async def main() -> None:
        stubs = [Stub("a"), Stub("b"), Stub("c")]
        async with routed(stubs) as session:
            before = await owners(session)
            assert {name for _, name in before.values()} == {"a", "b", "c"}
            assert await owners(session) == before
            await stubs[0].stop()
            after: Mapping[str, tuple[int, str | None]] = {"": (0, None)}
            while {status for status, _ in after.values()} != {200}:
                after = await owners(session)
            assert all(after[key] == before[key] for key in KEYS if before[key][1] != "a")
            await stubs[0].start()
            while await owners(session) != before:
                pass

    run(main())


@pytest.mark.deploy
def test_a_version_that_fails_costs_nobody_else() -> None:
    async def main() -> None:
        stubs = [Stub("a"), Stub("b")]
        async with routed(stubs) as session:
            assert {(await ask(session, key, prompt="fail"))[0] for key in KEYS} == {500}
            assert sum(len(stub.seen) for stub in stubs) == len(KEYS)  # asked for once each
            assert {status for status, _ in (await owners(session)).values()} == {200}

    run(main())


@pytest.mark.deploy
def test_the_routers_defaults_let_one_bad_version_stop_everybody() -> None:
    """Why the script turns them off; when this fails, the script may be simpler."""

    async def main() -> None:
        stubs = [Stub("a"), Stub("b")]
        options = ["--host", "127.0.0.1", "--port", "PORT", "--prometheus-port", str(free_port())]
        command = [ROUTER, *options, "--policy", "consistent_hash", "--worker-urls"]
        async with routed(stubs, command) as session:
            for key in KEYS[:10]:
                await ask(session, key, prompt="fail")
            found = await asyncio.gather(*(ask(session, key) for key in KEYS))
            assert {status for status, _ in found} == {503}

    run(main())


@pytest.mark.parametrize("fields", [{"prompt": "wait"}, {"prompt": "wait", "stream": True}])
@pytest.mark.deploy
def test_a_client_that_goes_away_frees_the_replica(fields: Mapping[str, Any]) -> None:
    async def main() -> None:
        stub = Stub("a")
        async with routed([stub]) as session:
            asking = asyncio.create_task(ask(session, "key", **fields))
            await stub.arrived.wait()
            asking.cancel()
            await stub.cancelled.wait()

    run(main())


@pytest.mark.deploy
def test_a_client_that_goes_away_in_a_stream_frees_the_replica() -> None:
    async def main() -> None:
        stub = Stub("a")
        async with routed([stub]) as session:
            body = {"model": "base", "prompt": "x", "stream": True, "max_tokens": 100_000}
            response = await session.post("/v1/completions", json=body)
            await response.content.readline()
            response.close()
            await stub.cancelled.wait()

    run(main())
