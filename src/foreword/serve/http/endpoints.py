"""The gateway's endpoints besides the admin API. Imports no torch."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import choose_encoder

from foreword.errors import ForewordError
from foreword.serve.http.openai_api import Body, ChatBody, CompletionBody
from foreword.serve.http.openapi import ANSWER_CODES, COMPLETION, LIST, documented
from foreword.serve.versions.names import Target

if TYPE_CHECKING:
    from foreword.serve.gateway import Gateway


def add_endpoints(app: FastAPI, gateway: Gateway) -> None:
    """Add OpenAI's endpoints, and those for whoever watches the server."""
    _add_answers(app, gateway)
    _add_models(app, gateway)
    _add_states(app, gateway)


def _add_answers(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/completions", **_answers("Continue a prompt", CompletionBody))
    async def completions(request: Request) -> Response:
        return await gateway.answer(request, CompletionBody)

    @app.post("/v1/chat/completions", **_answers("Answer a conversation", ChatBody))
    async def chat_completions(request: Request) -> Response:
        return await gateway.answer(request, ChatBody)


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    started = int(time.time())

    def card(target: Target) -> dict[str, Any]:
        version = target.version
        created = int(version.created.timestamp()) if version else started
        data = {"id": target.name, "object": "model", "created": created, "owned_by": "foreword"}
        return data | ({"root": version.reference, "parent": gateway.names.base_name} if version else {})

    @app.get("/v1/models", **documented("List what may be called", answer=LIST, codes=(401, 500, 503)))
    async def models(request: Request) -> dict[str, Any]:
        principal = gateway.guard.principal(request.headers.get("authorization"))
        targets = await gateway.names.listed(gateway.backend.fingerprint)
        may = [target for target in targets if gateway.guard.may(principal, "call", target.labels[0])]
        return {"object": "list", "data": [card(target) for target in may]}

    @app.get("/v1/models/{name:path}", **documented("Show a model", codes=(401, 404, 409, 500, 503)))
    async def model(request: Request) -> dict[str, Any]:
        principal = gateway.guard.principal(request.headers.get("authorization"))
        return card(await gateway.resolve(principal, str(request.path_params["name"])))


def _add_states(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health", **documented("Whether the process lives", codes=(), is_open=True))
    async def health() -> dict[str, Any]:
        """Say that the process lives; whether it can answer is /ready's matter."""
        found: dict[str, Any] = {"status": "ok", "running": None, "waiting": None}
        with contextlib.suppress(ForewordError):
            stats = gateway.backend.stats()
            found |= {"running": stats.num_running, "waiting": stats.num_waiting}
        return found | {"open_requests": len(gateway.calls), "resident_versions": gateway.residents.num_resident}

    @app.get("/ready", **_ready())
    async def ready() -> Response:
        reasons = gateway.not_ready()
        status = "not ready" if reasons else "ready"
        return JSONResponse({"status": status, "reasons": reasons}, 503 if reasons else 200)

    @app.get("/metrics", **_metrics())
    async def metrics(request: Request) -> Response:
        gateway.guard.admin(request.headers.get("authorization"))
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(gateway.metrics.registry), media_type=content_type)


def _answers(summary: str, body: type[Body]) -> dict[str, Any]:
    return documented(summary, body=body, answer=COMPLETION, codes=ANSWER_CODES, streams=True)


def _ready() -> dict[str, Any]:
    found = documented("Whether requests are wanted here", codes=(503,), is_open=True)
    found["responses"][503]["content"] = found["responses"][200]["content"]
    return found


def _metrics() -> dict[str, Any]:
    found = documented("Numbers for Prometheus", codes=(401, 403, 500, 503))
    text = {"schema": {"type": "string"}}
    found["responses"][200]["content"] = {"text/plain": text, "application/openmetrics-text": text}
    return found
