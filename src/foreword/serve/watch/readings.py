"""Two pages of `/metrics` in, rates and quantiles out: what `foreword top` shows. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from foreword.errors import ServeError

Labels = Mapping[str, str]
Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Page:
    """One page of metrics."""

    when: float
    """Seconds, by any clock that nobody sets."""
    samples: Mapping[str, Mapping[Key, float]]
    """By name, then by labels (sorted pairs)."""

    def values(self, name: str) -> Iterable[tuple[Labels, float]]:
        """Yield the samples of a name."""
        for key, value in self.samples.get(name, {}).items():
            yield dict(key), value

    def value(self, name: str) -> float | None:
        """Return a number that has no labels; None where it is not there."""
        return self.samples.get(name, {}).get(())


def parse_page(text: str, when: float) -> Page:
    """Read Prometheus' text format. Raises ServeError where it is none, or not a gateway's."""
    from prometheus_client.parser import text_string_to_metric_families

    samples: dict[str, dict[Key, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for found in family.samples:
                samples.setdefault(found.name, {})[tuple(sorted(found.labels.items()))] = float(found.value)
    except (ValueError, KeyError, IndexError) as error:
        raise ServeError(f"the page is no Prometheus text: {error}", hint="Give the URL of `foreword serve`.") from None
    if "foreword_build_info" not in samples:
        raise ServeError(
            "the page has no metrics of foreword",
            hint="Give the URL of `foreword serve`, without a path; a page of an engine or an exporter is another one.",
        )
    return Page(when, samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Of times, in seconds; None where nothing was measured."""

    p50: float | None = None
    p95: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionView:
    """One version's traffic; rates are per second."""

    task: str
    version: str
    requests: float
    errors: float
    prompt_tokens: float
    completion_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """One task's traffic; the most asked version first."""

    task: str
    requests: float
    first_token: Quantiles
    token: Quantiles
    versions: list[VersionView]


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantView:
    """One tenant's traffic, and its use against its limits."""

    tenant: str
    requests: float
    errors: float
    tokens: float
    refusals: float
    use: dict[str, float]
    """By limit: requests and tokens of the last minute, requests that run."""
    limits: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One replica of the engine."""

    replica: str
    state: str
    inflight: float
    failures: float
    """Per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryView:
    """A task's canary; rates are per second."""

    task: str
    canary: float
    stable: float
    failed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowView:
    """A task's shadow candidate; rates are per second."""

    task: str
    version: str
    agreed: float
    differed: float
    failed: float
    dropped: float


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The gateway over the last `seconds`; rates are per second, the most asked first."""

    version: str
    seconds: float
    requests: float
    errors: dict[str, float]
    """By kind."""
    prompt_tokens: float
    completion_tokens: float
    running: float | None
    waiting: float | None
    open_streams: float | None
    is_engine_up: bool
    first_token: Quantiles
    token: Quantiles
    queue: Quantiles
    loads: float
    load_failures: float
    resident_bytes: float
    residents: dict[str, float]
    """Bytes by version, the largest first."""
    snapshot_age_s: float | None
    auth_failures: float
    tasks: list[TaskView] = field(default_factory=list)
    tenants: list[TenantView] = field(default_factory=list)
    replicas: list[ReplicaView] = field(default_factory=list)
    canaries: list[CanaryView] = field(default_factory=list)
    shadows: list[ShadowView] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return dataclasses.asdict(self)


class Window:
    """The pages of the last seconds; what happened meanwhile is the difference of the newest and the oldest."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._pages: deque[Page] = deque()

    def add(self, page: Page) -> None:
        """Add the newest page; those that are not needed go."""
        self._pages.append(page)
        while len(self._pages) > 2 and page.when - self._pages[1].when >= self.seconds:
            self._pages.popleft()

    def view(self) -> View | None:
        """Return what happened; None where there are less than two pages."""
        if len(self._pages) < 2:
            return None
        return view(self._pages[0], self._pages[-1])


