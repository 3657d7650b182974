"""Every error that foreword shows to a user.

ForewordError                     .hint (what to do), .status (HTTP), .exit_code (shell)
├── ConfigError          400 / 2  a file, key or value of the configuration
├── ArtefactError        422 / 3
│   ├── ArtefactCorrupt           hash, header, shape, dtype, NaN or Inf
│   └── IncompatibleModel 409 / 3 both values of the first field that differs, or the layer that cannot hold a prefix
├── DataError            422 / 4  file, row number, field
├── TrainingDiverged     500 / 5  step, loss, learning rate, last good state
├── RegistryError        500 / 6
│   ├── NotFound         404 / 6  with the nearest names
│   └── Conflict         409 / 6  version exists, alias moved meanwhile, version in use
└── ServeError           500 / 7
    ├── BadRequest       400 / 7  both numbers
    ├── Unauthorized     401 / 7  one text for every fault of a key
    ├── Forbidden        403 / 7  what the key may not do
    ├── RateLimited      429 / 7  both numbers, the limit's name, .retry_after_s
    ├── Overloaded       503 / 7  .retry_after_s
    ├── Unavailable      503 / 7  what an answer rests on cannot be asked now; .retry_after_s
    └── BackendFailed    502 / 7
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ForewordError(Exception):
    """Base of all errors meant for a user: what happened, with both values, and `hint`, the cure."""

    status = 500
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ConfigError(ForewordError):
    """A configuration file, key or value is wrong."""

    status, exit_code = 400, 2


class ArtefactError(ForewordError):
    """An artefact cannot be used."""

    status, exit_code = 422, 3


class ArtefactCorrupt(ArtefactError):
    """The file is not a well-formed artefact: hash, header, shape, dtype, NaN or Inf."""


class IncompatibleModel(ArtefactError):
    """The base, its tokenizer or its template is not the one the vectors were trained for, or cannot hold a prefix."""

    status = 409


class DataError(ForewordError):
    """A data file is missing, empty or malformed; the message names file, row and field."""

    status, exit_code = 422, 4


class TrainingDiverged(ForewordError):
    """The loss became NaN or Inf; the last good state is kept and named."""

    exit_code = 5


class RegistryError(ForewordError):
    """The registry refused or failed."""

    exit_code = 6


class NotFound(RegistryError):
    """No such task, version or alias; the hint names the nearest."""

    status = 404


class Conflict(RegistryError):
    """The version exists, an alias moved meanwhile, or something still points at it."""

    status = 409


class ServeError(ForewordError):
    """Serving failed."""

    exit_code = 7


class BadRequest(ServeError):
    """The request cannot be served as it stands."""

    status = 400


class Unauthorized(ServeError):
    """No key, or none that is good; which of the two, and why, is not told."""

    status = 401

    def __init__(self, reason: str) -> None:
        hint = "Send `Authorization: Bearer <key>` with a key that is neither expired nor revoked."
        super().__init__("a valid API key is needed", hint=hint)
        self.reason = reason
        """For the operator's counters, never for the client: missing, unknown, wrong, expired, revoked, disabled."""


class Forbidden(ServeError):
    """The key is good, but not for this."""

    status = 403


class RateLimited(ServeError):
    """A tenant's limit is reached; try again after `retry_after_s` seconds."""

    status = 429

    def __init__(self, message: str, *, limit: str, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.limit = limit
        """Its name in `Limits`."""
        self.retry_after_s = retry_after_s


class Overloaded(ServeError):
    """The queue is full; try again after `retry_after_s` seconds."""

    status = 503

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class Unavailable(ServeError):
    """What an answer rests on (keys, names) cannot be asked now; try again after `retry_after_s` seconds."""

    status = 503

    def __init__(self, message: str, *, hint: str = "Try again.", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class BackendFailed(ServeError):
    """The engine behind the server failed."""

    status = 502


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of `known` that look most like `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint sentence with the nearest names, or with all known ones when none is near."""
    known = sorted(known)
    near = nearest(name, known)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Known: {', '.join(known[:20])}." if known else ""
