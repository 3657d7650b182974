"""Cache hit rates of many tasks over several replicas, by simulation.

python bench/cache.py --json bench/results/cache.json     # under a minute; bench/scale_tables.py puts it into the docs

Requests ask for N tasks with Zipf popularity, independently of each other: task i with probability ~ 1 / i^alpha.

Host cache: each vLLM worker keeps compiled versions in host memory, least recently used out first, bounded in bytes. A
hit costs no fetch from the blob store. The gateway's choice of replica is simulated with its own hash and its own
bound (foreword.serve.engines.replicas); requests end in the order in which they came, a fixed number is in flight.

Block cache: vLLM's pool of KV blocks, block by block as vLLM 0.32 keeps it: a request takes the cached full blocks of
its task's prefix and fresh ones for the rest; at its end full blocks go to the back of the queue of free blocks, last
block first, and the block that is not full to its front; fresh blocks are taken from the front. A hit costs no copy
from host memory (plug-in), no prefill (embeddings).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from capacity import SHAPES
from hardware import describe

from foreword.serve.engines.replicas import FREE_LOAD, Replica
from foreword.serve.vllm.args import HOST_BYTES

SIMULATED = "Llama-3-8B"
TASKS = (10, 100, 1_000, 10_000, 100_000)
REPLICAS = (1, 4, 16)
ROUTINGS = ("random", "hash", "bounded")
ALPHAS = (0.8, 1.0, 1.2)
BALANCE = 1.25
"""The default of foreword.serve.engines.replicas.Pool."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The load. Not measured: chosen, and to be replaced by your own."""

    positions: int = 101
    """Of a version: 100 vectors behind one BOS token."""
    itemsize: int = 2
    host_bytes: int = HOST_BYTES
    pool_bytes: int = 32 * 2**30
    """KV cache of a vLLM replica; vLLM prints its own at the start."""
    block_size: int = 16
    own_tokens: int = 500
    """Of a request: its text and its answer."""
    in_flight: int = 32
    """Requests in flight per replica."""
    requests: int = 40_000
    warm_up: int = 40_000
    seed: int = 0


def zipf(num_tasks: int, alpha: float) -> np.ndarray:
    """Return the tasks' probabilities [N], the most popular first."""
    weights = np.arange(1, num_tasks + 1, dtype=np.float64) ** -alpha
    return weights / weights.sum()


def draw(probabilities: np.ndarray, count: int, seed: int) -> list[int]:
    """Return the tasks of `count` requests."""
    return np.random.default_rng(seed).choice(len(probabilities), size=count, p=probabilities).tolist()


class HostCache:
    """Versions of one replica by bytes, the least recently used out first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_bytes = 0
        self.held: OrderedDict[int, int] = OrderedDict()

    def use(self, task: int, size: int) -> bool:
        """Use a version, loaded first where need be; return whether it was there."""
        if task in self.held:
            self.held.move_to_end(task)
            return True
        self.held[task] = size
        self.num_bytes += size
        while self.num_bytes > self.capacity and len(self.held) > 1:
            self.num_bytes -= self.held.popitem(last=False)[1]
        return False


class BlockPool:
    """vLLM's KV blocks, by what they hold; only full blocks of a task's prefix can be found again.

    A request gives its last block back first, so of a prefix the first block is the last to go: what is left of it can
    be found from its beginning.
    """

    def __init__(self, num_blocks: int) -> None:
        self.blank = num_blocks
        """Blocks that hold nothing findable, at the front of the queue."""
        self.users: dict[Any, int] = {}
        """Requests that hold a cached block."""
        self.free: OrderedDict[Any, None] = OrderedDict()
        """Cached blocks that nobody holds, the next to be taken first."""
        self._serial = itertools.count()

    def begin(self, task: int, prefix_blocks: int, own_blocks: int, partial_blocks: int) -> tuple[int, list[Any]]:
        """Take a request's blocks; return how many of the prefix's were found, and what `end` needs."""
        keys: list[Any] = [(task, index) for index in range(prefix_blocks)]
        hits = 0
        for key in keys:
            if key in self.free:
                del self.free[key]
            elif key not in self.users:
                break
            self.users[key] = self.users.get(key, 0) + 1
            hits += 1
        keys += itertools.islice(self._serial, own_blocks)
        self._take(len(keys) - hits + partial_blocks)
        self.users.update(dict.fromkeys(keys[hits:], 1))
        return hits, keys

    def end(self, held: list[Any], partial_blocks: int) -> None:
        """Give a request's blocks back; one that is not full can never be found."""
        self.blank += partial_blocks
        for key in reversed(held):
            self.users[key] -= 1
            if not self.users[key]:
                del self.users[key]
                self.free[key] = None

    def _take(self, count: int) -> None:
        taken = min(count, self.blank)
        self.blank -= taken
        if count - taken > len(self.free):
            raise ValueError("the pool is too small for the requests in flight")
        for _ in range(count - taken):
            self.free.popitem(last=False)


