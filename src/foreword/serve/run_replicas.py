"""Start the server in front of engines that run elsewhere. Imports no torch until the tokenizer is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from foreword.registry.store import Registry
from foreword.serve.access.control import Control
from foreword.serve.backend import Backend
from foreword.serve.engines.base_info import base_info
from foreword.serve.engines.compiled_source import CompiledSource
from foreword.serve.engines.embeddings import EmbeddingsBackend
from foreword.serve.engines.http_backend import load_tokenizer
from foreword.serve.engines.remote import RemoteBackend
from foreword.serve.engines.replicas import FIRST_TOKEN_S, Timeouts, distinct
from foreword.serve.engines.vllm_backend import VLLMBackend
from foreword.serve.run import own_name, serve_backend

Mode = Literal["plugin", "embeddings", "remote"]
"""vLLM with the plug-in, vLLM that takes embeddings, other foreword servers."""
KEY_VARIABLE = "FOREWORD_REPLICA_KEY"
MAX_KNOWN = 100_000
"""Versions that are known to be good on their replicas: a few hundred bytes each here, and nothing there."""


def serve_replicas(
    base: str,
    urls: Sequence[str],
    mode: Mode,
    *,
    base_name: str | None = None,
    dtype: str = "auto",
    max_inflight: int = 256,
    first_token_s: float = FIRST_TOKEN_S,
    **options: Any,
) -> None:
    """Serve a base whose engines run at `urls`; `options` and errors are those of `serve_backend`.

    `base` is the base's folder, for its tokenizer, its facts and, with embeddings, its table. `dtype` is the one in
    which the engines run it; "auto" is the checkpoint's. The key that the engines ask for is read from
    FOREWORD_REPLICA_KEY. Raises ConfigError too, for a URL that is none and a base that cannot be read.
    """
    distinct(urls)  # before anything is loaded

    def make(registry: Registry, control: Control) -> Backend:
        info = base_info(base, registry.home / "cache")
        given: dict[str, Any] = {
            "key": os.environ.get(KEY_VARIABLE),
            "max_inflight": max_inflight,
            "draining": lambda: control.snapshot.draining,
            "timeouts": Timeouts(first_token_s=first_token_s),
        }
        tokenizer = load_tokenizer(info.folder)
        if mode == "plugin":
            source = CompiledSource(registry, info.folder, info.dtype if dtype == "auto" else dtype)
            return VLLMBackend(info, tokenizer, urls, source, **given)
        kind = EmbeddingsBackend if mode == "embeddings" else RemoteBackend
        return kind(info, tokenizer, urls, **given)

    options = {"max_resident_versions": MAX_KNOWN} | options
    serve_backend(make, base_name=base_name or own_name(base), **options)