class _Change:
    """What happened between two pages. A counter that went back began anew, as the gateway did."""

    def __init__(self, old: Page, new: Page) -> None:
        self.old, self.new = old, new
        self.seconds = max(new.when - old.when, 1e-9)

    def rates(self, name: str, by: Callable[[Labels], Any]) -> dict[Any, float]:
        """Return per second how much the counters of a name went up, summed by `by` of their labels."""
        before = self.old.samples.get(name, {})
        found: dict[Any, float] = {}
        for key, value in self.new.samples.get(name, {}).items():
            last = before.get(key, 0.0)
            group = by(dict(key))
            found[group] = found.get(group, 0.0) + (value - last if value >= last else value) / self.seconds
        return found

    def rate(self, name: str) -> float:
        """Return per second how much all counters of a name went up."""
        return sum(self.rates(name, lambda labels: None).values())

    def quantiles(self, name: str) -> dict[str | None, Quantiles]:
        """Return the quantiles of a histogram by task, and under None those of all tasks together."""
        buckets: dict[str | None, dict[float, float]] = {None: {}}
        rates = self.rates(f"{name}_bucket", lambda labels: (labels["task"], float(labels["le"])))
        for (task, bound), rate in rates.items():
            for group in (task, None):
                found = buckets.setdefault(group, {})
                found[bound] = found.get(bound, 0.0) + rate
        return {task: Quantiles(p50=quantile(found, 0.5), p95=quantile(found, 0.95)) for task, found in buckets.items()}