class Router:
    """Chooses replicas: at random, or as the gateway does, by rendezvous hashing with or without its bound."""

    def __init__(self, routing: str, replicas: int, seed: int) -> None:
        self.routing = routing
        self.inflight = [0] * replicas
        self.total = 0
        self._replicas = [Replica(f"http://vllm-{index}:8000") for index in range(replicas)]
        self._order: dict[int, list[int]] = {}
        self._random = iter(())
        self._generator = np.random.default_rng(seed)

    def choose(self, task: int) -> int:
        """Return the replica of a request, which is then in flight there."""
        if self.routing == "random" or len(self.inflight) == 1:
            chosen = self._draw()
        else:
            order = self._order.get(task) or self._rank(task)
            chosen = order[0]
            if self.routing == "bounded":
                bound = max(FREE_LOAD, math.ceil(BALANCE * (1 + self.total) / len(order)))
                chosen = next((index for index in order if self.inflight[index] < bound), order[0])
        self.inflight[chosen] += 1
        self.total += 1
        return chosen

    def end(self, replica: int) -> None:
        """Note that a request ended."""
        self.inflight[replica] -= 1
        self.total -= 1

    def _rank(self, task: int) -> list[int]:
        ranks = [replica.rank(f"digest-{task}") for replica in self._replicas]
        order = self._order[task] = sorted(range(len(ranks)), key=ranks.__getitem__, reverse=True)
        return order

    def _draw(self) -> int:
        try:
            return next(self._random)
        except StopIteration:
            self._random = iter(self._generator.integers(len(self.inflight), size=4096).tolist())
            return next(self._random)


def simulate(
    tasks: Sequence[int], router: Router, in_flight: int, warm_up: int, use: Callable[[int, int], Any]
) -> list[tuple[int, Any]]:
    """Send requests through the router; return (replica, what `use(replica, task)` said) after the warm-up."""
    running: deque[int] = deque()
    found = []
    for index, task in enumerate(tasks):
        if len(running) >= in_flight * len(router.inflight):
            router.end(running.popleft())
        replica = router.choose(task)
        running.append(replica)
        said = use(replica, task)
        if index >= warm_up:
            found.append((replica, said))
    return found


def host_hits(
    tasks: Sequence[int], sizes: Sequence[int], router: Router, setting: Setting
) -> tuple[np.ndarray, np.ndarray]:
    """Return each request's hit (0 or 1) and its replica, after the warm-up."""
    caches = [HostCache(setting.host_bytes) for _ in router.inflight]
    found = simulate(
        tasks, router, setting.in_flight, setting.warm_up, lambda replica, task: caches[replica].use(task, sizes[task])
    )
    replicas, hits = zip(*found, strict=True)
    return np.array(hits, dtype=np.float64), np.array(replicas)


