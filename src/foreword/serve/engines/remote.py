"""The backend over other foreword servers, or a router in front of them: engines of their own, one registry for all.

Text is rendered here, so that limits hold here too; what travels is token ids behind `sha256:<artefact>`, which every
server of the registry resolves. Only a task with soft slots behind its text travels as text. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from foreword.engine.render import Prepared
from foreword.engine.request import Request
from foreword.errors import ArtefactCorrupt, BackendFailed, BadRequest, ForewordError, IncompatibleModel, Overloaded
from foreword.serve.backend import Caller
from foreword.serve.engines.base_info import check_fingerprint
from foreword.serve.engines.http_backend import HttpBackend, Loaded, headers_for, key_for
from foreword.serve.engines.http_events import Post
from foreword.serve.engines.http_stream import MAX_TRIES
from foreword.serve.engines.replicas import Lost, Replica

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
REFERENCE = "sha256:"
REFUSALS: dict[int, type[ForewordError]] = {
    400: BadRequest,
    413: BadRequest,
    409: IncompatibleModel,
    422: ArtefactCorrupt,
}


class RemoteBackend(HttpBackend):
    """The backend over foreword servers at the given URLs that serve the same base from the same registry."""

    health_paths = ("/ready", "/health")  # a router in front may have only the second

    async def load(self, sha256: str, path: Path) -> int:
        """Check an artefact, and that a server knows it; it loads it with the first request. Takes no bytes here."""
        await self.start()
        header = await self.read(path, sha256)
        check_fingerprint(self.base, header)
        try:
            status = await self._ask(sha256, f"/v1/models/{REFERENCE}{sha256}")
        except Overloaded:  # they are full; the requests will tell
            status = 200
        if status != 200:
            raise BackendFailed(
                f"the engine's server does not know this version ({status})",
                hint="Do this server and that one open the same registry (--home), and is its key right?",
            )
        self.loaded[sha256] = Loaded.of(header, sha256)
        return 0

    async def _ask(self, key: str, path: str) -> int:
        """Return the status of a GET at the replica of a key."""
        tried: list[Replica] = []
        for _ in range(MAX_TRIES):
            attempt = self.pool.attempt(key, tried)
            try:
                with attempt:
                    try:
                        status, _ = await self.client.get(attempt.replica, path)
                    except (aiohttp.ClientError, OSError) as error:
                        raise Lost(type(error).__name__) from None
                    if status in (502, 503, 504):
                        raise Lost(f"it says {status}")
                    return status
            except Lost:
                tried.append(attempt.replica)
        raise BackendFailed(f"{len(tried)} engines did not answer", hint="Try again.")

    async def posts(self, asked: Sequence[tuple[Request, Loaded | None]], caller: Caller) -> list[Post]:
        """Return one HTTP request for each of a client's. Raises BadRequest."""
        found, first = [], 0
        for (request, task), prepared in zip(asked, await self.render(asked), strict=True):
            path, body = _input(request, task, prepared)
            body |= _fields(request, prepared, is_chat=path == CHAT)
            found.append(
                Post(
                    path=path,
                    body=json.dumps(body, separators=(",", ":")).encode(),
                    key=key_for(task),
                    model=f"{REFERENCE}{task.sha256}" if task else None,
                    headers=headers_for(caller),
                    first=first,
                    n=request.n,
                    num_prompt_tokens=len(prepared.ids),
                    num_logprobs=request.logprobs,
                )
            )
            first += request.n
        return found

    def explain(self, status: int, error: Mapping[str, Any]) -> ForewordError:
        """Return the error for the client; a refusal in the server's own words."""
        if (kind := REFUSALS.get(status)) is not None:
            return kind(str(error.get("message") or "the engine's server refuses this request"))
        return super().explain(status, error)


def _input(request: Request, task: Loaded | None, prepared: Prepared) -> tuple[str, dict[str, Any]]:
    """Return the path, and the field that says what is continued."""
    if task is None or not task.num_after:
        return COMPLETIONS, {"prompt": prepared.ids}
    if request.messages is not None:
        return CHAT, {"messages": [dict(message) for message in request.messages]}
    return COMPLETIONS, {"prompt": request.prompt}


def _fields(request: Request, prepared: Prepared, *, is_chat: bool) -> dict[str, Any]:
    """Return the sampling fields. Raises BadRequest for one that the HTTP API has not."""
    if request.allowed_ids is not None:
        raise BadRequest("allowed_ids is not served over HTTP", hint="Use choices.")
    fields: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "n": request.n,
        "ignore_eos": request.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if request.choices is not None:
        fields["structured_outputs"] = {"choice": list(request.choices)}
    else:
        fields["max_tokens"] = prepared.max_tokens
    if request.stop:
        fields["stop"] = list(request.stop)
    if request.seed is not None:
        fields["seed"] = request.seed if request.seed < 2**63 else request.seed - 2**64  # the same draws
    if request.logprobs is not None:
        named = {"logprobs": True, "top_logprobs": request.logprobs} if is_chat else {"logprobs": request.logprobs}
        fields |= {**named, "return_tokens_as_token_ids": True}
    return fields
