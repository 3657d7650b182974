"""A PostgreSQL connection whose every wait has an end; imports psycopg, so only where PostgreSQL is used.

The server's own statement_timeout is of no use when the server hangs, nor are TCP's when its machine still answers.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

ANSWER_TIMEOUT_S = 12.0
"""The longest silence of the server: above its statement_timeout, which gives the better error."""

Result = TypeVar("Result")


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed, with OperationalError, when the server is silent for too long."""

    patience_s = ANSWER_TIMEOUT_S

    def wait(self, gen: PQGen[Result], *args: Any, **options: Any) -> Result:
        """Run an operation to its end, as psycopg does, or until the patience ends."""
        return super().wait(self._bounded(gen), *args, **options)

    def _bounded(self, gen: PQGen[Result]) -> PQGen[Result]:
        deadline = time.monotonic() + self.patience_s
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if ready:
                    deadline = time.monotonic() + self.patience_s
                elif time.monotonic() > deadline:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"the server did not answer within {self.patience_s:.0f} s")
                wanted = gen.send(ready)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
