"""The rows that an engine works on, from submission to the last chunk. Imports no torch.

A row's positions are those of its prefix, then one per token of `tokens` (prompt, then answer):

    position   0 ........ N-1 | N ............. N+T-1 | N+T ...
               prefix         | prompt (T tokens)     | answer so far
                              ^ tokens[0]             ^ tokens[num_prompt]
    num_computed: keys and values lie in the pool for positions before it; the row catches up from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from foreword.engine.request import Chunk, FinishReason, Request, TokenLogprob
from foreword.engine.stream import TextStream
from foreword.engine.trie import TrieNode

Slots = tuple[tuple[int, int, int], ...]
"""Soft slots among the prompt's tokens: (offset, first row of the prefix's `after`, count)."""


@dataclass(slots=True, eq=False)
class Start:
    """Computed positions that a row can begin with: a resident prefix, or the prompt that a sibling has computed."""

    blocks: list[int]
    """Scheduler: where the positions lie; whoever made the start owns them once."""
    num_positions: int


@dataclass(slots=True, eq=False, kw_only=True)
class PrefixEntry:
    """A prefix known to the engine."""

    name: str
    num_positions: int
    payload: Any
    """Engine: the KVPrefix. The scheduler does not look at it, the runner writes it into the pool."""
    start: Start | None = None
    """Scheduler: its place in the pool while it is resident."""
    num_users: int = 0
    """Scheduler: rows behind it that wait or run."""
    is_retired: bool = False
    """Engine: replaced or removed; its blocks are given back when the last user has gone."""


@dataclass(slots=True, eq=False)
class Siblings:
    """What the `n` completions of one request share: the prompt's keys and values, computed once."""

    num_waiting: int
    """Scheduler: siblings not yet admitted."""
    leader: Sequence | None = None
    """Scheduler: the one that computes the prompt, until it has or has gone."""
    start: Start | None = None
    """Scheduler: prefix and prompt without its last token, kept while siblings wait."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One row: a completion of a request, from submission to its last chunk."""

    request: Request
    index: int
    """Which of the request's completions."""
    tokens: list[int]
    """Token ids of the prompt; the engine appends those of the answer, without the end token."""
    num_prompt: int
    max_tokens: int
    seed: int
    """The request's, or a fresh one."""
    prefix: PrefixEntry | None = None
    slots: Slots = ()
    siblings: Siblings | None = None
    on_chunk: Callable[[Chunk], None] = lambda chunk: None
    is_streaming: bool = True
    """False: one chunk at the end."""
    stream: TextStream | None = None
    """Submission: None without a tokenizer, and where the text is one of `choices`."""
    node: TrieNode | None = None
    """Where the answer stands in the trie of `choices`; the engine moves it."""

    blocks: list[int] = field(default_factory=list)
    """Scheduler, at admission: enough for all the row can ever need."""
    num_computed: int = 0
    """Scheduler, at admission: the cached positions; engine: grows with every step."""

    seen: set[int] = field(default_factory=set)
    """Submission: the prompt's tokens; engine: and the answer's."""
    counts: dict[int, int] = field(default_factory=dict)
    """Engine: how often each token stands in the answer."""
    admitted: float | None = None
    """Engine: when the row left the queue, by `time.monotonic()`."""
    finish_reason: FinishReason | None = None
    """Engine."""
    text: str = ""
    """Engine: text not yet sent."""
    num_sent: int = 0
    """Engine: answer tokens already sent."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Engine: not yet sent."""

    @property
    def num_prefix(self) -> int:
        """Positions of the prefix."""
        return self.prefix.num_positions if self.prefix else 0

    @property
    def num_positions(self) -> int:
        """Positions of prefix, prompt and answer so far."""
        return self.num_prefix + len(self.tokens)

    @property
    def max_positions(self) -> int:
        """Positions that the row can ever need."""
        return self.num_prefix + self.num_prompt + self.max_tokens

    @property
    def num_uncomputed(self) -> int:
        """Positions that the row has yet to catch up with."""
        return self.num_positions - self.num_computed

    @property
    def num_answer(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_decodable(self) -> bool:
        """Whether one token id, not a soft slot, is all that is left to compute."""
        return self.num_uncomputed == 1 and self.num_computed - self.num_prefix >= self.end_of_slots

    @property
    def end_of_slots(self) -> int:
        """Index into `tokens` behind the last soft slot."""
        return self.slots[-1][0] + self.slots[-1][2] if self.slots else 0


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a row to compute in one forward."""

    sequence: Sequence
    num_new: int
    """Positions from `sequence.num_computed` on."""

    @property
    def is_last(self) -> bool:
        """Whether the row has caught up behind it, so that its logits are wanted."""
        return self.num_new == self.sequence.num_uncomputed


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of a row."""

    token: int
    logprob: TokenLogprob | None = None
