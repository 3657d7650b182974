"""What Prometheus sees: counters by task, version and tenant, histograms by task. Imports no torch.

A request meets one object whose series are resolved already (`Metrics.series`); series that nobody has used for an
hour make room for new ones, and beyond the bound further ones are counted together as "other".
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from foreword.registry.access_records import Route
from foreword.serve.backend import Backend, Timings
from foreword.serve.versions import routes
from foreword.serve.versions.residents import Residents
from foreword.serve.watch.gauges import Gauges

UNKNOWN = "unknown"
OTHER = "other"
MAX_LABELS = 1000
"""Triples of task, version and tenant that get counters of their own."""
MAX_TASKS = 100
"""Tasks that get histograms of their own: about fifty series each."""
IDLE_S = 3600.0
"""After how long without a request a triple or a task makes room for another one."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Labels = tuple[str, str, str]
"""Task, version, tenant."""
Outcome = Literal["agreed", "differed", "failed", "dropped_busy", "dropped_full"]


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(
        self, backend: Backend, residents: Residents, *, max_labels: int = MAX_LABELS, max_tasks: int = MAX_TASKS
    ) -> None:
        self.registry = CollectorRegistry()
        who = ("task", "version", "tenant")
        self._requests = self._counter("requests", "HTTP requests that asked for an answer, by status", *who, "code")
        self._errors = self._counter("errors", "Requests that ended with an error, by its kind", *who, "kind")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, without prefixes", *who)
        self._completion_tokens = self._counter("completion_tokens", "Tokens of answers", *who)
        self._cached_tokens = self._counter("cached_tokens", "Prompt and prefix tokens that needed no prefill", *who)
        self._canary = self._counter(
            "canary_requests", "Requests of tasks with a canary, by who answered", "task", "route"
        )
        self._shadow = self._counter("shadow_requests", "Copies for a shadow candidate", "task", "version", "outcome")
        self._shadow_tokens = self._counter("shadow_tokens", "Tokens of copies", "task", "version", "kind")
        self._refusals = self._counter("refusals", "Requests beyond a tenant's limit", "tenant", "limit")
        self._auth_failures = self._counter("auth_failures", "Requests whose key was not accepted", "reason")
        self.open_streams = Gauge("foreword_open_streams", "Streamed answers on their way", registry=self.registry)
        self._queue = self._histogram("queue_seconds", "From submission to the first step", "task")
        self._first = self._histogram("first_token_seconds", "From submission to the first token", "task")
        self._token = self._histogram("token_seconds", "Mean time between tokens of an answer", "task")
        residents.on_load = self._histogram("load_seconds", "Loading a version").observe
        self.gauges = Gauges(backend, residents)
        self.registry.register(self.gauges)
        self._series: _Bounded[Labels, Series] = _Bounded(max_labels, lambda labels: Series(self, labels))
        self._times: _Bounded[str, Times] = _Bounded(max_tasks, lambda task: Times(self, task))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"foreword_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"foreword_{name}", text, labels, buckets=SECONDS, registry=self.registry)

    def series(self, labels: tuple[str, str] | None, tenant: str = "") -> Series:
        """Return the counters of a task's version and a tenant; without labels the model is unknown."""
        key = (UNKNOWN, "", tenant) if labels is None else (*labels, tenant)
        return self._series.get(key) or self._series.always((OTHER, "", OTHER if tenant else ""))

    def times(self, task: str) -> Times:
        """Return the histograms of a task."""
        return self._times.get(task) or self._times.always(OTHER)

    def count(self, labels: tuple[str, str] | None, code: int, *, kind: str = "", tenant: str = "") -> None:
        """Count a request that ended with an HTTP status, and with an error of this kind.

        `labels` are its task and version; None where its model is unknown.
        """
        series = self.series(labels, tenant)
        series.request(code).inc()
        if kind:
            series.error(kind).inc()

    def observe(
        self,
        labels: tuple[str, str],
        prompt_tokens: int,
        timings: Timings,
        *,
        tenant: str = "",
        cached_tokens: int = 0,
    ) -> None:
        """Count the tokens and times of a request that was submitted."""
        series, times = self.series(labels, tenant), self.times(labels[0])
        series.prompt_tokens.inc(prompt_tokens)
        series.completion_tokens.inc(timings.num_completion_tokens)
        series.cached_tokens.inc(cached_tokens)
        if timings.queue_s is not None:
            times.queue.observe(timings.queue_s)
        for seconds in timings.first_token_s():
            times.first.observe(seconds)
        for seconds in timings.per_token_s():
            times.token.observe(seconds)

    def routed(self, task: str, route: routes.Outcome) -> None:
        """Count a request of a task with a canary: who answered, "failed" where the stable one did for the canary."""
        self._canary.labels(task, route).inc()

    def shadowed(self, route: Route, outcome: Outcome) -> None:
        """Count a copy by what became of it."""
        self._shadow.labels(route.task, route.number, outcome).inc()

    def shadow_tokens(self, route: Route, prompt: int, completion: int) -> None:
        """Count the tokens of a copy, apart from those of clients."""
        self._shadow_tokens.labels(route.task, route.number, "prompt").inc(prompt)
        self._shadow_tokens.labels(route.task, route.number, "completion").inc(completion)

    def refused(self, tenant: str, limit: str) -> None:
        """Count a request beyond a tenant's limit; `limit` is the name of the field in `Limits`."""
        self._refusals.labels(tenant, limit).inc()

    def unauthenticated(self, reason: str) -> None:
        """Count a request whose key was not accepted."""
        self._auth_failures.labels(reason).inc()


