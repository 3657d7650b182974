"""The backend over stock vLLM with the foreword plug-in: versions by name, on any number of replicas.

A request is N placeholder ids and its own ids; `kv_transfer_params` names the compiled file whose keys and values the
plug-in puts in the placeholders' places (foreword.serve.vllm.wire). Where this differs from the embedded engine, which
vLLM decides: placeholders count as seen for `repetition_penalty`; log-probabilities are those before penalties and
constraints; `choices` are spelled by any tokens that give the text. Imports no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from foreword.engine.render import Prepared
from foreword.engine.request import Request
from foreword.errors import ArtefactCorrupt, BackendFailed, BadRequest, ForewordError, Overloaded
from foreword.serve.backend import ANYONE, Caller
from foreword.serve.engines.base_info import BaseInfo, check_served
from foreword.serve.engines.compiled_source import CompiledSource
from foreword.serve.engines.http_backend import HttpBackend, Loaded, drops_space, headers_for, key_for
from foreword.serve.engines.http_events import Post
from foreword.serve.engines.http_stream import HttpStream
from foreword.serve.engines.replicas import Facts, Lost, Replica
from foreword.serve.vllm.wire import Wanted, cache_salt, scope_of

COMPLETIONS = "/v1/completions"
GREEDY_BELOW = 1e-5
"""A temperature below it is greedy, on both engines."""
NOTHING = Wanted("0" * 64, 1, scope_of(""))
"""A version that there is not."""
REFUSABLE = ("logprobs", "temperature", "top_p", "top_k", "stop", "n", "seed", "structured_outputs", "prompt_embeds")
"""Fields that a client sent too and may be told of when vLLM refuses them."""

log = logging.getLogger("foreword.serve")


class CompletionsBackend(HttpBackend):
    """What the two forms of serving on vLLM share: /v1/completions, one request for each prompt.

    vLLM takes many prompts at once too, but then on one replica, and one of them could not be asked again.
    """

    def __init__(self, base: BaseInfo, tokenizer: Any, urls: Sequence[str], **options: Any) -> None:
        super().__init__(base, tokenizer, urls, **options)
        self.placeholder = placeholder_id(tokenizer, base.stop_ids)
        self._drops_space = drops_space(tokenizer)

    async def posts(self, asked: Sequence[tuple[Request, Loaded | None]], caller: Caller) -> list[Post]:
        """Return one HTTP request for each of a client's. Raises BadRequest."""
        found, first = [], 0
        for (request, task), prepared in zip(asked, await self.render(asked), strict=True):
            found.append(await self._post(request, task, prepared, caller, first))
            first += request.n
        return found

    async def prove(self, task: Loaded) -> None:
        """Ask for one token behind a version, where its requests will go. Raises BackendFailed where there is none.

        Where all replicas are full nothing is proved: a version that cannot be loaded fails its requests anyway.
        """
        request = Request(prompt_ids=[self.placeholder], ignore_eos=True)
        post = await self._post(request, task, Prepared([self.placeholder], (), 1, None), ANYONE, 0)
        stream = HttpStream(self.client, self.pool, [post], self.explain)
        try:
            await stream.start()
            async for _ in stream:
                pass
        except Overloaded:
            log.warning("all replicas are full: %s is used without a proof that they can load it", task.sha256[:12])
        finally:
            await stream.aclose()

    async def _post(
        self, request: Request, task: Loaded | None, prepared: Prepared, caller: Caller, first: int
    ) -> Post:
        scope = scope_of(caller.scope)
        if task is None:
            body: dict[str, Any] = {"prompt": prepared.ids, "cache_salt": cache_salt(scope)}
        else:
            body = await self.prompt_fields(task, prepared, scope)
        body |= sampling_fields(request, prepared, self.base.stop_ids)
        return Post(
            path=COMPLETIONS,
            body=json.dumps(body, separators=(",", ":")).encode(),
            key=key_for(task),
            headers=headers_for(caller),
            first=first,
            n=request.n,
            num_prompt_tokens=len(prepared.ids),
            stop_ids=frozenset() if request.ignore_eos else self.base.stop_ids,
            num_logprobs=request.logprobs,
            drops_space=self._drops_space and "prompt" in body,  # behind embeddings vLLM decodes an answer alone too
        )

    async def prompt_fields(self, task: Loaded, prepared: Prepared, scope: str) -> dict[str, Any]:
        """Return the fields that say what is continued behind a version, and who may share its cached blocks."""
        raise NotImplementedError

    def explain(self, status: int, error: Mapping[str, Any]) -> ForewordError:
        """Return the error for the client. vLLM's own message stays here: it counts placeholders and may hold text."""
        if status not in (400, 413, 422):
            return super().explain(status, error)
        field = error.get("param")
        if field == "prompt_embeds":
            return BackendFailed(
                "the engine takes no embeddings", hint="Start it with --enable-prompt-embeds (foreword vllm-args)."
            )
        return BadRequest(
            f"the engine refuses {field if field in REFUSABLE else 'this request'}",
            hint="Its limits may be lower than the gateway's (--max-logprobs, --max-model-len).",
        )


