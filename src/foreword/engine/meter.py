"""What an engine counts. Imports no torch."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from foreword.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine at one moment, and totals since it was made. Rows are completions."""

    running: int
    waiting: int
    blocks_total: int
    """Blocks of the pool."""
    blocks_free: int
    prefix_blocks: int
    """Blocks that resident prefixes own."""
    prefixes_resident: int
    """Prefixes whose keys and values are in the pool."""
    prefixes_known: int
    """Prefixes that requests can name."""
    steps: int
    failed_steps: int
    prompt_tokens: int
    """Tokens of admitted requests' own text; prefixes are not counted."""
    tokens_generated: int
    rows_finished: int
    """Rows that ended by themselves (stop or length)."""
    rows_aborted: int
    rows_failed: int


class Meter:
    """Counts steps, rows and tokens. The loop writes, anyone reads."""

    def __init__(self) -> None:
        self.steps = 0
        self.failed_steps = 0
        self.failed_in_a_row = 0
        self.prompt_tokens = 0
        self.tokens_generated = 0
        self._ends = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self._recent: deque[float] = deque(maxlen=64)

    def step(self, failures: int) -> None:
        """Count a step."""
        self.steps += 1
        self.failed_steps += bool(failures)
        self.failed_in_a_row = self.failed_in_a_row + 1 if failures else 0

    def row_in(self, row: Sequence) -> None:
        """Count a row that starts, and note when; siblings have one prompt between them."""
        row.admitted = time.monotonic()
        if row.index == 0:
            self.prompt_tokens += row.num_prompt

    def row_out(self, row: Sequence) -> None:
        """Count a row that has ended."""
        self._ends[row.finish_reason or "error"] += 1
        self._recent.append(time.monotonic())

    def seconds_for(self, num_rows: int) -> float:
        """Return how long `num_rows` took of late, between 1 and 60 seconds."""
        if len(self._recent) < 2:
            return 1.0
        pace = (self._recent[-1] - self._recent[0]) / (len(self._recent) - 1)
        return min(60.0, max(1.0, round(pace * num_rows, 1)))

    def stats(
        self,
        *,
        running: int,
        waiting: int,
        blocks_total: int,
        blocks_free: int,
        prefix_blocks: int,
        prefixes_resident: int,
        prefixes_known: int,
    ) -> EngineStats:
        """Return the totals together with the engine's present state."""
        return EngineStats(
            running=running,
            waiting=waiting,
            blocks_total=blocks_total,
            blocks_free=blocks_free,
            prefix_blocks=prefix_blocks,
            prefixes_resident=prefixes_resident,
            prefixes_known=prefixes_known,
            steps=self.steps,
            failed_steps=self.failed_steps,
            prompt_tokens=self.prompt_tokens,
            tokens_generated=self.tokens_generated,
            rows_finished=self._ends["stop"] + self._ends["length"],
            rows_aborted=self._ends["abort"],
            rows_failed=self._ends["error"],
        )