class Series:
    """The counters of one task, version and tenant."""

    def __init__(self, metrics: Metrics, labels: Labels) -> None:
        self.prompt_tokens = metrics._prompt_tokens.labels(*labels)
        self.completion_tokens = metrics._completion_tokens.labels(*labels)
        self.cached_tokens = metrics._cached_tokens.labels(*labels)
        self._metrics = metrics
        self._labels = labels
        self._requests: dict[int, Counter] = {}
        self._errors: dict[str, Counter] = {}

    def request(self, code: int) -> Counter:
        """Return the counter of requests that ended with a status."""
        if code not in self._requests:
            self._requests[code] = self._metrics._requests.labels(*self._labels, code)
        return self._requests[code]

    def error(self, kind: str) -> Counter:
        """Return the counter of requests that ended with an error of a kind."""
        if kind not in self._errors:
            self._errors[kind] = self._metrics._errors.labels(*self._labels, kind)
        return self._errors[kind]

    def remove(self) -> None:
        """Forget them."""
        metrics = self._metrics
        for counter in (metrics._prompt_tokens, metrics._completion_tokens, metrics._cached_tokens):
            counter.remove(*self._labels)
        for code in self._requests:
            metrics._requests.remove(*self._labels, code)
        for kind in self._errors:
            metrics._errors.remove(*self._labels, kind)


class Times:
    """The histograms of one task."""

    def __init__(self, metrics: Metrics, task: str) -> None:
        self.queue = metrics._queue.labels(task)
        self.first = metrics._first.labels(task)
        self.token = metrics._token.labels(task)
        self._families = (metrics._queue, metrics._first, metrics._token)
        self._task = task

    def remove(self) -> None:
        """Forget them."""
        for family in self._families:
            family.remove(self._task)


Key = TypeVar("Key", bound=Hashable)
Held = TypeVar("Held", bound=Series | Times)


class _Bounded(Generic[Key, Held]):
    """Things by key, made on first use; `limit` at most, but for those that `always` is asked for."""

    def __init__(self, limit: int, make: Callable[[Key], Held]) -> None:
        self.limit = limit
        self._make = make
        self._held: dict[Key, Held] = {}
        self._used: OrderedDict[Key, float] = OrderedDict()  # the longest unused first
        self._always: dict[Key, Held] = {}

    def get(self, key: Key) -> Held | None:
        """Return the thing of a key, or None where all the room is in use."""
        now = time.monotonic()
        if (held := self._held.get(key)) is None:
            if len(self._held) >= self.limit and not self._make_room(now - IDLE_S):
                return None
            held = self._held[key] = self._make(key)
        self._used[key] = now
        self._used.move_to_end(key)
        return held

    def _make_room(self, limit: float) -> bool:
        key, used = next(iter(self._used.items()))
        if used > limit:
            return False
        del self._used[key]
        self._held.pop(key).remove()
        return True

    def always(self, key: Key) -> Held:
        """Return the thing of a key beside the bound; for a handful of keys."""
        if key not in self._always:
            self._always[key] = self._make(key)
        return self._always[key]
