"""Run by vLLM's own Python (test_start.py): what the plug-in says to configurations and layers that it cannot serve.

Prints one JSON object: the message of each case's ConfigError, or what the case returned.
"""

import json
import sys
import tempfile
from types import SimpleNamespace as Fake

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.v1 import kv_cache_interface as kv

import vllm
from foreword.errors import ConfigError
from foreword.serve.vllm.blocks import LayerShare, Load, Write
from foreword.serve.vllm.checks import check_caches, check_engine, writable_layers
from foreword.serve.vllm_connector import ForewordConnector, Orders, Report

SHA = "a" * 64
SIZES = {"block_size": 32, "num_kv_heads": 2, "head_size": 4, "dtype": torch.float32}
FULL, SLIDING = kv.FullAttentionSpec(**SIZES), kv.SlidingWindowSpec(**SIZES, sliding_window=8)
MAMBA = kv.MambaSpec(block_size=32, shapes=((2, 2),), dtypes=(torch.float32,))
MLA = kv.MLAAttentionSpec(**{**SIZES, "num_kv_heads": 1})
CHUNKED = kv.ChunkedLocalAttentionSpec(**SIZES, attention_chunk_size=8)
CROSS = kv.CrossAttentionSpec(**SIZES)


def config(extra=None, transfer=None, parallel=None, speculative=None):
    """What the plug-in reads of a VllmConfig."""
    extra = {"blobs": tempfile.mkdtemp(), "cache": tempfile.mkdtemp(), **(extra or {})}
    said = {
        "kv_load_failure_policy": "fail",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
        **(transfer or {}),
    }
    ranks = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "world_size": 1, **(parallel or {})}
    method = Fake(method=speculative) if speculative else None
    return Fake(kv_transfer_config=Fake(**said), parallel_config=Fake(**ranks), speculative_config=method)


def caches(*groups):
    """A KVCacheConfig of groups; each is its layers' caches by name, or one cache for two layers."""
    made = []
    for number, group in enumerate(groups):
        if isinstance(group, dict):
            spec = kv.UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs=group)
            made.append(kv.KVCacheGroupSpec(list(group), spec))
        else:
            made.append(kv.KVCacheGroupSpec([f"layers.{number}.attn", f"layers.{number + 9}.attn"], group))
    return kv.KVCacheConfig(num_blocks=50, kv_cache_tensors=[], kv_cache_groups=made)


def attention(kind=Attention, **changes):
    """An attention layer without weights."""
    layer = kind.__new__(kind)
    made = {
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
        "num_kv_heads": 2,
        "head_size": 4,
        "head_size_v": 4,
    }
    made |= {"impl": Fake(do_kv_cache_update=None), "attn_backend": Fake(get_name=lambda: "ODD"), **changes}
    layer.__dict__.update(made)
    return layer


def layers(**changes):
    """Check two layers, the second one changed."""
    kind = changes.pop("kind", Attention)
    both = {"model.layers.1.attn": attention(kind, **changes), "model.layers.0.attn": attention()}
    return [share.layer for share, _ in writable_layers(both, both)]


def failing_worker():
    """A worker whose second write fails: what it reports, and what the scheduler's side does about it."""
    connector = ForewordConnector(config(), KVConnectorRole.WORKER, caches(FULL))
    connector._layers = [(LayerShare(0, 2, 4, 4), Fake(impl=Fake(), kv_cache=None))]
    connector._device = torch.device("cpu")
    connector._load = connector._host._load = lambda sha256: torch.zeros(40, 16)
    connector.bind_connector_metadata(Orders(loads=(Load(SHA, 1),)))
    connector.start_load_kv(None)
    report = None
    while report is None:
        report = connector.build_connector_worker_meta()
    writes = [Write(SHA, 32, 40, (7, 9)), Write("b" * 64, 0, 33, (3, 4))]
    connector.bind_connector_metadata(Orders(writes=writes, refused=["r"]))
    connector.start_load_kv(None)
    results = connector.get_transfer_results(set())
    errors = sorted(connector.get_block_ids_with_load_errors())
    refused = [*results.failed_recving, *results.finished_recving]
    return {"errors": errors, "loads": len(report.loaded), "refused": refused}


def failed_write():
    """What the scheduler's side evicts after a failed write."""
    connector = ForewordConnector(config(), KVConnectorRole.SCHEDULER, caches(FULL))
    evicted = []
    pool = Fake(evict_blocks=evicted.append, block_pool=None)
    connector.bind_kv_cache_manager(pool)
    connector.update_connector_output(Fake(kv_connector_worker_meta=None, invalid_block_ids=set()))
    connector.update_connector_output(Fake(kv_connector_worker_meta=Report(), invalid_block_ids={3}))
    return [len(found) for found in evicted]


def other_version():
    """The plug-in in another vLLM."""
    for name in [name for name in sys.modules if name.startswith("foreword.serve.vllm_")]:
        del sys.modules[name]
    vllm.__version__ = "0.34.0"
    import foreword.serve.vllm_connector  # noqa: F401


CASES = {
    "engine": lambda: check_engine(config(speculative="ngram")),
    "recompute": lambda: check_engine(config(transfer={"kv_load_failure_policy": "recompute"})),
    "producer": lambda: check_engine(config(transfer={"kv_role": "kv_producer"})),
    "eagle": lambda: check_engine(config(speculative="eagle")),
    "context parallel": lambda: check_engine(config(parallel={"decode_context_parallel_size": 2})),
    "full": lambda: check_caches(caches(FULL)),
    "sliding": lambda: check_caches(caches(SLIDING)),
    "head sizes": lambda: check_caches(caches({"layers.0.attn": FULL, "layers.1.attn": FULL})),
    "mamba": lambda: check_caches(caches({"layers.0.attn": FULL, "layers.1.mixer": MAMBA})),
    "latents": lambda: check_caches(caches(MLA)),
    "chunked": lambda: check_caches(caches(CHUNKED)),
    "cross": lambda: check_caches(caches(CROSS)),
    "groups": lambda: check_caches(caches(FULL, SLIDING)),
    "no cache": lambda: check_caches(caches()),
    "layers": layers,
    "shared": lambda: layers(kv_sharing_target_layer_name="model.layers.0.attn"),
    "encoder": lambda: layers(attn_type="encoder_only"),
    "mla layer": lambda: layers(kind=MLAAttention),
    "subclass": lambda: layers(kind=type("Odd", (Attention,), {})),
    "backend": lambda: layers(impl=Fake()),
    "twice": lambda: [writable_layers(both := {f"layers.0.attn{i}": attention() for i in "ab"}, both)],
    "unknown key": lambda: ForewordConnector(config({"blob": 1}), KVConnectorRole.WORKER, caches(FULL)),
    "failing worker": failing_worker,
    "failed write": failed_write,
    "other version": other_version,
}


def run(case):
    try:
        return {"value": case()}
    except ConfigError as error:
        return {"message": error.message, "hint": error.hint}


if __name__ == "__main__":
    print(json.dumps({name: run(case) for name, case in CASES.items()}))
