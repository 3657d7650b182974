"""The vLLM plug-in: trained prompts and prefixes by name on a stock vLLM, as a KV connector.

    vllm serve <base> --kv-transfer-config '{"kv_connector": "ForewordConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "foreword.serve.vllm_connector",
        "kv_connector_extra_config": {"blobs": "s3://bucket/prefix"}}'

A request is N placeholder ids and its own ids, with `kv_transfer_params` and `cache_salt` as foreword.serve.vllm.wire
has them. Its first N positions are keys and values of a compiled file, which the attention backend's own writer puts
into the request's pages; vLLM's prefix cache then shares whole pages among requests of one version and one scope.

A request that cannot be served as it asks fails, alone: it is claimed as an asynchronous transfer which the workers
report as failed, so that no forward ever sees its placeholders and none of its blocks enters the prefix cache.
"""

# mypy: disable-error-code="import-not-found, misc"
# (vLLM lives in an environment of its own)
from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import vllm
from foreword.core.compiled import CompiledHeader, load_compiled, read_compiled_header
from foreword.errors import IncompatibleModel
from foreword.serve.vllm.blocks import (
    NO_BLOCK,
    HostCache,
    LayerShare,
    Load,
    Settings,
    Write,
    check_fits,
    check_version,
    describe,
    open_store,
    own_heads,
    pack,
    unpack,
)
from foreword.serve.vllm.versions import Answer, Asked, Fetched, Versions, read_request

check_version(vllm.__version__)  # before anything is imported that other versions may not have

from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank  # noqa: E402
from vllm.distributed.utils import get_pp_indices  # noqa: E402
from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: E402

from foreword.serve.vllm.checks import check_caches, check_engine, writable_layers  # noqa: E402
from foreword.serve.vllm.stats import ForewordMetrics, ForewordStats  # noqa: E402

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.foreword")
IDLE_WAIT_S = 0.005
"""So long a step without work waits for a fetch: the engine's loop would spin otherwise."""


@dataclass
class Orders(KVConnectorMetadata):
    """One step's orders to the workers."""

    writes: list[Write] = field(default_factory=list)
    drops: tuple[str, ...] = ()
    loads: tuple[Load, ...] = ()
    refused: list[str] = field(default_factory=list)
    """Requests to report as failed."""


@dataclass
class Report(KVConnectorWorkerMetadata):
    """What workers say of their loads: how many of them ended well, and why one failed."""

    loaded: dict[Load, int] = field(default_factory=dict)
    failed: dict[Load, str] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        """Add another worker's report."""
        assert isinstance(other, Report)
        return Report(Counter(self.loaded) + Counter(other.loaded), self.failed | other.failed)


