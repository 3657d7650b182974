"""From a request to token ids: every field is checked, then the text is rendered. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from foreword.core.template import Rendered, TaskTemplate, encode_plain, encode_target, render_chat
from foreword.engine.request import Request
from foreword.engine.sequence import Slots
from foreword.engine.trie import TrieNode, build_trie, longest_answer
from foreword.errors import BadRequest, ForewordError

DEFAULT_MAX_TOKENS = 16
MAX_TOKENS = 2**31
MAX_LOGPROBS = 1000

RANGES: dict[str, tuple[type, float, float]] = {
    "max_tokens": (int, 1, math.inf),
    "temperature": (float, 0.0, math.inf),
    "top_p": (float, 0.0, 1.0),
    "top_k": (int, 0, math.inf),
    "seed": (int, -(2**63), 2**64 - 1),
    "repetition_penalty": (float, 0.0, math.inf),
    "presence_penalty": (float, -math.inf, math.inf),
    "frequency_penalty": (float, -math.inf, math.inf),
    "n": (int, 1, math.inf),
    "logprobs": (int, 0, MAX_LOGPROBS),
}
"""Type, least and greatest value of each numeric field."""
ABOVE_ZERO = ("top_p", "repetition_penalty")
OPTIONAL = ("max_tokens", "seed", "logprobs")


class RendersFor(Protocol):
    """What rendering must know of a base: `FrozenModel` has it, and so has a base that runs elsewhere."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""


class RendersBehind(Protocol):
    """What rendering must know of a prefix: `KVPrefix` has it, and so has one that is compiled elsewhere."""

    @property
    def template(self) -> TaskTemplate | None:
        """The task's template; None for vectors made elsewhere."""

    @property
    def max_new_tokens(self) -> int | None:
        """The task's limit of new tokens."""

    @property
    def num_after(self) -> int:
        """Soft slots behind the text."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be served: what the engine makes its rows from."""

    ids: list[int]
    slots: Slots
    max_tokens: int
    trie: TrieNode | None


def prepare(request: Request, base: RendersFor, prefix: RendersBehind | None) -> Prepared:
    """Render a request whose fields are checked. Raises BadRequest where it cannot be rendered or answered."""
    if base.tokenizer is None and (request.prompt_ids is None or request.stop or request.choices is not None):
        field = "stop" if request.stop else "choices" if request.choices is not None else "prompt or messages"
        raise BadRequest(f"{field} needs a tokenizer, and the base was loaded without one", hint="Give prompt_ids.")
    if not request.allow_special:
        check_special(request, base.tokenizer)
    try:
        rendered = _render(request, base.tokenizer, prefix)
        choices = request.choices
        trie = _trie(base.tokenizer, base.stop_ids, tuple(choices)) if choices is not None else None
    except BadRequest:
        raise
    except ForewordError as error:
        raise BadRequest(error.message, hint=error.hint) from error
    if not rendered.ids:
        raise BadRequest("the prompt is empty: no token follows the prefix's block", hint="Send some text.")
    default = prefix.max_new_tokens if prefix is not None else None
    default = min(default or DEFAULT_MAX_TOKENS, request.default_limit or MAX_TOKENS)
    max_tokens = request.max_tokens or default
    if trie is not None:
        longest = longest_answer(trie) - 1
        if request.max_tokens is not None and request.max_tokens < longest:
            raise BadRequest(
                f"max_tokens is {request.max_tokens}, the longest of choices takes {longest} tokens",
                hint="Leave max_tokens out.",
            )
        if request.default_limit is not None and request.default_limit < longest:
            raise BadRequest(
                f"the longest of choices takes {longest} tokens, {request.default_limit} are allowed",
                hint="Give shorter choices.",
            )
        max_tokens = max(longest, 1)
    return Prepared(rendered.ids, rendered.slots, max_tokens, trie)


def check_special(request: Request, tokenizer: Any) -> None:
    """Raise BadRequest where a text holds a special token of the tokenizer, written out.

    Such text would end a turn or begin another one: whoever writes a part of a prompt would write all of it.
    """
    texts = [("prompt", request.prompt or "")]
    texts += [(f"messages[{place}]", str(turn["content"])) for place, turn in enumerate(request.messages or ())]
    texts += [(f"choices[{place}]", text) for place, text in enumerate(request.choices or ())]
    for field, text in texts:
        if (found := find_special(tokenizer, text)) is not None:
            raise BadRequest(
                f"{field} holds the special token {found!r}",
                hint="Take it out, or serve with --allow-special-tokens where all clients are trusted.",
            )


def find_special(tokenizer: Any, text: str) -> str | None:
    """Return the first special token that tokenising `text` would make of its characters, or None."""
    pattern, normalizer = _specials(tokenizer) if tokenizer is not None else (None, None)
    if pattern is None:
        return None
    if (match := pattern.search(text)) is None and normalizer is not None:
        match = pattern.search(normalizer.normalize_str(text))
    return match.group() if match else None


