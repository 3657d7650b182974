"""OpenAI's request bodies: JSON text in, engine requests out. Imports no torch.

Fields are OpenAI's, and a few that vLLM added (`top_k`, `repetition_penalty`, `ignore_eos`, `structured_outputs`).
Every other field is refused by name, and so is a value that would have no effect: nothing is dropped silently.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from foreword.engine.request import Request
from foreword.errors import did_you_mean
from foreword.serve.http.openai_errors import InvalidBody

MAX_CHOICES = 128
"""Answers of one HTTP request, prompts times `n`: OpenAI's limit for `n`, and half of the engine's default queue."""
MAX_LOGPROBS = 20
MAX_STOPS = 16
SEED_LIMIT = 2**63

_OWN_VECTORS = "vectors come from the registry's versions, never from a client"
_OWN_CACHE = "the server sets it itself: it decides whose cached blocks a request may read"
_NO_CACHE = "it makes an engine skip the cache, where a task's vectors are"
ENGINE_FIELDS = {
    "prompt_embeds": _OWN_VECTORS,
    "kv_transfer_params": "the server sets it itself: it names the vectors that the engine loads",
    "cache_salt": _OWN_CACHE,
    "prompt_logprobs": _NO_CACHE,
    "prompt_logprob_token_ids": _NO_CACHE,
    "skip_reading_prefix_cache": _NO_CACHE,
    "echo": "the prompt is not part of an answer; " + _NO_CACHE,
    "prompt_token_ids": "send token ids as `prompt` of /v1/completions",
    "vllm_xargs": "engines get nothing that the server has not made itself",
    "logits_processors": "it runs code in the engine",
    "chat_template": "a task is rendered as it was trained",
    "chat_template_kwargs": "a task is rendered as it was trained",
    "add_special_tokens": "a task is rendered as it was trained",
    "add_generation_prompt": "a task is rendered as it was trained",
    "continue_final_message": "a task is rendered as it was trained",
}
"""Fields of vLLM's bodies that a client must not set, and why."""

Prompt = str | list[int]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
AnyPrompt = str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> list[Prompt]:
    """Return `prompt` as a list: of texts, or of token id lists; a bare list of ids is one prompt."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value) or all(_are_ids(item) for item in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists; none empty")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


def _joined(value: Any) -> Any:
    """Return a message's content as one text; parts are joined by a newline, as vLLM does."""
    if not isinstance(value, list):
        return value
    for place, part in enumerate(value):
        if isinstance(part, dict) and part.get("type") == "prompt_embeds":
            raise ValueError(f"part {place} is of type prompt_embeds; {ENGINE_FIELDS['prompt_embeds']}")
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"):
            raise ValueError(f'part {place} is not {{"type": "text", "text": …}}; only text is served')
        if not isinstance(part["text"], str):
            raise ValueError(f"the text of part {place} is not a string")
    return "\n".join(part["text"] for part in value)


class Strict(BaseModel):
    """Unknown fields and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]
    """Text, or a list of text parts."""


class StreamOptions(Strict):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Send one more chunk, without choices, that holds the usage."""


class StructuredOutputs(Strict):
    """Constraints on the answer, under vLLM's name; only a closed set is served."""

    choice: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)


Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)]


