"""Structured logs: one line per record, as text or as a JSON object. Never prompts, answers, bodies or keys.

What a client says (a model's name, a request id) is written with its control characters escaped, so that no value can
begin a line of its own. Of exceptions the class and the places are written, never the message, which may quote a value.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from foreword.errors import ConfigError

Format = Literal["text", "json"]

REQUEST_ID: ContextVar[str] = ContextVar("foreword_request_id", default="")
"""The request that is worked for; every record written meanwhile carries it."""

SAID = frozenset(("path", "task", "version", "code", "prompt_tokens", "completion_tokens", "total_s"))
"""Fields that the text style leaves out: its messages say them."""

_GIVEN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")


def request_id(given: str | None) -> str:
    """Return the id of a request: the client's own where it is plain (letters, digits, ._:/+=-), else a new one."""
    return given if given and _GIVEN_ID.fullmatch(given) else secrets.token_hex(16)


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """Return `extra` for a log call; fields that are None or empty are left out of the record."""
    return {"fields": {name: value for name, value in values.items() if value is not None and value != ""}}


def places(error: BaseException) -> str:
    """Return where an error was raised, outermost first, in one line and without any value."""
    return " > ".join(
        f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    )


def configure(style: Format = "text", level: int = logging.INFO) -> None:
    """Send foreword's records from `level` on, and others' warnings, to standard error in one style.

    Raises ConfigError on a style that there is not.
    """
    formatters: dict[str, type[TextFormatter | JsonFormatter]] = {"text": TextFormatter, "json": JsonFormatter}
    if style not in formatters:
        raise ConfigError(f"no log format {style!r}", hint=f"Known: {', '.join(formatters)}.")
    handler = logging.StreamHandler()
    handler.setFormatter(formatters[style]())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("foreword").setLevel(level)
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """A JSON object per record: time (RFC 3339, UTC), level, logger, message, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        head = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        return json.dumps(head | _fields(record), default=str, separators=(",", ":"))


class TextFormatter(logging.Formatter):
    """`time LEVEL logger: message key=value …`, control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        tail = "".join(f" {name}={_value(value)}" for name, value in _fields(record).items() if name not in SAID)
        return f"{_time(record)} {record.levelname} {record.name}: {escaped(_message(record))}{tail}"


def escaped(text: str) -> str:
    """Return a text with everything that is not printable written out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _value(value: Any) -> str:
    text = escaped(str(value))
    return json.dumps(text) if " " in text or '"' in text or "=" in text else text


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    return text.partition("\n")[0] if record.name == "asyncio" else text  # its other lines quote the exception


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if found := REQUEST_ID.get():
        given["request_id"] = found
    given |= getattr(record, "fields", {})
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        given |= {"exception": type(error).__name__, "places": places(error)}
    return given


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
