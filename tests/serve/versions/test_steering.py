"""Canary, shadow, promotion and rollback over HTTP: who answers, what is told of it, and that no request is lost."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreword.errors import ArtefactCorrupt
from foreword.registry.access_records import Route
from foreword.registry.store import Registry
from foreword.serve.access.control import Control
from foreword.serve.gateway import create_app
from foreword.serve.versions import steering
from foreword.serve.versions.routes import takes, user_key
from tests.registry.conftest import BASE, Factory
from tests.serve.fakes import FakeBackend, FakeRegistry, Served, served, version
from tests.serve.fakes_access import FakeAccess

CANARY = Route(task="triage", kind="canary", number=2, fraction=0.4, salt="s", keep_inputs=False)
SHADOW = Route(task="triage", kind="shadow", number=3, fraction=1.0, salt="t", keep_inputs=True)


def whole(route: Route) -> Route:
    return dataclasses.replace(route, fraction=1.0)


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class Stage:
    """A gateway over fakes, whose routes tests change."""

    def __init__(self, running: Served, backend: FakeBackend, registry: FakeRegistry, access: FakeAccess) -> None:
        self.running, self.backend, self.registry, self.access = running, backend, registry, access
        self.gateway = running.app.state.gateway
        self.http = running.client()

    def ask(self, model: str = "triage", *, user: str | None = None, **fields: Any) -> httpx.Response:
        who = {} if user is None else {"user": user}
        return self.http.post("/v1/completions", json={"model": model, "prompt": "x", **who, **fields})

    def route(self, *routes: Route) -> None:
        """Set the routes of triage, and wait until the gateway knows."""
        self.access.change(routes={"triage": routes} if routes else {})
        wait_for(lambda: self.gateway.control.snapshot.revision == self.access.data.revision)

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextmanager
def staged(**options: Any) -> Iterator[Stage]:
    backend, access = FakeBackend(), FakeAccess()
    registry = FakeRegistry(*(version("triage", number) for number in (1, 2, 3)), version("clause", 1))
    registry.moved["triage@prod"] = 1
    app = create_app(backend, registry, base_name="base", control=Control(access, poll_s=0.005), **options)
    with served(app, backend) as running:
        found = Stage(running, backend, registry, access)
        yield found
        found.http.close()
    assert backend.num_running == 0
    assert all(entry.leases == 0 for entry in found.gateway.residents._entries.values())


@pytest.fixture
def stage() -> Iterator[Stage]:
    with staged() as found:
        yield found


def test_users_of_the_canary_get_the_candidate_and_stay_there(stage: Stage) -> None:
    stage.route(CANARY)
    users = [f"user {number}" for number in range(30)]
    expected = {user: takes(CANARY, user_key(user=user, tenant=None, key=None, request_id="any")) for user in users}
    assert len(set(expected.values())) == 2
    for user in 2 * users:
        found = stage.ask(user=user)
        number, route = (2, "canary") if expected[user] else (1, "stable")
        assert found.json()["choices"][0]["text"].startswith(f"sha-triage-{number}: ")
        assert found.headers["x-foreword-version"] == f"triage@{number}"
        assert found.headers["x-foreword-digest"] == f"sha-triage-{number}"
        assert found.headers["x-foreword-route"] == route
        assert found.json()["model"] == "triage"
    assert stage.metric('foreword_canary_requests_total{route="canary",task="triage"}') == 2 * sum(expected.values())
    assert stage.metric('foreword_canary_requests_total{route="stable",task="triage"}') == 2 * (
        30 - sum(expected.values())
    )


def test_only_the_bare_name_is_steered(stage: Stage) -> None:
    stage.route(whole(CANARY))
    assert stage.ask().headers["x-foreword-route"] == "canary"
    for model, number in (("triage@1", "triage@1"), ("triage@prod", "triage@1"), ("clause", "clause@1")):
        found = stage.ask(model)
        assert found.headers["x-foreword-version"] == number and "x-foreword-route" not in found.headers
    assert "x-foreword-route" not in stage.ask("base").headers
    stage.route()
    assert "x-foreword-route" not in stage.ask().headers


def test_a_canary_that_cannot_be_loaded_takes_nobody_down(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.route(whole(CANARY))
    stage.gateway.residents.retry_s = 0
    stage.backend.load_errors = [ArtefactCorrupt("the file is not what was published")]
    found = stage.ask(stream=True)
    assert found.status_code == 200 and "sha-triage-1: " in found.text and "[DONE]" in found.text
    assert found.headers["x-foreword-version"] == "triage@1"
    assert found.headers["x-foreword-route"] == "stable" and found.headers["x-foreword-canary"] == "failed"
    assert "the canary triage@2 failed; the stable version answers" in caplog.text
    assert stage.metric('foreword_canary_requests_total{route="failed",task="triage"}') == 1
    assert stage.ask().headers["x-foreword-route"] == "canary"


def test_a_canary_that_loads_for_too_long_is_not_waited_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage.ask().status_code == 200
    monkeypatch.setattr(steering.lease, "__kwdefaults__", {"load_s": 0.05})
    stage.backend.load_s = 1.5
    stage.route(whole(CANARY))
    started = time.monotonic()
    assert stage.ask().headers["x-foreword-canary"] == "failed"
    assert time.monotonic() - started < 1.4
    wait_for(lambda: "sha-triage-2" in stage.backend.loaded)
    assert stage.ask().headers["x-foreword-route"] == "canary"


def test_errors_of_a_canary_that_answers_are_the_requests(stage: Stage) -> None:
    """A retry with the stable version could repeat what a stream has sent already, and would hide a bad candidate."""
    stage.route(whole(CANARY))
    stage.backend.fail_after = 1
    found = stage.ask()
    assert found.status_code == 500 and found.headers["x-foreword-version"] == "triage@2"


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_shadow_answers_behind_the_answer_and_is_never_seen(stage: Stage, is_streamed: bool) -> None:
    stage.route(SHADOW)
    found = stage.ask(stream=is_streamed, temperature=0, seed=5)
    assert "sha-triage-1: " in found.text and "sha-triage-3" not in found.text
    wait_for(lambda: stage.access.pairs)
    (pair,) = stage.access.pairs
    assert (pair.task, pair.number, pair.candidate, pair.input) == ("triage", 1, 3, "x")
    assert pair.answer == "sha-triage-1: one two three" and pair.candidate_answer == "sha-triage-3: one two three"
    assert pair.request_id == found.headers["x-request-id"] and not pair.agrees
    asked, copied = stage.backend.requests
    assert (copied.seed, copied.temperature, copied.prefix) == (5, 0, "sha-triage-3") and asked.prompt == copied.prompt
    wait_for(lambda: stage.metric('foreword_shadow_requests_total{outcome="differed",task="triage",version="3"}') == 1)
    assert stage.metric("foreword_completion_tokens_total") == 4
    assert stage.metric('foreword_requests_total{code="200"') == 1


def test_what_is_not_copied(stage: Stage) -> None:
    stage.route(SHADOW)
    stage.backend.fail_after = 2
    assert stage.ask().status_code == 500
    stage.backend.fail_after = None
    assert stage.ask(n=2).status_code == 200
    assert stage.ask(prompt=["a", "b"]).status_code == 200
    assert stage.ask("triage@1").status_code == 200
    assert stage.ask("triage@3").status_code == 200
    stage.route(dataclasses.replace(SHADOW, fraction=1e-12))
    assert stage.ask().status_code == 200
    stage.route(whole(SHADOW))
    stage.ask(prompt="this one")
    wait_for(lambda: stage.access.pairs)
    assert [pair.input for pair in stage.access.pairs] == ["this one"]


def test_a_shadow_delays_no_answer(stage: Stage) -> None:
    stage.ask()
    stage.route(SHADOW)
    stage.backend.load_s = 1.5  # the candidate's
    started = time.monotonic()
    for _ in range(3):
        assert stage.ask().status_code == 200
    assert time.monotonic() - started < 1.4
    wait_for(lambda: len(stage.access.pairs) == 3)


def test_promotion_rollback_and_unloading_lose_no_request() -> None:
    """Streams run all the time; versions change twenty times, and what is idle for a moment is unloaded."""
    with staged(idle_s=0.004) as stage:
        for number in (1, 2):
            stage.backend.answers[f"sha-triage-{number}"] = (f"<{number}>",) * 6
        stage.backend.delay_s = stage.backend.load_s = 0.002
        seen: list[tuple[str, str, str]] = []
        is_over = threading.Event()

        def ask() -> None:
            with stage.running.client() as client:
                while not is_over.is_set():
                    body = {"model": "triage", "prompt": "x", "stream": True}
                    with client.stream("POST", "/v1/completions", json=body) as answer:
                        lines = [line for line in answer.iter_lines() if line]
                    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
                    text = "".join(choice["text"] for event in events for choice in event.get("choices", ()))
                    seen.append((answer.headers["x-foreword-version"], text, lines[-1]))

        askers = [threading.Thread(target=ask) for _ in range(4)]
        for asker in askers:
            asker.start()
        for turn in range(20):
            number = 1 + turn % 2
            stage.registry.moved["triage@prod"] = number
            stage.access.change()  # as the registry does at each move
            wait_for(lambda wanted=f"triage@{number}": seen and seen[-1][0] == wanted)
            wait_for(lambda other=f"sha-triage-{3 - number}": other not in stage.backend.loaded)
        is_over.set()
        for asker in askers:
            asker.join()
        assert {last for _, _, last in seen} == {"data: [DONE]"}
        assert {(which, text) for which, text, _ in seen} == {("triage@1", "<1>" * 6), ("triage@2", "<2>" * 6)}
        assert min(stage.backend.log.count(f"unload sha-triage-{number}") for number in (1, 2)) >= 9
        assert stage.metric("foreword_errors_total") == 0
        assert stage.metric('foreword_requests_total{code="200"') == len(seen)


def test_the_registrys_own_routes(tmp_path: Path) -> None:
    """Canary and shadow of a real registry: set, raised, cleared; pairs of answers are there to read."""
    artefact = Factory(tmp_path)
    with Registry.open(tmp_path / "home") as registry:
        one, two = registry.publish(artefact(), alias="prod"), registry.publish(artefact())
        backend = FakeBackend(fingerprint=BASE)
        app = create_app(backend, registry, base_name="base", control=Control(registry.access, poll_s=0.005))
        with served(app, backend) as running, running.client() as client:

            def ask(model: str = "triage") -> httpx.Response:
                return client.post("/v1/completions", json={"model": model, "prompt": "x"})

            def route(found: httpx.Response) -> tuple[str | None, str]:
                return found.headers.get("x-foreword-route"), found.headers["x-foreword-digest"]

            assert route(ask()) == (None, one.sha256)
            registry.access.set_route("triage", "canary", "triage@2", 1.0)
            wait_for(lambda: route(ask()) == ("canary", two.sha256))
            assert route(ask(f"sha256:{one.sha256}")) == (None, one.sha256)
            registry.promote("triage@2", force=True)
            registry.access.clear_route("triage", "canary")
            wait_for(lambda: route(ask()) == (None, two.sha256))
            registry.access.set_route("triage", "shadow", "triage@1", 1.0, keep_inputs=True)
            wait_for(lambda: ask().status_code == 200 and registry.access.shadow_pairs("triage"))
            pair = registry.access.shadow_pairs("triage")[0]
            assert (pair.number, pair.candidate, pair.input, pair.agrees) == (2, 1, "x", False)
            assert pair.answer.startswith(two.sha256) and pair.candidate_answer.startswith(one.sha256)
