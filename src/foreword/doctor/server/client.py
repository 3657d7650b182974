"""What doctor says to a server, and what it hears: OpenAI's endpoints with vLLM's extensions, over HTTP. No torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from foreword.core.conformance import TOP
from foreword.errors import BackendFailed

TIMEOUT_S = 60.0
BUSY = (429, 503)
"""A tenant's limit, a full queue: asked again when the server says so."""
MAX_TRIES, MAX_WAIT_S = 5, 5.0

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids that follow the task's block as they are, or the messages of a conversation."""


class Refused(BackendFailed):
    """The server answered with an error; `answered` is its HTTP status, `code` what it calls the error."""

    def __init__(self, message: str, *, answered: int, code: str = "") -> None:
        super().__init__(message)
        self.answered = answered
        self.code = code


class NoLogprobs(BackendFailed):
    """The server answers, but says nothing of how likely its tokens were: most checks need that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One choice of an answer, with what its headers say of who answered."""

    text: str
    token_ids: tuple[int, ...]
    """Of the answer, as its log-probabilities name them."""
    logprobs: tuple[Mapping[int, float], ...]
    """The best tokens at each place, by token id, in nats."""
    finish_reason: str
    usage: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    """sha256 of the artefact that answered; "" from the plain base, and from servers that do not tell."""
    route: str = ""
    """`canary` or `stable` where the task has a canary."""


class ServerUnderTest:
    """An OpenAI-compatible server at `url` (with or without /v1), asked with `key` where it needs one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = root
        try:
            self._client = httpx.Client(base_url=root, headers=headers, timeout=TIMEOUT_S)
        except (httpx.InvalidURL, UnicodeError, ValueError) as error:
            raise BackendFailed(f"{root!r} is no URL: {error}", hint="Give http://host:port.") from None

    def __enter__(self) -> ServerUnderTest:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def models(self) -> list[dict[str, Any]]:
        """Return the cards of /v1/models. Raises BackendFailed when the server does not answer as it should."""
        found = _document(self._ask("GET", "/v1/models"))
        if not isinstance(found, dict) or not isinstance(found.get("data"), list):
            raise BackendFailed(f"{self.url}/v1/models is no list of models", hint="Is this a foreword server?")
        return [card for card in found["data"] if isinstance(card, dict) and isinstance(card.get("id"), str)]

    def replicas(self) -> list[dict[str, Any]] | None:
        """Return the engine's replicas as the gateway sees them, or None where this key may not ask for them."""
        try:
            found = _document(self._ask("GET", "/admin/v1/replicas"))
        except BackendFailed:
            return None
        data = found.get("data") if isinstance(found, dict) else None
        return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else None

    def complete(self, model: str, prompt: Prompt, *, max_tokens: int | None = 1, **fields: Any) -> Answer:
        """Return the greedy answer with log-probabilities; `fields` are of the body, None leaves one out.

        Messages go to the chat endpoint. Raises Refused with the status where the server answers an error, and
        BackendFailed where it sends no log-probabilities by token id.
        """
        path, body = _body(model, prompt, max_tokens, fields)
        return self._answers(path, body)[0]

    def complete_batch(self, model: str, rows: Sequence[Sequence[int]], *, max_tokens: int = 1) -> list[Answer]:
        """Return the greedy answers to several rows of token ids sent in one request, in their order."""
        path, body = _body(model, rows[0], max_tokens, {"prompt": [list(row) for row in rows]})
        answers = self._answers(path, body)
        if len(answers) != len(rows):
            raise BackendFailed(f"{self.url} sent {len(answers)} answers to {len(rows)} prompts")
        return answers

    def _answers(self, path: str, body: Mapping[str, Any]) -> list[Answer]:
        response = self._ask("POST", path, body)
        document = _document(response)
        try:
            choices = sorted(document["choices"], key=lambda choice: choice["index"])
            return [_answer(choice, document.get("usage") or {}, response.headers) for choice in choices]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise NoLogprobs(
                f"{self.url} sent no log-probabilities by token id ({type(error).__name__})",
                hint="Is this a foreword server, or another that takes `return_tokens_as_token_ids`?",
            ) from None

    def next_logprobs(self, model: str, ids: Sequence[int]) -> tuple[dict[int, float], str]:
        """Return the best next tokens behind `ids` with their log-probabilities, and the digest that answered."""
        answer = self.complete(model, ids)
        if not answer.logprobs:
            raise NoLogprobs(f"{self.url} sent an answer without a token", hint="Is this a foreword server?")
        return dict(answer.logprobs[0]), answer.digest

    def first_token_s(self, model: str, ids: Sequence[int], *, max_tokens: int = 1) -> float:
        """Return the seconds from sending a request to its first streamed token; the rest is not waited for.

        Raises Refused as `complete`, also where the stream begins with an error.
        """
        path, body = _body(model, ids, max_tokens, {"logprobs": None, "return_tokens_as_token_ids": None})
        started = time.perf_counter()
        try:
            with self._client.stream("POST", path, json={**body, "stream": True}) as response:
                if response.status_code >= 400:
                    response.read()
                    raise self._refusal(path, response)
                for line in response.iter_lines():
                    if line.startswith("data:") and '"choices"' in line:
                        return time.perf_counter() - started
                    if line.startswith("data:") and '"error"' in line:
                        raise Refused(f"{path}: {_message(line[5:])}", answered=500)
        except httpx.HTTPError as error:
            raise self._silent(error) from None
        raise Refused(f"{path}: the stream ended without a token", answered=500)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        for _ in range(MAX_TRIES):
            try:
                response = self._client.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise self._silent(error) from None
            if response.status_code not in BUSY:
                break
            time.sleep(min(_retry_after_s(response), MAX_WAIT_S))
        if response.status_code >= 400:
            raise self._refusal(path, response)
        return response

    def _silent(self, error: httpx.HTTPError) -> BackendFailed:
        kind = str(error) or type(error).__name__
        return BackendFailed(f"{self.url} does not answer: {kind}", hint="Check the URL and the server.")

    def _refusal(self, path: str, response: httpx.Response) -> BackendFailed:
        if response.status_code == 401:
            return BackendFailed(f"{self.url} refuses the key (401)", hint="Give a valid key: --key or FOREWORD_KEY.")
        text = f"{path} answered {response.status_code}: {_message(response.text)}"
        return Refused(text, answered=response.status_code, code=_code(response.text))


