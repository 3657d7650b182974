"""Checks of a running server: do its answers come from the version that was published, and as that was trained?

Every figure is asked for over HTTP, so the whole way is checked: gateway, names, rendering of nothing (probes are token
ids), engine, plug-in, blocks, and the sampler's log-probabilities. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from foreword.core.artefact import ArtefactHeader
from foreword.core.conformance import TOP, check_probe, judge
from foreword.doctor.finding import Finding
from foreword.errors import BackendFailed, ForewordError

TIMEOUT_S = 60.0


class ServerUnderTest:
    """An OpenAI-compatible foreword server at `url` (with or without /v1), asked with `key` where it needs one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = root
        try:
            self._client = httpx.Client(base_url=root, headers=headers, timeout=TIMEOUT_S)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise BackendFailed(f"{root!r} is no URL: {error}", hint="Give http://host:port.") from None

    def __enter__(self) -> ServerUnderTest:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def models(self) -> list[dict[str, Any]]:
        """Return the cards of /v1/models. Raises BackendFailed when the server does not answer as it should."""
        found = self._ask("GET", "/v1/models").json()
        if not isinstance(found, dict) or not isinstance(found.get("data"), list):
            raise BackendFailed(f"{self.url}/v1/models is no list of models", hint="Is this a foreword server?")
        return [card for card in found["data"] if isinstance(card, dict)]

    def next_logprobs(self, model: str, ids: Sequence[int]) -> tuple[dict[int, float], str]:
        """Return the best next tokens behind `ids` with their log-probabilities, and the digest that answered."""
        body = {
            "model": model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": TOP,
            "ignore_eos": True,
            "return_tokens_as_token_ids": True,
        }
        response = self._ask("POST", "/v1/completions", body)
        try:
            entries = response.json()["choices"][0]["logprobs"]["top_logprobs"][0]
            found = {int(name.removeprefix("token_id:")): float(value) for name, value in entries.items()}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise BackendFailed(
                f"{self.url} sent no log-probabilities by token id ({type(error).__name__})",
                hint="Is this a foreword server?",
            ) from None
        return found, response.headers.get("x-foreword-digest", "")

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            kind = str(error) or type(error).__name__
            raise BackendFailed(f"{self.url} does not answer: {kind}", hint="Check the URL and the server.") from None
        if response.status_code == 401:
            raise BackendFailed(f"{self.url} refuses the key (401)", hint="Give a valid key: --key or FOREWORD_KEY.")
        if response.status_code >= 400:
            raise BackendFailed(f"{path} answered {response.status_code}: {_message(response)}")
        return response


def check_version(
    server: ServerUnderTest, model: str, sha256: str, header: ArtefactHeader, dtype: str
) -> list[Finding]:
    """Replay a version's probes through the server as `model`; `dtype` is the one that its base runs in.

    Checks that the artefact `sha256` answered, and that its log-probabilities are those it was trained with.
    """
    if not header.conformance:
        return [Finding(check=model, ok=True, measured="no conformance probes in the artefact: nothing was compared")]
    digests, found = set(), []
    try:
        for probe in header.conformance:
            logprobs, digest = server.next_logprobs(model, check_probe(probe, header.spec.vocab_size))
            digests.add(digest)
            found.append(logprobs)
    except ForewordError as error:
        return [Finding(check=f"{model} answers", ok=False, measured=error.message, fix=error.hint)]
    wrong = sorted(digest for digest in digests if digest != sha256)
    identity = Finding(
        check=f"{model} version",
        ok=not wrong,
        measured=f"answered by {wrong[0][:12] or 'no version'}, expected {sha256[:12]}" if wrong else sha256[:12],
        fix="The alias was moved meanwhile, or the server uses another registry.",
    )
    result = judge(header.conformance, found, dtype)
    fix = "Not the computation it was trained in: compare base, dtype and engine version; compile the version again."
    return [identity, Finding(check=f"{model} conformance", ok=result.ok, measured=result.message, fix=fix)]


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
