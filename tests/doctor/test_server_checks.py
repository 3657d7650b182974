"""Parts of the server's checks by themselves; other people's servers; pairs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreword.core.artefact import load_artefact
from foreword.core.compile import compile
from foreword.doctor.finding import Finding
from foreword.doctor.pair import against
from foreword.doctor.server.client import NoLogprobs, Refused, ServerUnderTest
from foreword.doctor.server.examine import Circumstances, bisect_servers, examine_servers
from foreword.doctor.server.identity import check_unknown_name, fault_of_refusal
from foreword.doctor.server.latency import check_latency, judge_times
from foreword.doctor.server.limits import _limit_in
from foreword.doctor.server.shape import setting_between
from foreword.doctor.server.visit import Expected, Visit, distance
from foreword.engine.engine import Engine
from foreword.errors import BackendFailed
from foreword.registry.store import Registry
from foreword.serve.engines.embedded import EmbeddedBackend
from foreword.serve.gateway import create_app
from tests.doctor.lab.server.plants import NoVectors
from tests.doctor.lab.server.stage import base_of, home_of, running
from tests.serve.artefacts import write_artefact
from tests.serve.fakes import served

Logprobs = dict[int, float]


def spread(values: list[float], first: int = 0) -> Logprobs:
    total = math.log(sum(map(math.exp, values)) + 0.1)
    return {first + place: value - total for place, value in enumerate(values)}


DECLINE = [-0.3 * place for place in range(20)]


def test_lists_that_share_no_token_are_far_apart() -> None:
    flat = [0.0] * 20
    assert distance(spread(DECLINE), spread(DECLINE, first=100)) > 0.1
    assert distance(spread(DECLINE), spread(DECLINE)) == 0
    swapped = spread(DECLINE)
    last = swapped.pop(19)
    assert distance(spread(DECLINE), swapped | {77: last}) < 1e-6, "a tie at the last place is no difference"
    assert distance(spread(flat), spread(flat, first=100)) < 1e-6, "nothing says that flat lists differ"


@pytest.mark.parametrize(
    ("seen", "change", "setting"),
    [
        ({3, 5}, {3: -1.0}, "a penalty on tokens that were there before"),
        (set(), {4: 2.0}, "a bias on some tokens"),
        ({3}, {}, ""),
    ],
)
def test_a_setting_is_known_by_its_shape(seen: set[int], change: Logprobs, setting: str) -> None:
    stored = spread(DECLINE)
    found = {token: value + change.get(token, 0.0) - 0.05 for token, value in stored.items()}
    assert setting_between(stored, found, seen, "float32") == setting


def test_a_token_that_is_banned_is_a_bias_too() -> None:
    stored = spread(DECLINE)
    found = {token: value + 0.2 for token, value in stored.items() if token}
    assert setting_between(stored, found, (), "float32") == "a bias on some tokens"


def test_a_temperature_stretches_and_another_model_does_neither() -> None:
    stored = spread(DECLINE)
    cold = spread([value / 0.5 for value in DECLINE])
    assert setting_between(stored, cold, (), "float32") == "temperature 0.5"
    draw = random.Random(1)
    other = {token: value + draw.gauss(0, 0.5) for token, value in stored.items()}
    assert setting_between(stored, other, (), "float32") == ""


def times(middle: float, noise: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [middle + abs(draw.gauss(0, noise)) for _ in range(15)]


def judged(task: float, *, noise: float = 2e-4, longer: float = 0.020) -> Finding:
    return judge_times("x", times(0.010, noise, 1), times(task, noise, 2), times(longer, noise, 3), 64)


def test_latency_is_judged_by_its_interval() -> None:
    assert judged(0.0105).ok and not judged(0.0105).skipped
    again = judged(0.0201)
    assert not again.ok and again.fault == "" and again.numbers["ratio_low"] > 0.7
    kept = judged(0.060)
    assert not kept.ok and kept.fault == "outputs-kept"


def test_noise_never_makes_a_finding_of_latency() -> None:
    assert judged(0.0105, longer=0.0104).skipped, "what P positions cost cannot be seen"
    for seed in range(40):
        draw = random.Random(seed)
        base, task, longer = ([0.01 * math.exp(draw.gauss(0, 0.7)) for _ in range(15)] for _ in range(3))
        assert judge_times("x", base, task, longer, 64).ok


@pytest.mark.parametrize(
    ("message", "limit"),
    [
        ("prefix 7 + prompt 12 + max_tokens 2030 = 2049 positions, the base takes 512. Send less", 512),
        ("This model's maximum context length is 1024 tokens. However, you requested 2049 tokens", 1024),
        ("the base takes 2048", None),
        ("no", None),
    ],
)
def test_a_lower_limit_is_read_from_a_refusal(message: str, limit: int | None) -> None:
    assert _limit_in(message, below=2048, above=19) == limit


def test_a_refusal_names_its_fault_by_the_field_that_differs() -> None:
    def refused(message: str) -> str:
        return fault_of_refusal(Refused(message, answered=409))

    assert refused("was trained for another base: weights_sha256 1 there, 2 here") == "other-base"
    assert refused("tokenizer_sha256 1 there, 2 here") == "tokenizer-changed"
    assert refused("quantisation none there, awq here") == "numerics" and refused("no task") == ""


def scripted(answer: Any) -> ServerUnderTest:
    """Return a server whose answers come from a function: request -> (status, document)."""

    def handle(request: httpx.Request) -> httpx.Response:
        status, document = answer(request)
        return httpx.Response(status, json=document)

    server = ServerUnderTest("http://scripted")
    server._client = httpx.Client(base_url="http://scripted", transport=httpx.MockTransport(handle))
    return server


def test_an_unknown_name_that_is_answered_is_a_finding() -> None:
    choice = {"index": 0, "text": "hm", "logprobs": {"tokens": ["token_id:1"], "top_logprobs": [{"token_id:1": -1.0}]}}
    found = check_unknown_name(scripted(lambda request: (200, {"choices": [choice]})), "alpha")
    assert not found.ok and "answered like alpha" in found.measured
    assert check_unknown_name(scripted(lambda request: (404, {"error": {"message": "no"}})), "alpha").ok
    assert not check_unknown_name(scripted(lambda request: (500, {"error": {"message": "no"}})), "alpha").ok


def test_a_server_without_log_probabilities_says_what_was_needed() -> None:
    with pytest.raises(NoLogprobs, match="no log-probabilities"):
        scripted(lambda request: (200, {"choices": [{"index": 0, "text": "hm"}]})).complete("m", [1])
    with pytest.raises(BackendFailed, match="no JSON"):
        server = scripted(lambda request: (200, {}))
        server._client = httpx.Client(
            base_url="http://x", transport=httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
        )
        server.models()


def test_a_busy_server_is_asked_again() -> None:
    left = [429, 503]

    def answer(request: httpx.Request) -> httpx.Response:
        if left:
            return httpx.Response(left.pop(), headers={"retry-after": "0.01"}, json={"error": {"message": "busy"}})
        return httpx.Response(200, json={"data": [{"id": "m"}]})

    server = ServerUnderTest("http://x")
    server._client = httpx.Client(base_url="http://x", transport=httpx.MockTransport(answer))
    assert server.models() == [{"id": "m"}] and not left


@contextmanager
def stranger(url: str, *, has_logprobs: bool) -> Iterator[ServerUnderTest]:
    """Yield a client that sees a server as one that is not foreword's: no headers, no parents, perhaps no logprobs."""
    inner = httpx.Client(base_url=url, timeout=30)

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        answer = inner.request(request.method, request.url.raw_path.decode(), json=body)
        document = answer.json() if "json" in answer.headers["content-type"] else None
        if document is None:
            return httpx.Response(
                answer.status_code, content=answer.content, headers={"content-type": "text/event-stream"}
            )
        for card in document.get("data", ()):
            card.pop("root", None), card.pop("parent", None)
        for choice in document.get("choices", ()):
            if not has_logprobs:
                choice["logprobs"] = None
        return httpx.Response(answer.status_code, json=document)

    server = ServerUnderTest(url)
    server._client = httpx.Client(base_url=url, transport=httpx.MockTransport(handle))
    with inner:
        yield server