def _body(model: str, prompt: Prompt, max_tokens: int | None, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return path and body: greedy, with the best log-probabilities, never ended by an end token."""
    turns = [] if isinstance(prompt, str) else [dict(turn) for turn in prompt if isinstance(turn, Mapping)]
    body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body["return_tokens_as_token_ids"] = True
    if turns:
        body |= {"messages": turns, "logprobs": True, "top_logprobs": TOP}
    else:
        body |= {"prompt": prompt if isinstance(prompt, str) else list(prompt), "logprobs": TOP}
    body |= fields
    path = "/v1/chat/completions" if turns else "/v1/completions"
    return path, {name: value for name, value in body.items() if value is not None}


def _answer(choice: Mapping[str, Any], usage: Mapping[str, Any], headers: httpx.Headers) -> Answer:
    chosen, logprobs = _chat_logprobs(choice) if "message" in choice else _logprobs(choice)
    return Answer(
        text=choice["message"]["content"] if "message" in choice else choice["text"],
        token_ids=chosen,
        logprobs=logprobs,
        finish_reason=str(choice.get("finish_reason")),
        usage=usage,
        digest=headers.get("x-foreword-digest", ""),
        route=headers.get("x-foreword-route", ""),
    )


def _logprobs(choice: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[dict[int, float], ...]]:
    found = choice["logprobs"]
    chosen = tuple(_token(name) for name in found["tokens"])
    tops = ({_token(name): float(value) for name, value in entry.items()} for entry in found["top_logprobs"])
    return chosen, tuple(tops)


def _chat_logprobs(choice: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[dict[int, float], ...]]:
    content = choice["logprobs"]["content"]
    tops = ({_token(t["token"]): float(t["logprob"]) for t in entry["top_logprobs"]} for entry in content)
    return tuple(_token(entry["token"]) for entry in content), tuple(tops)


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _document(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise BackendFailed(
            f"{response.url} answered with no JSON: {response.text[:80]!r}", hint="Is this an OpenAI-compatible server?"
        ) from None


def _message(text: str) -> str:
    try:
        found = json.loads(text)
        return str(found["error"]["message"] if isinstance(found.get("error"), dict) else found["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return text[:200]


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("retry-after", "1"))
    except ValueError:
        return 1.0


def _code(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["code"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
