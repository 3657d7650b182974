"""Answers of `generate`: rows are handed out as the queue takes them, chunks come back as outputs. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Rows

from foreword.engine.intake import Job, make_rows
from foreword.engine.request import Chunk, Completion, Output
from foreword.engine.sequence import Sequence


class Collector:
    """Keeps the requests of one `generate` call apart from everybody else's."""

    def __init__(self, jobs: Rows[Job]) -> None:
        self._jobs = jobs
        self._completions: list[dict[int, Completion]] = [{} for _ in jobs]
        self._rows: list[Sequence] = []
        self._num_fed = 0
        self._num_open = sum(job.request.n for job in jobs)
        self._news = threading.Condition()

    @property
    def is_done(self) -> bool:
        """Whether every completion has ended."""
        return not self._num_open

    def next_rows(self, room: int) -> list[Sequence]:
        """Return the next request's rows if the queue has room for them, else none."""
        if self._num_fed == len(self._jobs) or self._jobs[self._num_fed].request.n > room:
            return []
        place, self._num_fed = self._num_fed, self._num_fed + 1
        rows = make_rows(self._jobs[place], lambda chunk: self._take(place, chunk), is_streaming=False)
        self._rows = [*(row for row in self._rows if row.finish_reason is None), *rows]
        return rows

    def wait(self) -> None:
        """Wait for a completion to end, or a moment."""
        with self._news:
            if not self.is_done:
                self._news.wait(0.1)

    def unfinished(self) -> list[Sequence]:
        """Return the rows handed out that have not ended."""
        return [row for row in self._rows if row.finish_reason is None]

    def outputs(self) -> list[Output]:
        """Return the answers in the order of the requests."""
        return [
            Output(
                completions=tuple(found[index] for index in range(job.request.n)),
                num_prompt_tokens=len(job.prepared.ids),
                num_prefix_positions=job.num_prefix,
            )
            for job, found in zip(self._jobs, self._completions, strict=True)
        ]

    def _take(self, place: int, chunk: Chunk) -> None:
        assert chunk.finish_reason is not None
        self._completions[place][chunk.index] = Completion(
            text=chunk.text, token_ids=chunk.token_ids, finish_reason=chunk.finish_reason, logprobs=chunk.logprobs
        )
        with self._news:
            self._num_open -= 1
            self._news.notify_all()