class Body(Strict):
    """What both endpoints take. None, or a field that is not sent, is the default."""

    model: str = Field(min_length=1)
    """A task, `task@alias`, `task@number`, or the base's own name."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Default 1, as OpenAI's; 0 is greedy."""
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """Extension: keep the k best tokens; 0 or -1 keeps all."""
    seed: int | None = Field(None, ge=-SEED_LIMIT, lt=SEED_LIMIT)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    stop: Annotated[Stops, BeforeValidator(_as_list, json_schema_input_type=str | Stops)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    """Extension; see `Request.repetition_penalty`."""
    ignore_eos: bool | None = None
    """Extension: go on behind the end of sequence, up to `max_tokens`."""
    structured_outputs: StructuredOutputs | None = None
    """Extension: `{"choice": ["yes", "no"]}` constrains the answer to one of these."""
    user: str | None = None
    """Keeps a user on one side of a canary, within the tenant; neither logged nor sent on."""

    return_token_ids: bool | None = None
    """Extension: choices hold the ids of the answer's tokens too."""
    return_tokens_as_token_ids: bool | None = None
    """Extension: log-probabilities name tokens as `token_id:7`, which no two tokens share."""

    @property
    def num_logprobs(self) -> int | None:
        """Best tokens to report next to each chosen one; None reports no log-probabilities."""
        raise NotImplementedError

    @property
    def has_usage_event(self) -> bool:
        """Whether a streamed answer ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def max_new_tokens(self) -> int | None:
        """The limit of new tokens, under whichever name it was given."""
        return self.max_tokens

    def requests(
        self, prefix: str | None, *, default_limit: int | None = None, allow_special: bool = True
    ) -> list[Request]:
        """Return the engine's requests, one per prompt, each for `n` answers behind `prefix`.

        For `default_limit` and `allow_special` see `Request`.
        """
        sampling = self._sampling(prefix) | {"default_limit": default_limit, "allow_special": allow_special}
        return [Request(**prompt, **sampling) for prompt in self._inputs()]

    def _inputs(self) -> list[dict[str, Any]]:
        """Return what tells the requests apart: a field of `Request` with its value for each."""
        raise NotImplementedError

    def _sampling(self, prefix: str | None) -> dict[str, Any]:
        given: dict[str, Any] = {
            "max_tokens": self.max_new_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "seed": self.seed,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "stop": None if self.stop is None else tuple(self.stop),
            "ignore_eos": self.ignore_eos,
            "n": self.n,
            "logprobs": self.num_logprobs,
            "choices": None if self.structured_outputs is None else tuple(self.structured_outputs.choice),
        }
        return {"prefix": prefix} | {name: value for name, value in given.items() if value is not None}


class CompletionBody(Body):
    """The body of /v1/completions."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts, json_schema_input_type=AnyPrompt)]
    """A text, a list of texts, or token ids that follow the task's block as they are."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """Best tokens to report next to each chosen one; None reports no log-probabilities."""
        return self.logprobs

    def _inputs(self) -> list[dict[str, Any]]:
        return [{"prompt" if isinstance(prompt, str) else "prompt_ids": prompt} for prompt in self.prompt]


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """OpenAI's newer name of `max_tokens`; one of them may be given."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """Best tokens to report next to each chosen one; None reports no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_new_tokens(self) -> int | None:
        """The limit of new tokens, under whichever name it was given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def _inputs(self) -> list[dict[str, Any]]:
        return [{"messages": [{"role": message.role, "content": message.content} for message in self.messages]}]


AnyModel = TypeVar("AnyModel", bound=BaseModel)
AnyBody = TypeVar("AnyBody", bound=Body)


def parse_body(kind: type[AnyBody], data: bytes) -> AnyBody:
    """Read a request's body. Raises InvalidBody with the position where it is no JSON, else the path of a bad field."""
    body = parse_model(kind, data)
    _refuse_without_effect(body)
    return body


def parse_model(kind: type[AnyModel], data: bytes) -> AnyModel:
    """Read JSON as a model of any kind. Raises InvalidBody as `parse_body` does."""
    return checked(kind, _parse_json(data))


def checked(kind: type[AnyModel], document: dict[str, Any]) -> AnyModel:
    """Return a document as a model. Raises InvalidBody with the path of the first bad field."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise _explained(kind, error) from None


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if rb"\ud" in data.lower():  # half of a surrogate pair, which no tokenizer takes
            json.dumps(document, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InvalidBody(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno} (character {error.pos})"
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidBody(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except UnicodeEncodeError:
        raise InvalidBody("a text holds half of a surrogate pair", hint="Escape both halves, or send UTF-8.") from None
    except RecursionError:
        raise InvalidBody("the body is nested too deeply") from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise error if isinstance(error, InvalidBody) else InvalidBody(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidBody(f"the body is a JSON {type(document).__name__}, an object is needed")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidBody(f"the field {name[:80]!r} is given twice", param=name[:80])
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise InvalidBody(f"the body holds {name}, which is no JSON number")


def _explained(kind: type[BaseModel], error: ValidationError) -> InvalidBody:
    """Return the first fault with its path; a value is shown only where it is a number or the like, never text."""
    faults = error.errors(include_url=False)
    refused = (fault for fault in faults if fault["type"] == "extra_forbidden" and _path(fault["loc"]) in ENGINE_FIELDS)
    fault = next(refused, faults[0])
    path = _path(fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = kind.model_fields if len(fault["loc"]) == 1 else {}
        if (why := ENGINE_FIELDS.get(path)) is not None:
            return InvalidBody(f"the field {path!r} is refused: {why}", hint="Remove it.", param=path)
        return InvalidBody(
            f"the field {path!r} is not supported",
            hint=did_you_mean(str(fault["loc"][-1])[:80], known) or "Remove it.",
            param=path,
        )
    if fault["type"] == "missing":
        return InvalidBody(f"the field {path!r} is missing", param=path)
    value = fault["input"]
    got = f", got {json.dumps(value)}" if value is None or isinstance(value, bool | int | float) else ""
    text = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return InvalidBody(f"{path}: {text}{got}", param=path)


def _path(location: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")[:200]


def _refuse_without_effect(body: Body) -> None:
    """Raise InvalidBody where a field is given that would change nothing."""
    faults: list[tuple[bool, str, str]] = [
        (body.stream_options is not None and not body.stream, "stream_options", "is for stream: true"),
        (
            body.return_tokens_as_token_ids is not None and body.num_logprobs is None,
            "return_tokens_as_token_ids",
            "is for logprobs",
        ),
    ]
    if isinstance(body, ChatBody):
        faults += [
            (body.top_logprobs is not None and not body.logprobs, "top_logprobs", "is for logprobs: true"),
            (
                body.max_tokens is not None and body.max_completion_tokens is not None,
                "max_tokens",
                "and max_completion_tokens are one setting",
            ),
        ]
    for is_wrong, name, why in faults:
        if is_wrong:
            raise InvalidBody(f"{name} {why}; it would have no effect here", hint="Remove it.", param=name)
    if isinstance(body, CompletionBody) and len(body.prompt) * (body.n or 1) > MAX_CHOICES:
        raise InvalidBody(
            f"{len(body.prompt)} prompts times n = {body.n or 1} are {len(body.prompt) * (body.n or 1)} answers, "
            f"a request may ask for {MAX_CHOICES}",
            hint="Send several requests.",
            param="prompt",
        )
