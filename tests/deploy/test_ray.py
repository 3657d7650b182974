"""foreword on Ray Serve: two engine replicas, tasks multiplexed over them, one of them killed.

Runs where Ray is installed: `make test-deploy`.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreword.core.artefact import load_artefact
from foreword.core.compile import compile as compile_vectors
from foreword.engine.engine import Engine
from foreword.engine.request import Request
from foreword.registry.store import Registry
from tests.deploy.stub import free_port
from tests.serve.artefacts import BASE, demo_base, write_artefact

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]

TASKS = {"alpha": "prompt", "beta": "prefix", "gamma": "kv"}
QUESTIONS = ["hello", "where is my parcel", "the invoice is wrong", "thank you"]
BASE_NAME = BASE.name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with one version of each task."""
    folder = tmp_path_factory.mktemp("ray")
    with Registry.open(folder / "home") as registry:
        for seed, (task, method) in enumerate(TASKS.items()):
            registry.publish(write_artefact(folder, task, method, seed=seed))  # type: ignore[arg-type]
    return folder / "home"


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[httpx.Client]:
    """Two replicas with one thread each, which hold two versions at most, behind Serve's proxy."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    import ray
    from deploy.ray.app import build
    from ray import serve
    from ray.serve.config import HTTPOptions

    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        settings = {"base": str(BASE), "home": str(home), "dtype": "float32", "kv_memory": "256MiB", "max_prefixes": 2}
        serve.run(build(settings), name="foreword", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def expected(home: Path) -> dict[tuple[str, str], str]:
    """What one engine in this process answers to every question for every task and for the base."""
    engine = Engine(demo_base(), kv_memory="64MiB")
    with Registry.open(home) as registry:
        for task in TASKS:
            artefact = load_artefact(registry.path(registry.resolve(task)))
            engine.add_prefix(task, compile_vectors(demo_base(), artefact))
    pairs = [(model, text) for model in (*TASKS, BASE_NAME) for text in QUESTIONS]
    asked = [Request(prompt=text, prefix=None if model == BASE_NAME else model, max_tokens=8) for model, text in pairs]
    return {pair: output.text for pair, output in zip(pairs, engine.generate(asked), strict=True)}


def ask(server: httpx.Client, model: str, text: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": text, "temperature": 0, "max_tokens": 8, **fields}
    return server.post("/v1/completions", json=body)


def answers_agree(server: httpx.Client, expected: dict[tuple[str, str], str]) -> None:
    """Ask every question for every task at once."""
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(expected, pool.map(lambda pair: ask(server, *pair), expected), strict=True))
    assert {response.status_code for response in found.values()} == {200}
    assert {pair: response.json()["choices"][0]["text"] for pair, response in found.items()} == expected


def replicas(server: httpx.Client) -> dict[str, dict[str, Any]]:
    return server.get("/replicas").json()  # type: ignore[no-any-return]


def num_loads(server: httpx.Client) -> int:
    return sum(replica["loads"] for replica in replicas(server).values())


def newly_asked(server: httpx.Client, before: dict[str, dict[str, Any]]) -> str:
    """Return the replica that has had a request since `before`."""
    counts = {name: sum(replica["requests"].values()) for name, replica in before.items()}
    (name,) = (
        name for name, replica in replicas(server).items() if sum(replica["requests"].values()) > counts.get(name, 0)
    )
    return name


def running_replicas() -> list[str]:
    import ray

    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if "#EngineReplica#" in name]


def test_answers_equal_the_embedded_engine(server: httpx.Client, expected: dict[tuple[str, str], str]) -> None:
    assert len(set(expected.values())) > len(TASKS)  # the tasks do differ
    answers_agree(server, expected)
    answers_agree(server, expected)  # more versions than a replica holds: some were evicted and come back


def test_requests_of_a_task_go_to_a_replica_that_holds_it(server: httpx.Client) -> None:
    """Three versions, two places in each replica: requests sent at random would load one at every third request."""

    def round_of_all() -> int:
        before = num_loads(server)
        for task in TASKS:
            ask(server, task, QUESTIONS[0])
        return num_loads(server) - before

    quiet = 0
    for _ in range(40):  # Serve learns within a moment who holds what
        quiet = 0 if round_of_all() else quiet + 1
        if quiet == 2:
            break
    assert [round_of_all() for _ in range(12)] == [0] * 12
    assert len(replicas(server)) == 2


def test_errors_and_streams_pass_through(server: httpx.Client) -> None:
    response = ask(server, "alpha", "x", max_tokens=100_000)
    assert response.status_code == 400 and "100000" in response.json()["error"]["message"]
    assert ask(server, "nothing", "x").status_code == 404
    whole = ask(server, "gamma", QUESTIONS[1]).json()["choices"][0]["text"]
    with server.stream("POST", "/v1/completions", json=stream_body("gamma", QUESTIONS[1])) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(text_of(event) for event in events[:-1]) == whole


def test_a_client_that_goes_away_frees_the_replica(server: httpx.Client) -> None:
    """A stream left after its first event ends in the engine long before a whole one would."""
    body = stream_body("alpha", QUESTIONS[0]) | {"max_tokens": 1000, "ignore_eos": True, "n": 16}

    def seconds_until_idle(is_left: bool) -> float:
        started, before = time.monotonic(), replicas(server)
        with server.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            name = newly_asked(server, before)
            if not is_left:
                list(lines)
        while True:  # Serve sends requests to the other one meanwhile
            before = replicas(server)
            ask(server, BASE_NAME, QUESTIONS[0], max_tokens=1)
            if newly_asked(server, before) == name and replicas(server)[name]["running"] <= 1:
                return time.monotonic() - started

    whole = seconds_until_idle(is_left=False)
    assert seconds_until_idle(is_left=True) < whole / 2


def test_a_killed_replica_costs_its_own_streams_and_nothing_else(
    server: httpx.Client, expected: dict[tuple[str, str], str]
) -> None:
    import ray

    body = stream_body("alpha", QUESTIONS[0]) | {"max_tokens": 1900, "ignore_eos": True, "n": 16}
    before = replicas(server)
    with server.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        victim = newly_asked(server, before)
        name = next(name for name in running_replicas() if name.endswith(victim))
        ray.kill(ray.get_actor(name, namespace="serve"))
        rest = [line for line in lines if line]
    assert '"backend_failed"' in rest[-1]
    answers_agree(server, expected)  # the other replica has all of it
    known, deadline = set(replicas(server)), time.monotonic() + 120
    while set(replicas(server)) == known:  # until the replica that Serve starts in its place answers
        assert time.monotonic() < deadline, "Serve did not replace the replica"
        assert ask(server, BASE_NAME, QUESTIONS[0]).status_code == 200
        time.sleep(0.1)
    answers_agree(server, expected)


def test_an_evicted_version_is_forgotten_once() -> None:
    from deploy.ray.app import Held

    removed: list[str] = []

    class Engines:
        remove_prefix = staticmethod(removed.append)

    held: Any = Held(Engines(), "digest")  # type: ignore[arg-type]
    held.__del__()  # Serve's call at eviction
    held.__del__ = lambda _: None  # as Serve does
    del held
    gc.collect()
    assert removed == ["digest"]  # a second call would take a version away that was loaded again meanwhile


def stream_body(model: str, text: str) -> dict[str, Any]:
    return {"model": model, "prompt": text, "temperature": 0, "max_tokens": 8, "stream": True}


def text_of(event: str) -> str:
    return str(json.loads(event)["choices"][0]["text"])
