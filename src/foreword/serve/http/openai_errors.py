"""Errors in OpenAI's shape, with their headers and names. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

from foreword.errors import BadRequest, ForewordError, NotFound, Overloaded, RateLimited, Unauthorized, Unavailable


class InvalidBody(BadRequest):
    """The request's body is wrong; `param` is the path of the field, `status` 400, or 413 where it is too large."""

    def __init__(self, message: str, *, hint: str = "", param: str | None = None, status: int = 400) -> None:
        super().__init__(message, hint=hint)
        self.param = param
        self.status = status


class InvalidPath(InvalidBody):
    """Nothing is at this path, or not for this method."""


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_json(error: ForewordError, *, is_about_model: bool = True) -> dict[str, Any]:
    """Return an error in OpenAI's shape; the message holds the cure too.

    `is_about_model` says what was not found where something was not.
    """
    kind = _KINDS.get(error.status) or ("invalid_request_error" if error.status < 500 else "server_error")
    code, param = error_kind(error), getattr(error, "param", None)
    if isinstance(error, NotFound) and is_about_model:
        code, param = "model_not_found", "model"
    message = f"{error.message}. {error.hint}" if error.hint else error.message
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_headers(error: ForewordError) -> dict[str, str]:
    """Return the headers that an error's answer needs."""
    if isinstance(error, Unauthorized):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, Overloaded | Unavailable | RateLimited):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    return {}


def error_kind(error: BaseException) -> str:
    """Return an error's class as metrics, logs and OpenAI's `code` name it: backend_failed; else internal_error."""
    return "internal_error" if type(error) is ForewordError else snake(type(error).__name__)


def snake(name: str) -> str:
    """Return the name of a class in snake case."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).removeprefix("_")
