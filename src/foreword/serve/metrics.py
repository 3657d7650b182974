"""What Prometheus sees. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from foreword.errors import ForewordError
from foreword.serve.backend import Backend, Timings
from foreword.serve.residents import Residents

UNKNOWN = "unknown"
OTHER = "other"
MAX_LABELS = 1000
"""Pairs of task and version that get series of their own; later ones are counted together as "other"."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self, backend: Backend, residents: Residents, *, max_labels: int = MAX_LABELS) -> None:
        self.registry = registry = CollectorRegistry()
        self._max_labels = max_labels
        self._labels: set[tuple[str, str]] = set()
        by_version = ("task", "version")
        self._requests = Counter(
            "foreword_requests", "HTTP requests that asked for an answer", (*by_version, "code"), registry=registry
        )
        self._prompt_tokens = Counter(
            "foreword_prompt_tokens", "Tokens of prompts, without prefixes", by_version, registry=registry
        )
        self._completion_tokens = Counter(
            "foreword_completion_tokens", "Tokens of answers", by_version, registry=registry
        )
        self._queue = _histogram("foreword_queue_seconds", "From submission to the first step", registry)
        self._first = _histogram("foreword_first_token_seconds", "From submission to the first token", registry)
        self._token = _histogram("foreword_token_seconds", "Mean time between tokens of an answer", registry)
        load = _histogram("foreword_load_seconds", "Loading a version", registry)
        residents.on_load = load.observe
        registry.register(_Gauges(backend, residents))

    def count(self, labels: tuple[str, str] | None, code: int) -> None:
        """Count a request that ended with an HTTP status; without labels its model is unknown."""
        self._requests.labels(*self._bounded(labels), str(code)).inc()

    def observe(self, labels: tuple[str, str], prompt_tokens: int, timings: Timings) -> None:
        """Count the tokens and times of a request that was submitted."""
        labels = self._bounded(labels)
        self._prompt_tokens.labels(*labels).inc(prompt_tokens)
        self._completion_tokens.labels(*labels).inc(timings.num_completion_tokens)
        if timings.queue_s is not None:
            self._queue.observe(timings.queue_s)
        for seconds in timings.first_token_s():
            self._first.observe(seconds)
        for seconds in timings.per_token_s():
            self._token.observe(seconds)

    def _bounded(self, labels: tuple[str, str] | None) -> tuple[str, str]:
        if labels is None:
            return UNKNOWN, ""
        if labels not in self._labels:
            if len(self._labels) >= self._max_labels:
                return OTHER, ""
            self._labels.add(labels)
        return labels


def _histogram(name: str, text: str, registry: CollectorRegistry, buckets: Sequence[float] = SECONDS) -> Histogram:
    return Histogram(name, text, buckets=buckets, registry=registry)


class _Gauges(Collector):
    """Numbers that are read when they are asked for."""

    def __init__(self, backend: Backend, residents: Residents) -> None:
        self.backend = backend
        self.residents = residents

    def collect(self) -> Iterator[Metric]:
        residents = self.residents
        yield GaugeMetricFamily("foreword_resident_prefixes", "Versions that are loaded", residents.num_resident)
        yield GaugeMetricFamily("foreword_resident_prefix_bytes", "Their keys and values", residents.num_bytes)
        yield CounterMetricFamily("foreword_loads", "Versions loaded", residents.counts.num_loads)
        yield CounterMetricFamily("foreword_unloads", "Versions unloaded", residents.counts.num_unloads)
        failures = CounterMetricFamily("foreword_load_failures", "Loads that failed, by error", labels=["error"])
        for kind, count in residents.counts.failures.items():
            failures.add_metric([kind], count)
        yield failures
        try:
            stats = self.backend.stats()
        except ForewordError:
            yield GaugeMetricFamily("foreword_backend_up", "Whether the engine works", 0)
            return
        yield GaugeMetricFamily("foreword_backend_up", "Whether the engine works", 1)
        yield GaugeMetricFamily("foreword_running", "Answers in generation", stats.num_running)
        yield GaugeMetricFamily("foreword_waiting", "Answers that wait for room", stats.num_waiting)
        if stats.num_kv_blocks is not None:
            yield GaugeMetricFamily("foreword_kv_blocks", "Blocks of the key/value pool", stats.num_kv_blocks)
        if stats.num_free_kv_blocks is not None:
            yield GaugeMetricFamily("foreword_free_kv_blocks", "Those that are free", stats.num_free_kv_blocks)
