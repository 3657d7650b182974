"""Numbers that are read when Prometheus asks for them: what is loaded, how the engine is, who used what. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import foreword
from foreword.errors import ForewordError
from foreword.serve.backend import Backend
from foreword.serve.engines.replicas import Pool, ReplicaState
from foreword.serve.http.openai_errors import snake
from foreword.serve.versions.residents import Residents

if TYPE_CHECKING:
    from foreword.serve.access.control import Control
    from foreword.serve.access.limits import Limiter
    from foreword.serve.versions.shadow import Shadows

STATES = ("up", "down", "draining", "resting", "trying")
"""Of a replica; resting: left alone after failures, trying: asked again with one request."""
METERED = ("requests_per_minute", "tokens_per_minute", "concurrent")
"""The fields of `Limits` whose use is known."""


class Gauges(Collector):
    """Reads a gateway's parts."""

    def __init__(self, backend: Backend, residents: Residents) -> None:
        self.backend = backend
        self.residents = residents
        self.control: Control | None = None
        self.limiter: Limiter | None = None
        self.shadows: Shadows | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield the numbers of this moment."""
        yield _info("build_info", "1; the gateway's version is a label", version=foreword.__version__)
        yield from self._residents()
        yield from self._engine()
        yield from _replicas(getattr(self.backend, "pool", None))
        if self.control is not None:
            yield from _tenants(self.control, self.limiter)
        if self.shadows is not None:
            yield GaugeMetricFamily("foreword_shadow_waiting", "Copies that wait", self.shadows.num_waiting)

    def _residents(self) -> Iterator[Metric]:
        residents, counts = self.residents, self.residents.counts
        yield GaugeMetricFamily("foreword_resident_prefixes", "Versions that are loaded", residents.num_resident)
        yield GaugeMetricFamily("foreword_resident_prefix_bytes", "Their keys and values", residents.num_bytes)
        sizes = GaugeMetricFamily(
            "foreword_resident_version_bytes", "Keys and values of a loaded version", labels=["task", "version"]
        )
        for version, num_bytes in residents.loaded():
            sizes.add_metric([version.task, str(version.number)], num_bytes)
        yield sizes
        yield CounterMetricFamily("foreword_loads", "Versions loaded", counts.num_loads)
        yield CounterMetricFamily("foreword_unloads", "Versions unloaded", counts.num_unloads)
        failures = CounterMetricFamily("foreword_load_failures", "Loads that failed, by its kind", labels=["kind"])
        for kind, count in counts.failures.items():
            failures.add_metric([snake(kind)], count)
        yield failures

    def _engine(self) -> Iterator[Metric]:
        try:
            self.backend.check()
            stats = self.backend.stats()
        except ForewordError:
            yield GaugeMetricFamily("foreword_backend_up", "Whether the engine works", 0)
            return
        yield GaugeMetricFamily("foreword_backend_up", "Whether the engine works", 1)
        yield GaugeMetricFamily("foreword_running", "Answers in generation", stats.num_running)
        yield GaugeMetricFamily("foreword_waiting", "Answers not in generation yet", stats.num_waiting)
        if stats.num_queued is not None:
            yield GaugeMetricFamily("foreword_queued", "Answers for which there is no room now", stats.num_queued)
        if stats.num_kv_blocks is not None:
            yield GaugeMetricFamily("foreword_kv_blocks", "Blocks of the key/value pool", stats.num_kv_blocks)
        if stats.num_free_kv_blocks is not None:
            yield GaugeMetricFamily("foreword_free_kv_blocks", "Those that are free", stats.num_free_kv_blocks)


def _replicas(pool: Pool | None) -> Iterator[Metric]:
    """Yield the replicas' states; nothing where the engine is in this process."""
    if pool is None:
        return
    state = GaugeMetricFamily("foreword_replica_state", "1 for the state that it is in", labels=["replica", "state"])
    inflight = GaugeMetricFamily("foreword_replica_inflight", "Requests in flight", labels=["replica"])
    failures = CounterMetricFamily("foreword_replica_failures", "Requests that it lost", labels=["replica"])
    retries = CounterMetricFamily(
        "foreword_replica_retries", "Requests that it was asked for after another one", labels=["replica"]
    )
    for replica in pool.states():
        for name in STATES:
            state.add_metric([replica.url, name], name == state_name(replica))
        inflight.add_metric([replica.url], replica.inflight)
        failures.add_metric([replica.url], replica.failures)
        retries.add_metric([replica.url], replica.retries)
    yield from (state, inflight, failures, retries)


def state_name(replica: ReplicaState) -> str:
    """Return a replica's state as one of STATES."""
    if not replica.is_up:
        return "down"
    if replica.is_draining:
        return "draining"
    return {"closed": "up", "open": "resting", "half-open": "trying"}[replica.breaker]


def _tenants(control: Control, limiter: Limiter | None) -> Iterator[Metric]:
    """Yield what tenants used of what they may, and how old what the gateway knows of them is."""
    age = GaugeMetricFamily("foreword_snapshot_age_seconds", "Since the registry last answered")
    if (age_s := control.age_s) is not None:
        age.add_metric([], age_s)
    yield age
    limits = GaugeMetricFamily("foreword_tenant_limit", "What a tenant may use", labels=["tenant", "limit"])
    for name, tenant in control.snapshot.tenants.items():
        for limit in METERED:
            if (most := getattr(tenant.limits, limit)) is not None:
                limits.add_metric([name, limit], most)
    yield limits
    use = GaugeMetricFamily("foreword_tenant_use", "What a tenant uses of it now", labels=["tenant", "limit"])
    for name, used in (limiter.usage() if limiter is not None else {}).items():
        for limit, amount in zip(METERED, (used.requests, used.tokens, used.running), strict=True):
            use.add_metric([name, limit], amount)
    yield use


def _info(name: str, text: str, **labels: str) -> Metric:
    family = GaugeMetricFamily(f"foreword_{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family