def quantile(buckets: Mapping[float, float], q: float) -> float | None:
    """Return a quantile of cumulative counts by upper bound, evenly spread within a bucket, as Prometheus does.

    What lies beyond the last finite bound is given as that bound; None where nothing was counted.
    """
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    wanted, lower, below = q * buckets[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= wanted and buckets[bound] > below:
            if bound == float("inf"):
                return lower
            return lower + (bound - lower) * (wanted - below) / (buckets[bound] - below)
        lower, below = bound, buckets[bound]
    return lower


def view(old: Page, new: Page) -> View:
    """Return what a gateway did between two of its pages."""
    change = _Change(old, new)
    first, token, queue = (change.quantiles(f"foreword_{name}_seconds") for name in ("first_token", "token", "queue"))
    by_kind = change.rates("foreword_errors_total", lambda labels: labels["kind"])
    bytes_by_version = {
        f"{labels['task']}@{labels['version']}": value
        for labels, value in new.values("foreword_resident_version_bytes")
    }
    return View(
        version=next((labels["version"] for labels, _ in new.values("foreword_build_info")), ""),
        seconds=change.seconds,
        requests=change.rate("foreword_requests_total"),
        errors=_sorted({kind: rate for kind, rate in by_kind.items() if rate > 0}),
        prompt_tokens=change.rate("foreword_prompt_tokens_total"),
        completion_tokens=change.rate("foreword_completion_tokens_total"),
        running=new.value("foreword_running"),
        waiting=new.value("foreword_waiting"),
        open_streams=new.value("foreword_open_streams"),
        is_engine_up=new.value("foreword_backend_up") == 1,
        first_token=first[None],
        token=token[None],
        queue=queue[None],
        loads=change.rate("foreword_loads_total"),
        load_failures=change.rate("foreword_load_failures_total"),
        resident_bytes=new.value("foreword_resident_prefix_bytes") or 0.0,
        residents=_sorted(bytes_by_version),
        snapshot_age_s=new.value("foreword_snapshot_age_seconds"),
        auth_failures=change.rate("foreword_auth_failures_total"),
        tasks=_tasks(change, first, token),
        tenants=_tenants(change),
        replicas=_replicas(change),
        canaries=_canaries(change),
        shadows=_shadows(change),
    )


def _sorted(rates: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(rates.items(), key=lambda entry: (-entry[1], entry[0])))


def _tasks(
    change: _Change, first: Mapping[str | None, Quantiles], token: Mapping[str | None, Quantiles]
) -> list[TaskView]:
    def by(labels: Labels) -> tuple[str, str]:
        return labels["task"], labels["version"]

    requests = change.rates("foreword_requests_total", by)
    errors = change.rates("foreword_errors_total", by)
    prompt = change.rates("foreword_prompt_tokens_total", by)
    completion = change.rates("foreword_completion_tokens_total", by)
    tasks: dict[str, list[VersionView]] = {}
    for (task, version), rate in sorted(requests.items(), key=lambda entry: (-entry[1], entry[0])):
        seen = VersionView(
            task=task,
            version=version,
            requests=rate,
            errors=errors.get((task, version), 0.0),
            prompt_tokens=prompt.get((task, version), 0.0),
            completion_tokens=completion.get((task, version), 0.0),
        )
        tasks.setdefault(task, []).append(seen)
    found = [
        TaskView(
            task=task,
            requests=sum(version.requests for version in versions),
            first_token=first.get(task, Quantiles()),
            token=token.get(task, Quantiles()),
            versions=versions,
        )
        for task, versions in tasks.items()
    ]
    return sorted(found, key=lambda task: (-task.requests, task.task))


def _tenants(change: _Change) -> list[TenantView]:
    def by(labels: Labels) -> str:
        return labels["tenant"]

    def held(name: str) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for labels, value in change.new.values(name):
            found.setdefault(labels["tenant"], {})[labels["limit"]] = value
        return found

    requests = change.rates("foreword_requests_total", by)
    errors = change.rates("foreword_errors_total", by)
    prompt = change.rates("foreword_prompt_tokens_total", by)
    completion = change.rates("foreword_completion_tokens_total", by)
    refusals = change.rates("foreword_refusals_total", by)
    use, limits = held("foreword_tenant_use"), held("foreword_tenant_limit")
    found = [
        TenantView(
            tenant=tenant,
            requests=requests.get(tenant, 0.0),
            errors=errors.get(tenant, 0.0),
            tokens=prompt.get(tenant, 0.0) + completion.get(tenant, 0.0),
            refusals=refusals.get(tenant, 0.0),
            use=use.get(tenant, {}),
            limits=limits.get(tenant, {}),
        )
        for tenant in (requests.keys() | refusals.keys() | use.keys() | limits.keys()) - {""}
    ]
    return sorted(found, key=lambda tenant: (-tenant.requests, tenant.tenant))


def _replicas(change: _Change) -> list[ReplicaView]:
    inflight = {labels["replica"]: value for labels, value in change.new.values("foreword_replica_inflight")}
    failures = change.rates("foreword_replica_failures_total", lambda labels: labels["replica"])
    return [
        ReplicaView(
            replica=labels["replica"],
            state=labels["state"],
            inflight=inflight.get(labels["replica"], 0.0),
            failures=failures.get(labels["replica"], 0.0),
        )
        for labels, value in change.new.values("foreword_replica_state")
        if value == 1
    ]


def _canaries(change: _Change) -> list[CanaryView]:
    rates = change.rates("foreword_canary_requests_total", lambda labels: (labels["task"], labels["route"]))
    return [
        CanaryView(task=task, **{route: rates.get((task, route), 0.0) for route in ("canary", "stable", "failed")})
        for task in sorted({task for task, _ in rates})
    ]


def _shadows(change: _Change) -> list[ShadowView]:
    rates = change.rates(
        "foreword_shadow_requests_total", lambda labels: (labels["task"], labels["version"], labels["outcome"])
    )
    return [
        ShadowView(
            task=task,
            version=version,
            agreed=rates.get((task, version, "agreed"), 0.0),
            differed=rates.get((task, version, "differed"), 0.0),
            failed=rates.get((task, version, "failed"), 0.0),
            dropped=sum(rates.get((task, version, f"dropped_{why}"), 0.0) for why in ("busy", "full")),
        )
        for task, version in sorted({(task, version) for task, version, _ in rates})
    ]