class VLLMBackend(CompletionsBackend):
    """The backend over vLLM servers at `urls` that run the plug-in on `base`.

    `compiled` gives the compiled files; the plug-in fetches them from the registry's blob store by itself. `options`
    are those of `HttpBackend`.
    """

    def __init__(
        self, base: BaseInfo, tokenizer: Any, urls: Sequence[str], compiled: CompiledSource, **options: Any
    ) -> None:
        super().__init__(base, tokenizer, urls, **options)
        self.compiled = compiled

    async def probe(self, replica: Replica) -> Facts:
        """Return what a replica says of itself. Raises Lost where it is not well, or has no plug-in.

        Without one vLLM would answer from the placeholders; so a replica that comes up is asked for a version that
        there is not, and has to fail that.
        """
        facts = await super().probe(replica)
        if not replica.is_up or facts is not replica.facts:
            await self._prove_plugin(replica, facts)
        return facts

    async def _prove_plugin(self, replica: Replica, facts: Facts) -> None:
        body = {"model": facts.model, "prompt": [self.placeholder] * 2, "max_tokens": 1, "temperature": 0.0}
        body |= {"kv_transfer_params": NOTHING.to_params(), "cache_salt": cache_salt(NOTHING.scope)}
        try:
            async with self.client.session.post(replica.url + COMPLETIONS, data=json.dumps(body)) as response:
                status = response.status
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(type(error).__name__) from None
        if status == 200:
            raise Lost("it answers for a version that there is not: it runs without the plug-in (foreword vllm-args)")
        if status != 500:
            raise Lost(f"{COMPLETIONS} says {status}")

    async def load(self, sha256: str, path: Path) -> int:
        """Check an artefact, have it compiled, prove it on the replica that its requests go to; return its bytes."""
        await self.start()
        header = await self.read(path, sha256)
        check_served(self.base, header, max_model_len=self.pool.max_model_len, by_embeddings=False)
        blob = await self.compiled.get(sha256, path)
        if blob.num_positions != header.block.num_positions:
            raise ArtefactCorrupt(
                f"the compiled file of {header.task!r} has {blob.num_positions} positions, "
                f"its artefact {header.block.num_positions}",
                hint="Compile it again.",
            )
        task = Loaded.of(header, blob.sha256)
        await self.prove(task)
        self.loaded[sha256] = task
        return blob.num_bytes

    async def prompt_fields(self, task: Loaded, prepared: Prepared, scope: str) -> dict[str, Any]:
        """Return placeholders and the request's own ids, and by what the plug-in fills the placeholders' places."""
        wanted = Wanted(task.sha256, task.num_positions, scope)
        ids = [self.placeholder] * task.num_positions + prepared.ids
        return {"prompt": ids, "kv_transfer_params": wanted.to_params(), "cache_salt": wanted.salt}


def sampling_fields(request: Request, prepared: Prepared, stop_ids: Collection[int]) -> dict[str, Any]:
    """Return vLLM's fields for what `Request` says; each is named, since vLLM's defaults may be the checkpoint's."""
    max_tokens = prepared.max_tokens
    fields: dict[str, Any] = {
        "temperature": request.temperature if request.temperature >= GREEDY_BELOW else 0.0,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": 0.0,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "n": request.n,
        "ignore_eos": request.ignore_eos,
        "stop_token_ids": [] if request.ignore_eos else sorted(stop_ids),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if request.stop:
        fields["stop"] = sorted(request.stop, key=len, reverse=True)  # of two that end together the first is cut off
    if request.seed is not None:
        fields["seed"] = request.seed & (2**63 - 1)  # vLLM takes -1 for no seed
    if request.logprobs is not None:
        fields |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
    if request.allowed_ids is not None:
        fields["allowed_token_ids"] = list(request.allowed_ids)
    if request.choices is not None:
        fields["structured_outputs"] = {"choice": list(request.choices)}
        max_tokens = 1 + max(len(choice.encode()) for choice in request.choices)  # spelled byte by byte at worst
    return fields | {"max_tokens": max_tokens}


def placeholder_id(tokenizer: Any, stop_ids: Collection[int]) -> int:
    """Return the id that stands in a prefix's places: one that no answer holds, since penalties see it as said."""
    for name in ("bos_token_id", "pad_token_id"):
        found = getattr(tokenizer, name, None)
        if isinstance(found, int) and found not in stop_ids:
            return found
    return 0
