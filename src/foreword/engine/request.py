"""The data that flows through an engine: what is asked, what comes back piece by piece, and what is asked at the end.

Imports no torch: gateways and schedulers use these types without a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. Exactly one of `prompt`, `messages` and `prompt_ids` is given."""

    prompt: str | None = None
    """Text; where the prefix has a task template it is the template's {input}, else it is tokenised as it stands."""
    messages: Sequence[Mapping[str, str]] | None = None
    """A conversation, rendered by the prefix's template or by the base's chat template."""
    prompt_ids: Sequence[int] | None = None
    """Token ids that follow the prefix's block as they are; nothing is added."""
    allow_special: bool = True
    """Whether texts may hold special tokens; a server's clients may not, since these end turns and begin others."""
    prefix: str | None = None
    """Name under which the prefix was added to the engine; None is the plain base."""
    max_tokens: int | None = None
    """New tokens at most; None is the prefix's own limit, else 16."""
    default_limit: int | None = None
    """Where `max_tokens` is None: what takes its place is at most this."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    seed: int | None = None
    """Same seed, same tokens, whatever else is in the batch; None draws a fresh one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or answer (CTRL, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens already in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits once per occurrence in the answer."""
    stop: Sequence[str] = ()
    """The answer ends before the first of these strings; it is not part of the text."""
    ignore_eos: bool = False
    n: int = 1
    """Independent completions of the same prompt."""
    logprobs: int | None = None
    """Report each chosen token's log-probability and those of this many best tokens."""
    choices: Sequence[str] | None = None
    """A closed set of answers: decoding is constrained to them by a token trie."""
    allowed_ids: Sequence[int] | None = None
    """The only token ids that may be chosen, at every step; log-probabilities are over them alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of a chosen token, after penalties and constraints, before temperature; and of the best ones."""

    token_id: int
    logprob: float
    top: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of one completion's answer as it streams."""

    index: int
    """Which of the request's `n` completions."""
    text: str
    """New text; empty while a character or a possible stop string is incomplete."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    """Set on a completion's last chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The answer to a request. `text`, `token_ids` and `finish_reason` are those of the first completion."""

    completions: tuple[Completion, ...]
    num_prompt_tokens: int
    """Tokens of the request's own text; the prefix's block is not counted."""
    num_prefix_positions: int = 0

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first completion's token ids, without the end token."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first completion ended."""
        return self.completions[0].finish_reason
