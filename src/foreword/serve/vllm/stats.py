"""The plug-in's figures at vLLM's own /metrics and in its log: loads, failures, host memory."""

# mypy: disable-error-code="import-not-found, misc"
# (vLLM lives in an environment of its own)
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
COUNTERS = {
    "failures": "Versions that could not be fetched or loaded.",
    "refused": "Requests failed because their version could not be served as they asked.",
    "dropped": "Versions dropped from host memory.",
    "written": "Prompt positions written into pages instead of computed.",
}
GAUGES = {
    "resident": "Versions in host memory.",
    "host_bytes": "Host memory of the versions in the fullest worker.",
}


class ForewordStats(KVConnectorStats):
    """One interval: sums of COUNTERS, the latest GAUGES, and `load_seconds` of each load, from asked to resident."""

    def reset(self) -> None:
        """Forget the interval."""
        self.data.clear()

    def is_empty(self) -> bool:
        """Return whether nothing happened."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> ForewordStats:
        """Add a later interval."""
        for name, value in other.data.items():
            self.data[name] = value if name in GAUGES or name not in self.data else self.data[name] + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return one figure each, for vLLM's log."""
        figures = dict(self.data)
        seconds = figures.pop("load_seconds", [])
        return {"loads": len(seconds), "max_load_seconds": round(max(seconds, default=0.0), 4), **figures}


class ForewordMetrics(KVConnectorPromMetrics):
    """`vllm:foreword_…` at /metrics."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def per_engine(kind: Any, name: str, text: str, **options: Any) -> dict[int, Any]:
            metric = kind(name=f"vllm:foreword_{name}", documentation=text, labelnames=labelnames, **options)
            return create_metric_per_engine(metric, per_engine_labelvalues)  # type: ignore[no-any-return]

        self._counters = {name: per_engine(self._counter_cls, name, text) for name, text in COUNTERS.items()}
        self._gauges = {
            name: per_engine(self._gauge_cls, name, text, multiprocess_mode="mostrecent")
            for name, text in GAUGES.items()
        }
        self._seconds = per_engine(
            self._histogram_cls, "load_seconds", "From a version's first request to its residence.", buckets=BUCKETS
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take in one interval."""
        for name, value in transfer_stats_data.items():
            if name in COUNTERS:
                self._counters[name][engine_idx].inc(value)
            elif name in GAUGES:
                self._gauges[name][engine_idx].set(value)
            else:
                for seconds in value:
                    self._seconds[engine_idx].observe(seconds)