def block_hits(
    tasks: Sequence[int], router: Router, setting: Setting, num_blocks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many of each request's full prefix blocks were found, and its replica, after the warm-up."""
    full, total = setting.positions // setting.block_size, setting.positions + setting.own_tokens
    own, partial = total // setting.block_size - full, int(total % setting.block_size > 0)
    pools = [BlockPool(num_blocks) for _ in router.inflight]
    running: list[deque[list[Any]]] = [deque() for _ in router.inflight]

    def use(replica: int, task: int) -> int:
        while len(running[replica]) >= router.inflight[replica]:  # the router has seen these end
            pools[replica].end(running[replica].popleft(), partial)
        hits, held = pools[replica].begin(task, full, own, partial)
        running[replica].append(held)
        return hits

    replicas, hits = zip(*simulate(tasks, router, setting.in_flight, setting.warm_up, use), strict=True)
    return np.array(hits, dtype=np.float64), np.array(replicas)


def che(probabilities: np.ndarray, sizes: np.ndarray, capacity: float) -> float:
    """Return the hit ratio of an LRU cache under independent requests, by Che's approximation (JSAC 2002).

    A task is there iff it was asked for within the last T requests; T solves sum s_i (1 - exp(-p_i T)) = capacity.
    """
    if sizes.sum() <= capacity:
        return 1.0

    def filled(length: float) -> float:
        return float((sizes * -np.expm1(-probabilities * length)).sum())

    low, high = 0.0, 1.0
    while filled(high) < capacity:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if filled(middle) < capacity else (low, middle)
    return float((probabilities * -np.expm1(-probabilities * high)).sum() / probabilities.sum())


def spread(replicas: np.ndarray, count: int) -> float:
    """Return the busiest replica's requests over the mean."""
    return float(np.bincount(replicas, minlength=count).max() * count / len(replicas))


def cases(alphas: Iterable[float]) -> Iterable[tuple[float, int, int, str]]:
    """Yield (alpha, tasks, replicas, routing); other alphas than 1 with four replicas only."""
    for alpha, num_tasks, replicas in itertools.product(alphas, TASKS, REPLICAS):
        if alpha == 1.0 or replicas == 4:
            for routing in ROUTINGS if replicas > 1 else ("one",):
                yield alpha, num_tasks, replicas, routing


def host_table(setting: Setting) -> list[dict[str, Any]]:
    size = SHAPES[SIMULATED].kv_bytes(setting.positions, setting.itemsize)
    rows = []
    for alpha, num_tasks, replicas, routing in cases(ALPHAS):
        probabilities = zipf(num_tasks, alpha)
        tasks = draw(probabilities, setting.warm_up + setting.requests, setting.seed)
        router = Router(routing, replicas, setting.seed + 1)
        hits, where = host_hits(tasks, [size] * num_tasks, router, setting)
        row = {"alpha": alpha, "tasks": num_tasks, "replicas": replicas, "routing": routing}
        row |= {"hit": float(hits.mean()), "busiest": spread(where, replicas)}
        if routing in ("one", "random"):
            row["che"] = che(probabilities, np.full(num_tasks, float(size)), setting.host_bytes)
        rows.append(row)
    return rows


def block_table(setting: Setting) -> list[dict[str, Any]]:
    spec, full = SHAPES[SIMULATED], setting.positions // setting.block_size
    num_blocks = setting.pool_bytes // spec.kv_bytes(setting.block_size, setting.itemsize)
    short = dataclasses.replace(setting, requests=setting.requests // 3, warm_up=setting.warm_up // 3)
    rows = []
    for num_tasks, (replicas, routing) in itertools.product(TASKS, [(1, "one"), (4, "random"), (4, "bounded")]):
        per_replica = dataclasses.replace(short, warm_up=short.warm_up * replicas, requests=short.requests)
        tasks = draw(zipf(num_tasks, 1.0), per_replica.warm_up + per_replica.requests, setting.seed)
        hits, _ = block_hits(tasks, Router(routing, replicas, setting.seed + 1), per_replica, num_blocks)
        row = {"alpha": 1.0, "tasks": num_tasks, "replicas": replicas, "routing": routing}
        rows.append(row | {"num_blocks": num_blocks, "hit": float(hits.mean() / full)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, default=Setting.requests)
    options = parser.parse_args()
    setting = Setting(requests=options.requests, warm_up=options.requests)
    began = time.perf_counter()
    result = {
        "what": "cache hit rates under Zipf traffic, simulated",
        "hardware": describe("numpy"),
        "setting": dataclasses.asdict(setting) | {"shape": SIMULATED, "balance": BALANCE},
        "host_cache": host_table(setting),
        "block_cache": block_table(setting),
    }
    result["seconds"] = round(time.perf_counter() - began, 1)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