@lru_cache(maxsize=16)
def _specials(tokenizer: Any) -> tuple[re.Pattern[str] | None, Any]:
    """Return what finds special tokens in a text, and the normalizer where they are looked for behind it too."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    names = {name for name in names if name}
    if not names:
        return None, None
    pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name))))
    is_normalized = any(token.normalized for token in added if token.special)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return pattern, backend.normalizer if is_normalized and backend is not None else None


def check_fields(request: Request, vocab_size: int) -> None:
    """Raise BadRequest for the first field of a wrong type or outside its range."""
    given = [name for name in ("prompt", "messages", "prompt_ids") if getattr(request, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise BadRequest(f"exactly one of prompt, messages and prompt_ids must be given, found {found}")
    for name, (kind, least, greatest) in RANGES.items():
        _check_number(name, getattr(request, name), kind, least, greatest)
    for name in ("prompt", "prefix"):
        if not isinstance(getattr(request, name), str | None):
            raise BadRequest(f"{name} must be a text, found {getattr(request, name)!r}")
    if not isinstance(request.ignore_eos, bool):
        raise BadRequest(f"ignore_eos must be true or false, found {request.ignore_eos!r}")
    _check_strings("stop", request.stop, allow_empty=True)
    if request.choices is not None:
        _check_strings("choices", request.choices, allow_empty=False)
        for other in ("stop", "ignore_eos", "allowed_ids"):
            if getattr(request, other):
                raise BadRequest(f"{other} is {getattr(request, other)!r}: it cannot be combined with choices")
    if request.messages is not None:
        _check_messages(request.messages)
    for name in ("prompt_ids", "allowed_ids"):
        if getattr(request, name) is not None:
            _check_ids(name, getattr(request, name), vocab_size)


def _check_number(name: str, value: Any, kind: type, least: float, greatest: float) -> None:
    if value is None and name in OPTIONAL:
        return
    allowed = int if kind is int else int | float
    if isinstance(value, bool) or not isinstance(value, allowed):
        article = "an integer" if kind is int else "a number"
        raise BadRequest(f"{name} must be {article}, found {value!r}")
    if not math.isfinite(value) or not least <= value <= greatest or (name in ABOVE_ZERO and value == 0):
        low = f"above {least:g}" if name in ABOVE_ZERO else f"at least {least:g}" if math.isfinite(least) else "finite"
        high = f" and at most {greatest:g}" if math.isfinite(greatest) else ""
        raise BadRequest(f"{name} is {value!r}, it must be {low}{high}")


def _check_strings(name: str, value: Any, *, allow_empty: bool) -> None:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise BadRequest(f"{name} must be a list of texts, found {value!r}")
    if not value and not allow_empty:
        raise BadRequest(f"{name} is an empty list")
    for text in value:
        if not isinstance(text, str) or not text:
            raise BadRequest(f"{name} holds {text!r}, each entry must be a text that is not empty")


def _check_messages(messages: Any) -> None:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise BadRequest(f"messages must be a list with at least one message, found {messages!r}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadRequest(f"messages[{index}] must have a role and a content, found {message!r}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise BadRequest(f"messages[{index}].{key} must be a text, found {message.get(key)!r}")


def _check_ids(name: str, ids: Any, vocab_size: int) -> None:
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise BadRequest(f"{name} must be a list of token ids, found {type(ids).__name__}")
    if not ids:
        raise BadRequest(f"{name} is an empty list")
    for index, token in enumerate(ids):
        if type(token) is not int:
            raise BadRequest(f"{name}[{index}] must be an integer, found {token!r}")
        if not 0 <= token < vocab_size:
            raise BadRequest(f"{name}[{index}] is {token}, the base's vocabulary has {vocab_size} tokens")


def _render(request: Request, tokenizer: Any, prefix: RendersBehind | None) -> Rendered:
    template = prefix.template if prefix is not None else None
    if prefix is not None and prefix.num_after and (request.prompt_ids is not None or template is None):
        raise BadRequest(
            f"prefix {request.prefix!r} has {prefix.num_after} soft slots behind the text, "
            "only its task template can place them",
            hint="Send prompt or messages instead of prompt_ids.",
        )
    if request.prompt_ids is not None:
        return Rendered(list(request.prompt_ids))
    if request.messages is not None:
        if template is not None:
            return template.render_messages(tokenizer, request.messages)
        return Rendered(encode_plain(tokenizer, render_chat(tokenizer, request.messages)))
    text = request.prompt or ""
    if template is not None:
        return template.render(tokenizer, text)
    if prefix is not None:  # vectors from elsewhere: the tokenizer's own specials, as PEFT feeds them
        return Rendered(list(tokenizer(text).input_ids))
    return Rendered(encode_plain(tokenizer, text))


@lru_cache(maxsize=256)
def _trie(tokenizer: Any, stop_ids: frozenset[int], choices: tuple[str, ...]) -> TrieNode:
    return build_trie(choices, [encode_target(tokenizer, choice, stop_ids) for choice in choices])
