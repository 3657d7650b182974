"""What of vLLM's own objects the plug-in cannot serve, found at start: each refusal names the option or the layer."""

# mypy: disable-error-code="import-not-found"
# (vLLM lives in an environment of its own)
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

from foreword.errors import ConfigError
from foreword.serve.vllm.blocks import LayerShare

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

OTHERWISE = "Serve this base by embeddings (--mode embeddings), or on the embedded engine."


def check_engine(config: VllmConfig) -> None:
    """Raise ConfigError where the engine is configured in a way that the plug-in cannot serve, naming the option."""
    transfer, parallel = config.kv_transfer_config, config.parallel_config
    if transfer.kv_load_failure_policy != "fail":
        raise ConfigError(
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}: vLLM would answer from placeholders",
            hint='Leave it at "fail".',
        )
    if transfer.kv_role == "kv_producer":
        raise ConfigError("kv_role is 'kv_producer', the plug-in only loads", hint='Use "kv_consumer".')
    if config.speculative_config is not None and config.speculative_config.method != "ngram":
        raise ConfigError(
            f"speculative decoding by {config.speculative_config.method}: its own layers would read placeholders",
            hint='Leave out --speculative-config, or use "ngram", which has no layers.',
        )
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        raise ConfigError(
            "context parallelism is on: pages are spread over workers in a way that the plug-in does not write",
            hint="Use tensor or pipeline parallelism.",
        )


def check_caches(caches: KVCacheConfig) -> int:
    """Return the page size in positions. Raises ConfigError naming a layer whose cache the plug-in cannot write."""
    for group in caches.kv_cache_groups:
        spec, same = group.kv_cache_spec, dict.fromkeys(group.layer_names, group.kv_cache_spec)
        for name, layer in (spec.kv_cache_specs if isinstance(spec, UniformTypeKVCacheSpecs) else same).items():
            if type(layer) not in (FullAttentionSpec, SlidingWindowSpec):
                raise ConfigError(
                    f"layer {name} keeps a {type(layer).__name__}, not keys and values of single tokens",
                    hint=OTHERWISE,
                )
    if len(caches.kv_cache_groups) != 1:
        raise ConfigError(
            f"the engine keeps {len(caches.kv_cache_groups)} groups of pages: "
            + "; ".join(", ".join(group.layer_names[:2]) + ", …" for group in caches.kv_cache_groups),
            hint="Leave out --no-disable-hybrid-kv-cache-manager.",
        )
    return int(caches.kv_cache_groups[0].kv_cache_spec.block_size)


def writable_layers(layers: Mapping[str, Any], cached: Iterable[str]) -> list[tuple[LayerShare, Attention]]:
    """Return this worker's layers in the model's order: those of `layers`, by name, that are `cached`.

    Raises ConfigError naming the first one whose cache cannot be written.
    """
    for name, layer in layers.items():
        if target := getattr(layer, "kv_sharing_target_layer_name", None):
            raise ConfigError(f"layer {name} has no cache of its own, it uses that of {target}", hint=OTHERWISE)
    found = sorted(((_share(name, layers[name]), layers[name]) for name in cached), key=lambda item: item[0].layer)
    indices = [share.layer for share, _ in found]
    if len(set(indices)) != len(indices):
        raise ConfigError(f"a layer has several caches: {', '.join(sorted(cached))}", hint=OTHERWISE)
    return found


def _share(name: str, layer: Any) -> LayerShare:
    if type(layer) is not Attention or layer.attn_type != "decoder":
        raise ConfigError(f"layer {name} is {type(layer).__name__}, no plain attention of a decoder", hint=OTHERWISE)
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise ConfigError(
            f"layer {name} has the backend {layer.attn_backend.get_name()}, which writes pages in its forward only",
            hint="Choose another one with --attention-backend.",
        )
    return LayerShare(extract_layer_index(name), layer.num_kv_heads, layer.head_size, layer.head_size_v)
