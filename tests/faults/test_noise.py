"""Fault 13: random bytes at every endpoint. The gateway answers what it documents, never with a fault of its own.

The artefact and the compiled file are fuzzed in `test_loaders.py`.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.core.control import SkipTest
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.faults.client import connect, read_all, request_bytes, together
from tests.faults.stage import Gateway, Stage, bearer, staged, wait_until

pytestmark = pytest.mark.slow
EXAMPLES = 20
"""Requests for each operation and key."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


class Room:
    """A gateway with one engine; a tenant may call and manage `triage`."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        stage.publish("triage")
        self.engine = stage.engine(interval_s=0.0)
        self.gateway: Gateway = stage.gateway(self.engine)
        self.key = stage.tenant("acme", "triage")
        stage.registry.access.grant("acme", "triage", "manage")
        stage.tenant("guest", "triage")  # one that may come to harm
        wait_until(self.answers)
        self.num_read = 0  # of the log

    def answers(self) -> bool:
        return together(self.gateway, self.key, lambda asker: asker.ask()).status == 200

    def check_unhurt(self) -> None:
        """Check that it lives, answers, and has logged no fault of its own."""
        assert self.gateway.popen.poll() is None and self.answers()
        errors = self.gateway.errors()[self.num_read :]
        self.num_read += len(errors)
        assert "Traceback" not in errors and "unexpected" not in errors, errors[-3000:]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    with staged(tmp_path_factory.mktemp("noise")) as stage:
        yield Room(stage)


def document(gateway: Gateway, mode: GenerationMode) -> Any:
    generation = GenerationConfig(modes=[mode], deterministic=True, max_examples=EXAMPLES)
    config = SchemathesisConfig(projects=ProjectsConfig(default=ProjectConfig(generation=generation)))
    return schemathesis.openapi.from_url(f"{gateway.url}/openapi.json", config=config)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfitting"])
@pytest.mark.parametrize("who", ["admin", "tenant", "nobody"])
def test_every_endpoint_keeps_to_its_document(room: Room, who: str, mode: GenerationMode) -> None:
    """Proves that bodies, queries and paths are checked before anything is done with them; what does not fit the
    document is refused, and each answer is one that the document names."""
    headers = bearer({"admin": room.stage.admin, "tenant": room.key, "nobody": ""}[who])
    statuses: dict[str, set[int]] = {}
    for found in document(room.gateway, mode).get_all_operations():
        _try_out(found.ok(), mode, headers, statuses)
    assert len(statuses) >= (25 if mode is GenerationMode.POSITIVE else 15), statuses
    if who == "admin" and mode is GenerationMode.POSITIVE:
        assert statuses["POST /v1/completions"] >= {200, 400, 404} <= statuses["POST /v1/chat/completions"]
        assert {label for label, found in statuses.items() if label.startswith("GET") and 200 not in found} == set()
    room.check_unhurt()


def _name_what_there_is(case: Any) -> None:
    """Put a task, a tenant and an alias that exist where a made-up name stands: then the rest of a request counts."""
    known = {"task": "triage", "name": "triage", "tenant": "guest", "alias": "prod", "kind": "canary", "right": "call"}
    case.path_parameters |= {name: known[name] for name in known.keys() & case.path_parameters.keys()}
    if isinstance(case.body, dict) and "model" in case.body:
        case.body |= {"model": "triage", "max_tokens": 3, "n": 2}
    elif isinstance(case.body, dict) and "version" in case.body:
        case.body |= {"version": 1}


def _make_plain(case: Any) -> None:
    """Leave out what may be left out, so that an answer to what is right is sure to be among those of an operation."""
    case.query = {}
    if case.operation.label == "POST /v1/completions":
        case.body = {"model": "triage", "prompt": "x", "max_tokens": 3}
    elif case.operation.label == "POST /v1/chat/completions":
        case.body = {"model": "triage", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}


def _checks(case: Any, response: Any) -> list[Any]:
    """Return what holds for an answer. A key that does not fit is replaced, and in a query everything is text, so that
    only a body that does not fit must be refused; events are not JSON."""
    is_stream = response.headers["content-type"][0].startswith("text/event-stream")
    found = [check for check in CHECKS if not (is_stream and check is response_schema_conformance)]
    body = case.meta.components.get(ParameterLocation.BODY)
    return [*found, negative_data_rejection] if body is not None and body.mode is GenerationMode.NEGATIVE else found


def _try_out(operation: Any, mode: GenerationMode, headers: dict[str, str], statuses: dict[str, set[int]]) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), kind=st.sampled_from(["made up", "named", "plain"]))
    def send(case: Any, kind: str) -> None:
        if kind != "made up" and mode is GenerationMode.POSITIVE:
            _name_what_there_is(case)
            if kind == "plain":
                _make_plain(case)
        response = case.call(headers=headers, timeout=20)
        case.validate_response(response, checks=_checks(case, response))
        statuses.setdefault(operation.label, set()).add(response.status_code)

    with suppress(SkipTest):  # an operation that takes nothing: nothing can be unfitting
        send()


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer KEY\r\n"


def pieces(source: random.Random, key: str) -> bytes:
    """Return bytes that look more or less like a request."""
    good = request_bytes(key, {"model": "triage", "prompt": "x", "max_tokens": 2})
    kind = source.randrange(5)
    if kind == 0:
        return source.randbytes(source.randint(1, 4000))
    if kind == 1:  # a good one with bytes changed, lost and doubled
        data = bytearray(good)
        for _ in range(source.randint(1, 8)):
            place = source.randrange(len(data))
            data[place : place + source.randint(0, 3)] = source.randbytes(source.randint(0, 3))
        return bytes(data)
    if kind == 2:  # a good head, a body of noise
        noise = source.randbytes(source.randint(1, 500))
        return HEAD.replace(b"KEY", key.encode()) + b"content-length: %d\r\n\r\n" % len(noise) + noise
    if kind == 3:  # chunks of noise
        head = HEAD.replace(b"KEY", key.encode()) + b"transfer-encoding: chunked\r\n\r\n"
        return head + b"".join(
            b"%x\r\n%b\r\n" % (source.randint(0, 30), source.randbytes(source.randint(0, 30))) for _ in range(5)
        )
    return good * source.randint(1, 3) + source.randbytes(20)  # several in one go, and noise behind


def test_noise_on_the_socket(room: Room) -> None:
    """Proves that what is no HTTP is refused, and that neither it nor what follows it is ever taken for a request."""
    source = random.Random(13)
    for _ in range(300):
        with connect(room.gateway) as made:
            made.sendall(pieces(source, room.key))
            made.shutdown(socket.SHUT_WR)
            answer = read_all(made)
        assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:80]
        assert b" 500 " not in answer.split(b"\r\n")[0]
    room.check_unhurt()


SMUGGLED = [
    b"content-length: 5\r\ncontent-length: 50\r\n",
    b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
    b"transfer-encoding: chunked, identity\r\n",
    b"transfer-encoding: xchunked\r\n",
    b"content-length: +5\r\n",
    b"content-length: -1\r\n",
    b"content-length: 99999999999999999999999\r\n",
    b"content-length : 5\r\n",
    b"content-length: 5\r\n folded: 7\r\n",
]


@pytest.mark.parametrize("framing", SMUGGLED)
def test_two_ways_to_read_where_a_request_ends(room: Room, framing: bytes) -> None:
    """Proves that a body whose end can be read in two ways is refused, so that no second request hides in it."""
    hidden = request_bytes(room.key, {"model": "triage", "prompt": "hidden", "max_tokens": 1})
    before = len(room.engine.seen)
    with connect(room.gateway) as made:
        made.sendall(HEAD.replace(b"KEY", room.key.encode()) + framing + b"\r\n0\r\n\r\n" + hidden)
        made.shutdown(socket.SHUT_WR)
        answer = read_all(made)
    assert answer.count(b"HTTP/1.1 ") <= 1 and not answer.startswith(b"HTTP/1.1 200")
    assert len(room.engine.seen) == before
    room.check_unhurt()