class ComputedAgain(EmbeddedBackend):
    """Computes the block of vectors with every request."""

    def _load(self, sha256: str, path: Path) -> int:
        self.artefact = load_artefact(path)
        return super()._load(sha256, path)

    async def submit(self, requests: Any, *caller: Any) -> Any:
        for request in requests:
            if request.prefix is not None:
                compile(self._compiler, self.artefact)
        return await super().submit(requests, *caller)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [EmbeddedBackend, ComputedAgain])
def test_a_prefix_that_is_computed_in_every_request_shows_in_time(
    backend: type[EmbeddedBackend], tmp_path: Path
) -> None:
    base = base_of("qwen3")
    engine = Engine(base, kv_memory="96MiB")
    engine.start()
    made = backend(engine)
    with Registry.open(tmp_path / "home") as registry:
        version = registry.publish(write_artefact(tmp_path, "long", "prompt", base=base, num_vectors=400))
        should = Expected(reference="long@1", sha256=version.sha256, header=registry.header(version))
        app = create_app(made, registry, base_name="plain")
        with served(app, made) as running_server, ServerUnderTest(running_server.url) as client:
            visit = Visit(server=client, model="long", version=should, base_name="plain", dtype="float32")
            found = check_latency(visit)
    assert found.ok == (backend is EmbeddedBackend), found
    if not found.ok:
        assert found.numbers["positions"] == should.num_positions and "computing" in found.expected


