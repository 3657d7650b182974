"""The OpenAPI document: what FastAPI knows of the routes, and what it cannot know of bodies that we read ourselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import foreword

REF = "#/components/schemas/{model}"
READ_CODES = (401, 403, 404, 500, 503)
WRITE_CODES = (400, 401, 403, 404, 408, 409, 413, 500, 503)
ANSWER_CODES = (400, 401, 404, 408, 409, 413, 422, 429, 500, 502, 503)
WHY = {
    400: "The request cannot be served as it stands",
    401: "No key, or none that is good",
    403: "The key is good, but not for this",
    404: "No such thing, or none that this key may know of",
    408: "The body did not arrive in time",
    409: "Something else stands against it: a gate, a move meanwhile, another base",
    413: "The body is too large",
    422: "The task's artefact is damaged",
    429: "A limit of the tenant is reached",
    500: "The server failed",
    502: "The engine failed",
    503: "Too much work, or the registry does not answer",
}
ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
LIST: dict[str, Any] = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": {"type": "object"}}},
}
COMPLETION: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["text_completion", "chat.completion"]},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["index", "finish_reason", "logprobs"]},
        },
        "usage": {"type": "object", "required": ["prompt_tokens", "completion_tokens", "total_tokens"]},
    },
}
_models: dict[str, type[BaseModel]] = {}


def documented(
    summary: str,
    *,
    body: type[BaseModel] | None = None,
    query: type[BaseModel] | None = None,
    answer: dict[str, Any] | None = None,
    codes: Sequence[int] | None = None,
    is_open: bool = False,
    streams: bool = False,
) -> dict[str, Any]:
    """Return what a route's decorator takes so that the document is true.

    `body` is a JSON body's model, `query` that of the query string, `answer` the schema of a 200, `codes` those of its
    errors; `is_open` needs no key, `streams` may answer with server-sent events.
    """
    if codes is None:
        codes = READ_CODES if body is None and query is not None else WRITE_CODES
        codes = (400, *codes) if query is not None else codes
    extra: dict[str, Any] = {} if is_open else {"security": [{"key": []}]}
    if body is not None:
        _models[body.__name__] = body
        schema = {"$ref": REF.format(model=body.__name__)}
        needed = any(field.is_required() for field in body.model_fields.values())
        extra["requestBody"] = {"required": needed, "content": {"application/json": {"schema": schema}}}
    if query is not None:
        extra["parameters"] = _parameters(query)
    content: dict[str, Any] = {"application/json": {"schema": answer or {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[int, dict[str, Any]] = {200: {"description": "Done", "content": content}}
    error = {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}
    responses |= {code: {"description": WHY[code], "content": error} for code in sorted(codes)}
    return {"summary": summary, "responses": responses, "openapi_extra": extra}


def _parameters(query: type[BaseModel]) -> list[dict[str, Any]]:
    properties = query.model_json_schema().get("properties", {})
    return [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in properties.items()]


def document(app: FastAPI) -> dict[str, Any]:
    """Return the app's document."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    found = get_openapi(title=app.title, version=foreword.__version__, routes=app.routes)
    _, schemas = models_json_schema([(model, "validation") for model in _models.values()], ref_template=REF)
    components = found.setdefault("components", {})
    components["schemas"] = {**schemas.get("$defs", {}), "Error": ERROR}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in found["paths"].items():
        parts = re.findall(r"\{(\w+)\}", path)
        for operation in item.values():
            _complete(operation, parts)
    app.openapi_schema = found
    return found


def _complete(operation: dict[str, Any], parts: Sequence[str]) -> None:
    """Add the parts of the path."""
    known = {parameter["name"] for parameter in operation.get("parameters", ())}
    places = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in parts
        if name not in known
    ]
    operation["parameters"] = [*places, *operation.get("parameters", ())]
