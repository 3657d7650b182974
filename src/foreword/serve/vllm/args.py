"""The command that starts a stock vLLM for a base and a registry's blobs. Imports no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreword.errors import ConfigError
from foreword.serve.engines.base_info import BaseInfo

CONNECTOR = "ForewordConnector"
MODULE = "foreword.serve.vllm_connector"
HOST_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMCommand:
    """A command line and the environment that it needs."""

    arguments: Sequence[str]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """One line per option, as a shell takes it."""
        pairs = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        lines, words = [" ".join([*pairs, shlex.join(self.arguments[:3])])], list(self.arguments[3:])
        while words:
            option = [words.pop(0)]
            while words and not words[0].startswith("--"):
                option.append(words.pop(0))
            lines.append(shlex.join(option))
        return " \\\n  ".join(lines)


def vllm_command(
    base: BaseInfo,
    *,
    blobs: str,
    name: str,
    plugin: bool = True,
    embeddings: bool = False,
    dtype: str = "auto",
    max_model_len: int | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    host: str = "127.0.0.1",
    port: int = 8001,
    cache: str | None = None,
    host_bytes: int = HOST_BYTES,
    on_cpu: bool = False,
) -> VLLMCommand:
    """Return the `vllm serve` command for a base.

    `plugin` loads the connector that serves prompts and prefixes by name from `blobs` (folder or URL; of a URL,
    fetched files lie in `cache`); `embeddings` lets requests bring embeddings instead. `dtype` "auto" is the
    checkpoint's own, always named, since vLLM's own choice for float32 checkpoints is another one.
    `max_model_len` counts the prefix's positions too. Raises ConfigError where neither way is switched on.
    """
    if not plugin and not embeddings:
        raise ConfigError("vLLM would serve no task: plug-in and embeddings are both off", hint="Leave one on.")
    arguments = ["vllm", "serve", base.folder, "--served-model-name", name]
    arguments += ["--dtype", base.dtype if dtype == "auto" else dtype]
    if max_model_len is not None:
        arguments += ["--max-model-len", str(max_model_len)]
    if tensor_parallel > 1:
        arguments += ["--tensor-parallel-size", str(tensor_parallel)]
    if pipeline_parallel > 1:
        arguments += ["--pipeline-parallel-size", str(pipeline_parallel)]
    # Sampling defaults of the checkpoint's generation_config.json would change what the gateway asked for.
    arguments += ["--generation-config", "vllm", "--enable-prefix-caching"]
    if embeddings:
        arguments.append("--enable-prompt-embeds")
    if plugin:
        extra: dict[str, Any] = {"blobs": blobs, "host_bytes": host_bytes, "base": base.fingerprint.to_json()}
        if cache is not None:
            extra["cache"] = cache
        transfer = {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": MODULE,
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
        arguments += ["--kv-transfer-config", json.dumps(transfer, sort_keys=True, separators=(",", ":"))]
    arguments += ["--host", host, "--port", str(port)]
    environment = {}
    if on_cpu:
        arguments += ["--enforce-eager", "--block-size", "32"]
        environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return VLLMCommand(arguments=arguments, environment=environment)