@pytest.mark.slow
@pytest.mark.parametrize("has_logprobs", [True, False])
def test_other_peoples_servers_are_examined_as_far_as_they_tell(has_logprobs: bool, tmp_path: Any) -> None:
    with running("llama") as server, stranger(server.url, has_logprobs=has_logprobs) as client:
        with Registry.open(tmp_path / "empty") as registry:
            found = examine_servers([client], registry, ["alpha"], Circumstances(with_latency=False, dtype="float32"))
    assert [finding for finding in found if not finding.ok] == []
    skipped = {finding.check: finding.measured for finding in found if finding.skipped}
    assert "registry" in skipped["alpha version"] and "registry" in skipped["alpha conformance"]
    made = {finding.check for finding in found if not finding.skipped}
    if has_logprobs:
        assert {"alpha repeats", "alpha isolation", "alpha turns", "alpha batch", "alpha decoding"} <= made
    else:
        assert "log-probabilities by token id" in skipped["alpha batch"]


@pytest.mark.slow
def test_bisection_stops_at_what_differs_from_the_good_server() -> None:
    with running("llama") as good, running("llama", backend=NoVectors) as bad:
        with ServerUnderTest(bad.url) as new, ServerUnderTest(good.url) as old, Registry.open(home_of("llama")) as home:
            known = Circumstances(with_latency=False)
            diagnosis = bisect_servers(new, old, home, ["alpha"], known)
            same = bisect_servers(new, new, home, ["alpha"], known)
    assert diagnosis.first is not None and diagnosis.first.fault == "mask-blind"
    assert "cleared" in diagnosis.to_json()["findings"][-1]["measured"] or not diagnosis.ok
    assert same.ok, "what the good server shows too is not what changed"


def test_what_the_good_one_shows_too_is_not_what_changed() -> None:
    def finding(fault: str) -> Finding:
        return Finding(check="base", ok=not fault, measured="measured", fault=fault)

    told = against(finding("other-base"), finding("other-base"))
    assert told.ok and "not what changed" in told.measured
    assert against(finding("other-base"), finding("numerics")) == finding("other-base"), "another fault is a change"
    assert against(finding("other-base"), finding("")) == finding("other-base")
    assert against(finding("other-base"), None) == finding("other-base")
