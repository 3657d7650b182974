"""The simulation of bench/cache.py against what is known: exact results, the gateway's own code, vLLM's own blocks."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from foreword.serve.engines.replicas import Facts, Pool, Replica
from foreword.serve.versions.residents import Residents
from foreword.serve.vllm.versions import Answer, Fetched, Versions
from foreword.serve.vllm.wire import Wanted, scope_of
from tests.serve.fakes import FakeBackend, FakeRegistry, version
from tests.vllm.server import environment

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import cache  # noqa: E402
import scale_tables  # noqa: E402

DEVIATIONS = 4.5
"""Of a normal mean: a right simulation is farther off with probability 7e-6; the seeds are fixed."""


def standard_error(hits: np.ndarray, batches: int = 40) -> float:
    """Return the standard error of the mean of a correlated series, by batch means."""
    means = hits[: len(hits) // batches * batches].reshape(batches, -1).mean(axis=1)
    return float(means.std(ddof=1) / np.sqrt(batches))


def lru_hits(tasks: Sequence[int], sizes: Sequence[int], capacity: int, warm_up: int) -> np.ndarray:
    held = cache.HostCache(capacity)
    return np.array([held.use(task, sizes[task]) for task in tasks], dtype=np.float64)[warm_up:]


def test_an_lru_cache_hits_as_king_proved() -> None:
    """King (1971): the cache holds (i, j, k), latest first, with probability p_i p_j/(1-p_i) p_k/(1-p_i-p_j)."""
    probabilities, places = cache.zipf(7, 1.0), 3
    exact = 0.0
    for held in itertools.permutations(range(7), places):
        left, chance = 1.0, 1.0
        for task in held:
            chance *= probabilities[task] / left
            left -= probabilities[task]
        exact += chance * (1 - left)
    hits = lru_hits(cache.draw(probabilities, 60_000, seed=3), [1] * 7, places, warm_up=1000)
    assert abs(hits.mean() - exact) < DEVIATIONS * standard_error(hits)


@pytest.mark.parametrize("alpha", [0.8, 1.2])
def test_versions_of_many_sizes_hit_as_che_says(alpha: float) -> None:
    num_tasks, capacity = 3000, 40_000
    probabilities = cache.zipf(num_tasks, alpha)
    sizes = np.random.default_rng(5).choice([20, 50, 100, 200], size=num_tasks)
    hits = lru_hits(cache.draw(probabilities, 60_000, seed=6), sizes.tolist(), capacity, warm_up=20_000)
    predicted = cache.che(probabilities, sizes.astype(float), capacity)
    assert abs(hits.mean() - predicted) < DEVIATIONS * standard_error(hits)


NUM_TASKS, CAPACITY = 60, 400
SIZES = np.random.default_rng(1).integers(1, 40, size=NUM_TASKS).tolist()
TASKS = cache.draw(cache.zipf(NUM_TASKS, 0.9), 3000, seed=2)


def simulated_loads() -> list[int]:
    held = cache.HostCache(CAPACITY)
    loads = [task for task in TASKS if not held.use(task, SIZES[task])]
    assert NUM_TASKS < len(loads) < len(TASKS)  # some were dropped, and some found
    return loads


def test_the_cache_loads_when_the_gateways_residents_load() -> None:
    class Sized(FakeBackend):
        async def load(self, sha256: str, path: Path) -> int:
            await super().load(sha256, path)
            return SIZES[int(sha256)]

    versions = [version(f"task-{index}", 1, sha256=str(index)) for index in range(NUM_TASKS)]
    backend = Sized()

    async def main() -> None:
        held = Residents(backend, FakeRegistry(*versions).path, max_bytes=CAPACITY)
        for task in TASKS:
            (await held.acquire(versions[task])).release()

    asyncio.run(main())
    assert [int(line.split()[1]) for line in backend.log if line.startswith("load")] == simulated_loads()


def test_the_cache_loads_when_the_plug_in_loads() -> None:
    digests = [f"{index:064x}" for index in range(NUM_TASKS)]
    loads: list[int] = []

    def fetch(sha256: str) -> Fetched:
        loads.append(int(sha256, 16))
        return Fetched(num_positions=101, num_bytes=SIZES[int(sha256, 16)])

    ticks = itertools.count()
    versions = Versions(
        fetch, num_workers=1, host_bytes=CAPACITY, idle_s=1e9, timeout_s=1e9, clock=lambda: float(next(ticks))
    )
    for task in TASKS:
        wanted = Wanted(digests[task], 101, scope_of(""))
        while versions.ask(wanted, "request", num_cached=96) is not Answer.READY:
            versions.background.progress.wait(10)
            ordered, _ = versions.plan(keep=set())
            versions.report(dict.fromkeys(ordered, 1), {})
    assert loads == simulated_loads()


def test_the_router_chooses_as_the_gateways_pool_does() -> None:
    async def probe(replica: Replica) -> Facts:
        raise NotImplementedError

    router = cache.Router("bounded", 5, seed=0)
    pool = Pool([f"http://vllm-{index}:8000" for index in range(5)], probe, balance=cache.BALANCE)
    for replica in pool.replicas:
        replica.is_up, replica.facts = True, Facts(model="base", max_model_len=None)
    running: list[int] = []
    tasks = cache.draw(cache.zipf(30, 1.0), 2000, seed=4)
    for task in tasks:
        chosen = pool.attempt(f"digest-{task}").replica
        assert router.choose(task) == pool.replicas.index(chosen)
        chosen.inflight += 1
        running.append(pool.replicas.index(chosen))
        if len(running) > 100:
            ended = running.pop(0)
            router.end(ended)
            pool.replicas[ended].inflight -= 1
    assert max(router.inflight) > min(router.inflight)


def simulated_blocks(given: dict[str, object], tasks: Sequence[int]) -> list[int]:
    setting = cache.Setting(
        positions=given["positions"],
        own_tokens=given["own_tokens"],
        block_size=given["block_size"],
        in_flight=given["in_flight"],
        warm_up=0,
    )
    hits, _ = cache.block_hits(tasks, cache.Router("one", 1, seed=0), setting, given["num_blocks"])
    return [int(hit) for hit in hits]


@pytest.mark.vllm
@pytest.mark.parametrize(("positions", "own_tokens"), [(101, 60), (96, 64), (40, 7)])
def test_blocks_are_found_when_vllm_finds_them(positions: int, own_tokens: int) -> None:
    given = {"positions": positions, "own_tokens": own_tokens, "block_size": 16, "in_flight": 6, "num_blocks": 200}
    tasks = cache.draw(cache.zipf(40, 1.0), 1500, seed=8)
    script = Path(__file__).with_name("replay_blocks.py")
    done = subprocess.run(
        [environment() / "bin/python", script],
        input=json.dumps(given | {"tasks": tasks}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < sum(found) < len(tasks) * (positions // 16)
    assert simulated_blocks(given, tasks) == found


def test_no_block_is_lost_or_made() -> None:
    pool, held = cache.BlockPool(90), []
    for task in cache.draw(cache.zipf(20, 1.0), 500, seed=9):
        held.append(pool.begin(task, 3, 5, 1)[1])
        if len(held) > 6:
            pool.end(held.pop(0), 1)
        assert pool.blank + len(pool.free) + len(pool.users) + len(held) == 90
    with pytest.raises(ValueError, match="too small"):
        for task in range(100):
            pool.begin(task, 3, 5, 1)


def test_the_pages_tables_are_those_of_the_results() -> None:
    page = (BENCH.parent / "docs/scale.md").read_text()
    assert scale_tables.replaced(page, BENCH / "results") == page
