"""The vLLM command: what a shell would run is what was meant."""

from __future__ import annotations

import json
import shlex

import pytest

from foreword.errors import ConfigError
from foreword.serve.engines.base_info import BaseInfo
from foreword.serve.vllm.args import vllm_command
from tests.serve.artefacts import demo_base


@pytest.fixture
def info() -> BaseInfo:
    base = demo_base()
    return BaseInfo(
        folder="/models/a base", fingerprint=base.fingerprint, spec=base.spec, stop_ids=frozenset({2}), dtype="float32"
    )


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_printed_command_is_the_command(info: BaseInfo) -> None:
    command = vllm_command(info, blobs="s3://team/blobs", name="base", cache="/var/cache/fw", tensor_parallel=2)
    words = shlex.split(str(command).replace("\\\n", ""))
    assert words == list(command.arguments)
    assert words[:3] == ["vllm", "serve", "/models/a base"]
    assert option(words, "--dtype") == "float32" and option(words, "--tensor-parallel-size") == "2"
    transfer = json.loads(option(words, "--kv-transfer-config"))
    assert transfer["kv_connector_module_path"] == "foreword.serve.vllm_connector"
    extra = transfer["kv_connector_extra_config"]
    assert extra["blobs"] == "s3://team/blobs" and extra["cache"] == "/var/cache/fw"
    assert extra["base"] == info.fingerprint.to_json()
    assert "--enable-prompt-embeds" not in words


def test_embeddings_only_needs_no_plugin(info: BaseInfo) -> None:
    words = list(vllm_command(info, blobs="x", name="b", plugin=False, embeddings=True).arguments)
    assert "--kv-transfer-config" not in words and "--enable-prompt-embeds" in words
    with pytest.raises(ConfigError, match="both off"):
        vllm_command(info, blobs="x", name="b", plugin=False)


def test_a_cpu_build_gets_its_block_size_and_environment(info: BaseInfo) -> None:
    command = vllm_command(info, blobs="x", name="b", on_cpu=True, dtype="bfloat16", max_model_len=512)
    assert str(command).startswith("VLLM_CPU_KVCACHE_SPACE=1 vllm serve")
    words = list(command.arguments)
    assert (option(words, "--block-size"), option(words, "--dtype"), option(words, "--max-model-len")) == (
        "32",
        "bfloat16",
        "512",
    )