class ForewordConnector(KVConnectorBase_V1):
    """See the module. One instance in the scheduler's process, one in every worker; `role` tells which."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_engine(vllm_config)
        self._block_size = check_caches(kv_cache_config)
        self._settings = Settings.from_extra(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._blobs = open_store(self._settings)
        if role is KVConnectorRole.SCHEDULER:
            self._asked: dict[str, Asked] = {}
            self._orders = Orders()
            self._figures: dict[str, Any] = {}
            self._versions = Versions(
                self._fetch,
                num_workers=vllm_config.parallel_config.world_size,
                host_bytes=self._settings.host_bytes,
                idle_s=self._settings.idle_s,
                timeout_s=self._settings.fetch_timeout_s,
            )
        else:
            self._layers: list[tuple[LayerShare, Any]] = []
            self._errors: set[int] = set()
            self._host = HostCache(self._load)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: nothing is handed on when a request ends."""
        return False

    # The scheduler's side. Nothing here may raise: that would end the engine for everybody.

    def on_new_request(self, request: Request) -> None:
        """Read a request's params, once."""
        asked = read_request(request)
        if asked is None:
            return
        self._asked[request.request_id] = asked
        request.skip_reading_prefix_cache = False  # else vLLM ignores the claim below, and computes the placeholders

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many positions after the engine's own cached ones will be written; None to be asked again."""
        asked = self._asked.get(request.request_id)
        if asked is None:
            return 0, False
        if asked.wanted is not None and not asked.refusal:
            answer = self._versions.ask(asked.wanted, request.request_id, num_computed_tokens)
            if answer is Answer.WAIT:
                return None, False
            asked.refused = answer is Answer.REFUSED
            if answer is Answer.READY:
                return max(0, asked.wanted.num_positions - num_computed_tokens), False
        # At most a page: more than any part of one that vLLM may have found in its own cache.
        return min(self._block_size, request.num_tokens - num_computed_tokens), True

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Note the pages of what was claimed."""
        asked = self._asked.get(request.request_id)
        if asked is None or num_external_tokens == 0:
            return
        if asked.refused or asked.wanted is None:
            logger.error("foreword: request %s fails: %s", request.request_id, asked.refusal or "see its version above")
            self._orders.refused.append(request.request_id)
            self._count("refused", 1)
            return
        self._count("written", num_external_tokens)
        stop = asked.wanted.num_positions
        pages = blocks.blocks[0][: -(-stop // self._block_size)]
        self._orders.writes.append(
            Write(
                asked.wanted.sha256,
                stop - num_external_tokens,
                stop,
                tuple(NO_BLOCK if page.is_null else page.block_id for page in pages),
            )
        )

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Orders:
        """Return this step's orders to the workers."""
        if not scheduler_output.total_num_scheduled_tokens and self._versions.fetching:
            self._versions.background.progress.wait(IDLE_WAIT_S)
        orders, self._orders = self._orders, Orders()
        orders.loads, orders.drops = self._versions.plan({write.sha256 for write in orders.writes})
        return orders

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take in what the workers report."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, Report):
            self._versions.report(report.loaded, report.failed)
        if connector_output.invalid_block_ids and self._kv_cache_manager is not None:
            # vLLM has failed the running requests with these pages. One that was aborted or preempted since has left
            # them, and pages computed on them, in the prefix cache.
            self._versions.drop_all("a write failed")
            self._kv_cache_manager.evict_blocks(set(range(self._kv_cache_config.num_blocks)))

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request, however it ended."""
        asked = self._asked.pop(request.request_id, None)
        if asked is not None and asked.wanted is not None:
            self._versions.forget(asked.wanted.sha256, request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Drop every version from host memory: vLLM's reset of external caches."""
        self._versions.drop_all("vLLM resets its caches")
        return True

    def get_kv_connector_stats(self) -> ForewordStats | None:
        """Return what happened since the last call: the scheduler's side knows it all."""
        if self.role is not KVConnectorRole.SCHEDULER:
            return None
        figures, self._figures = self._figures, {}
        figures |= self._versions.take_figures()
        return ForewordStats(figures) if figures else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ForewordStats:
        """Return figures that came from another process."""
        return ForewordStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> ForewordMetrics:
        """Return the metrics at /metrics."""
        return ForewordMetrics(*arguments)

    def _count(self, name: str, number: int) -> None:
        self._figures[name] = self._figures.get(name, 0) + number

    def _fetch(self, sha256: str) -> Fetched:
        """Bring a compiled file to this machine and check what the scheduler's side can (in the background)."""
        header = read_compiled_header(self._blobs.fetch(sha256))
        self._check_base(header)
        parallel = self._vllm_config.parallel_config
        layers = header.spec.layers
        widths = [
            len(own_heads(layer.num_kv_heads, 0, parallel.tensor_parallel_size)) * (layer.head_dim + layer.value_dim)
            for layer in layers
        ]
        stages = [
            sum(widths[slice(*get_pp_indices(len(layers), rank, parallel.pipeline_parallel_size))])
            for rank in range(parallel.pipeline_parallel_size)
        ]
        itemsize = self._vllm_config.model_config.dtype.itemsize
        return Fetched(header.num_positions, max(stages) * header.num_positions * itemsize)

    def _check_base(self, header: CompiledHeader) -> None:
        base = self._settings.base
        if base is not None and (difference := header.base.first_difference(base)):
            field_name, theirs, ours = difference
            raise IncompatibleModel(
                f"{header.task!r} was compiled for another base: {field_name} {theirs} there, {ours} here"
            )

    # The workers' side.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Note the layers of this worker. Raises ConfigError where one of them cannot be written."""
        layers = self._vllm_config.compilation_config.static_forward_context
        self._layers = writable_layers(layers, kv_caches)
        self._rank = get_tensor_model_parallel_rank()
        self._device = next(iter(kv_caches.values())).device

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Write the claimed positions into the pages of this step's requests; then drop and load versions."""
        orders = self._connector_metadata
        if not isinstance(orders, Orders):
            return
        held = [write for write in orders.writes if write.sha256 in self._host]
        failed = [write for write in orders.writes if write.sha256 not in self._host]
        try:
            if held:
                self._write(held)
        except Exception:
            logger.exception("foreword: cannot write %d prefixes", len(held))
            failed = orders.writes
        for write in failed:
            logger.error("foreword: %s was not written", write.sha256[:12])
            self._errors.update(write.pages(self._block_size))
        self._host.order(orders.loads, orders.drops)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: writes are ordered before the forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Report the refused requests as failed transfers."""
        orders = self._connector_metadata
        refused = set(orders.refused) if isinstance(orders, Orders) else set()
        return KVConnectorTransferResults(finished_recving=refused, failed_recving=set(refused))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the pages that were not written in this step."""
        errors, self._errors = self._errors, set()
        return errors

    def build_connector_worker_meta(self) -> Report | None:
        """Report the loads that ended."""
        loaded, failed = self._host.take()
        if not loaded and not failed:
            return None
        return Report(dict.fromkeys(loaded, 1), {load: describe(error) for load, error in failed.items()})

    def _load(self, sha256: str) -> Tensor:
        """Return this worker's rows [N, W] of a version (in the background)."""
        started = time.perf_counter()
        header, tensors = load_compiled(self._blobs.fetch(sha256), sha256=sha256)
        self._check_base(header)
        model, parallel = self._vllm_config.model_config, self._vllm_config.parallel_config
        shares = [share for share, _ in self._layers]
        size = parallel.tensor_parallel_size
        check_fits(header, shares, num_layers=model.get_total_num_hidden_layers(), size=size)
        rows = pack(tensors, shares, model.dtype, rank=self._rank, size=size)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):  # this thread's own would be the first one
                rows = rows.pin_memory()
        seconds = time.perf_counter() - started
        logger.info(
            "foreword: loaded %s of task %s: %d positions, %d bytes, %s from %s, %.1f ms",
            *(sha256[:12], header.task, header.num_positions, rows.nbytes, rows.dtype, header.dtype, seconds * 1e3),
        )
        return rows

    def _write(self, writes: list[Write]) -> None:
        rows, slots = self._host.gather(writes, self._block_size, self._device)
        shares = [share for share, _ in self._layers]
        for (_, layer), (key, value) in zip(self._layers, unpack(rows, shares), strict=True):
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
