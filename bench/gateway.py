"""What the gateway adds: the same streaming load sent to an engine directly and through `foreword serve`.

python bench/gateway.py --json bench/results/gateway.json

The engine is a stub that streams like vLLM (bench/load.py), so that nothing but the gateway differs. The gateway runs
alone on one core; the stub and the generator share the other. Both ways are loaded in turns, with keys, limits, a
published task and metrics on, as in production.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hardware import describe
from load import Load, Timing

BENCH = Path(__file__).parent
TOKENS = 16


@contextlib.contextmanager
def process(*command: str, core: int, ready: str = "", **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run a command on one core until the block ends; yields it and the first line of its output that has `ready`."""
    log = tempfile.TemporaryFile()
    running = subprocess.Popen(
        ["taskset", "-c", str(core), *command],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, **environment},
    )
    assert running.stdout is not None
    try:
        line = next((line for line in running.stdout if ready in line), None)
        if line is None:
            raise RuntimeError(f"{command[0]} ended with {running.wait()}")
        yield running, line.strip()
    finally:
        running.terminate()
        running.wait(30)


def publish(home: Path, base: Path) -> tuple[str, str, int]:
    """Publish a kv task; return its name, a tenant's key, and its positions."""
    import torch

    from foreword.core.artefact import ArtefactHeader, save_artefact
    from foreword.core.model import load_base
    from foreword.core.template import TaskTemplate
    from foreword.registry.store import Registry

    frozen = load_base(str(base))
    template = TaskTemplate("{soft:20}{input}", chat=True)
    header = ArtefactHeader(
        method="kv",
        task="bench",
        block=template.block(frozen.tokenizer),
        base=frozen.fingerprint,
        spec=frozen.spec,
        template=template.to_json(),
        max_new_tokens=TOKENS,
    )
    tensors = {name: torch.randn(shape) * 0.1 for name, shape in header.tensor_shapes().items()}
    with Registry.open(home) as registry, tempfile.TemporaryDirectory() as folder:
        save_artefact(Path(folder) / "a.safetensors", header, tensors)
        registry.publish(Path(folder) / "a.safetensors")
        access = registry.access
        access.create_tenant("team")
        access.grant("team", "bench", "call")
        return "bench", access.create_key("team")[1], header.block.num_positions


def figures(timings: list[Timing], rate: float) -> dict[str, Any]:
    """Return the milliseconds of the requests that succeeded."""
    good = [timing for timing in timings if timing.status == 200]

    def ms(values: list[float]) -> dict[str, float]:
        ordered = sorted(values)
        return {
            "median": 1e3 * statistics.median(ordered),
            "p99": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        }

    return {
        "requests": len(timings),
        "failed": len(timings) - len(good),
        "rate": rate,
        "first_token_ms": ms([timing.first for timing in good]),
        "whole_ms": ms([timing.last for timing in good]),
    }


def rss_bytes(pid: int) -> int:
    """Return a process's resident memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def latency(direct: Load, via: Load, bodies: tuple[bytes, bytes], args: argparse.Namespace) -> dict[str, Any]:
    """Load both ways in turns; return each way's figures and what the gateway adds."""
    found: dict[str, list[Timing]] = {"direct": [], "gateway": []}
    for load, body in ((direct, bodies[0]), (via, bodies[1])):  # warm both
        await load.open_loop(body, rate=args.rate, seconds=2, seed=99)
    for turn in range(args.turns):
        for name, load, body in (("direct", direct, bodies[0]), ("gateway", via, bodies[1])):
            found[name] += await load.open_loop(body, rate=args.rate, seconds=args.seconds, seed=turn)
    result: dict[str, Any] = {name: figures(timings, args.rate) for name, timings in found.items()}
    for part in ("first_token_ms", "whole_ms"):
        result[f"added_{part}"] = {
            key: result["gateway"][part][key] - result["direct"][part][key] for key in ("median", "p99")
        }
    return result


async def open_streams(via: Load, body: bytes, count: int, pid: int) -> dict[str, Any]:
    """Hold `count` streams open at once; return the gateway's memory before and with them."""
    before = rss_bytes(pid)
    tasks = [asyncio.ensure_future(via.ask(body)) for _ in range(count)]
    peak = before
    while not all(task.done() for task in tasks):
        peak = max(peak, rss_bytes(pid))
        await asyncio.sleep(0.05)
    timings = await asyncio.gather(*tasks)
    good = sum(timing.status == 200 for timing in timings)
    return {"streams": count, "answered": good, "rss_before": before, "rss_peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=BENCH.parent / "src" / "foreword" / "demo" / "base-3m")
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--interval", type=float, default=0.01, help="seconds between the stub's tokens")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    os.sched_setaffinity(0, {1})
    home = Path(tempfile.mkdtemp(prefix="foreword-bench-"))
    name, key, positions = publish(home, args.base)
    with process(sys.executable, str(BENCH / "load.py"), "0", str(args.interval), core=1) as (_, port):
        command = ["-m", "foreword", "serve", "--base", str(args.base), "--vllm", f"http://127.0.0.1:{port}"]
        command += ["--home", str(home), "--port", "0", "--require-keys", "--json", "--max-inflight", "2048"]
        with process(sys.executable, *command, core=0, ready='"ready"') as (gateway, line):
            gateway_port = int(json.loads(line)["url"].rsplit(":", 1)[1])
            prompt = "Where is order 29412? It should have come on Saturday, and nobody can tell me anything about it."
            ids = list(range(5, 5 + positions + 30))
            sampling = {"max_tokens": TOKENS, "temperature": 0, "stream": True}
            bodies = (
                json.dumps({"model": "base", "prompt": ids, **sampling}).encode(),
                json.dumps({"model": name, "prompt": prompt, **sampling}).encode(),
            )
            direct = Load("127.0.0.1", int(port))
            via = Load("127.0.0.1", gateway_port, headers={"authorization": f"Bearer {key}"})

            async def all_parts() -> dict[str, Any]:
                used, started = cpu_s(gateway.pid), time.perf_counter()
                result = await latency(direct, via, bodies, args)
                result["gateway_cpu_share"] = (cpu_s(gateway.pid) - used) / (time.perf_counter() - started)
                long = json.dumps({"model": name, "prompt": prompt, **sampling, "max_tokens": 400}).encode()
                result["open_streams"] = await open_streams(via, long, args.streams, gateway.pid)
                direct.close()
                via.close()
                return result

            result = asyncio.run(all_parts())
    result = {"hardware": describe("fastapi", "uvicorn", "aiohttp"), "tokens": TOKENS, **result}
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
