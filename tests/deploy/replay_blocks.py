"""Replays requests through vLLM's own KVCacheManager; runs in vLLM's environment, JSON in, JSON out."""

import itertools
import json
import sys
from collections import deque

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

given = json.load(sys.stdin)
size = given["block_size"]
spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.float32)
config = KVCacheConfig(
    num_blocks=given["num_blocks"] + 1,  # one is vLLM's null block
    kv_cache_tensors=[],
    kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
)
init_none_hash(sha256)
manager = KVCacheManager(config, max_model_len=10_000, scheduler_block_size=size, hash_block_size=size)
hasher = get_request_block_hasher(size, sha256)
fresh = itertools.count(1)
running: deque[Request] = deque()
found = []
for index, task in enumerate(given["tasks"]):
    if len(running) >= given["in_flight"]:
        manager.free(running.popleft())
    prompt = [0] * given["positions"] + list(itertools.islice(fresh, given["own_tokens"]))
    request = Request(
        str(index), prompt, SamplingParams(max_tokens=1), None, cache_salt=f"salt-{task}", block_hasher=hasher
    )
    blocks, num_hit, *_ = manager.get_computed_blocks(request)
    assert manager.allocate_slots(request, len(prompt) - num_hit, num_hit, blocks) is not None
    running.append(request)
    found.append(num_hit // size)
print(json.dumps(found))
