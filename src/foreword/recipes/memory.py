"""Whether runs fit the machine together, before they start: what a joint step needs, and the plan that fits.

What a run holds is counted from its shapes; what a forward keeps for its backward pass is measured on a few rows of the
task itself, so it holds for any architecture and for whatever way the forward takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreword.core.model import FrozenModel
from foreword.errors import ConfigError
from foreword.train.loss import Batch, micro_batches, step_gradients
from foreword.train.run import Run
from foreword.train.state import RunState
from foreword.train.strategy import choose_strategy
from foreword.train.tuners import ENCODERS, LowRank

PROBE_ROWS = 16
"""Rows of the measured forward at most."""
SLACK = 1.6
"""Over what is kept: gradients on their way back, temporaries, the allocator's leftovers (docs/sweeps.md)."""
OVERHEAD = 64 << 20
"""Bytes of a first step whatever its size: libraries, work space, the allocator (bench/joint.py --memory)."""
LEAVE_FREE = 0.1
"""Part of the free memory that a plan leaves."""
GB = 1 << 30
LEAST_TOKENS = 256
"""Micro-batches are not planned smaller than this."""
OPTIMIZER_COPIES = {"muon": 1, "adamw": 2, "adafactor": 0}
"""Further tensors of a parameter's size that an optimizer keeps; Adafactor keeps rows and columns."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that a joint step needs over the loaded base."""

    num_runs: int
    micro_tokens: int
    vectors: int
    """Parameters, gradients, optimizers, kept copies: grows with the runs."""
    blocks: int
    """Keys and values of the runs' blocks and what their backward pass keeps: grows with the runs."""
    activations: int
    """What a micro-batch keeps for its backward pass: grows with `micro_tokens`."""

    @property
    def total(self) -> int:
        """Bytes altogether, with the overhead of any step."""
        return self.vectors + self.blocks + self.activations + OVERHEAD

    def to_json(self) -> dict[str, int]:
        """Return a JSON-ready dict, the total included."""
        return {**dataclasses.asdict(self), "total": self.total}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a sweep runs: so many passes of at most so many runs, in micro-batches of so many tokens."""

    passes: int
    need: MemoryNeed
    """Of the largest pass."""
    free: int | None
    """Bytes free on the base's device; None where it cannot be told."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {"passes": self.passes, "free": self.free, "need": self.need.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryPlan:
        """Build the plan from `to_json`'s dict."""
        need = {key: value for key, value in data["need"].items() if key != "total"}
        return cls(data["passes"], MemoryNeed(**need), data["free"])


def plan_memory(
    base: FrozenModel,
    runs: Sequence[Run],
    *,
    micro_tokens: int,
    passes: int | None = 1,
    free: int | None = None,
    unit: int = 1,
) -> MemoryPlan:
    """Return the plan for `runs`; `passes` None chooses the fewest that fit, halving `micro_tokens` only where needed.

    `unit` runs stay in one pass together (a setting's seeds). `free` is measured where it is not given. Raises
    ConfigError naming what is needed, what is free, and the plan that fits.
    """
    free = free_memory(base.device) if free is None else free
    meter = Meter(base, runs)
    asked = MemoryPlan(passes or 1, meter.need(_pass_size(len(runs), passes or 1, unit), micro_tokens), free)
    if free is None or asked.need.total <= free * (1 - LEAVE_FREE):
        return asked
    fitting = _fitting(meter, len(runs), unit, micro_tokens, free)
    if passes is None and fitting is not None:
        return fitting
    size = _pass_size(len(runs), asked.passes, unit)
    raise ConfigError(
        f"{_count(size, 'run')} together need {show_bytes(asked.need.total)} over the base "
        f"({show_bytes(asked.need.vectors)} for vectors and optimizers, {show_bytes(asked.need.blocks)} for blocks, "
        f"{show_bytes(asked.need.activations)} for micro-batches of {micro_tokens:,} tokens), "
        f"{show_bytes(free)} are free",
        hint=_advice(meter, len(runs), unit, fitting),
    )


class Meter:
    """Knows what runs of one sweep need: shapes counted, activations measured once."""

    def __init__(self, base: FrozenModel, runs: Sequence[Run]) -> None:
        probes = {_kind(run): run for run in runs}
        measured = {kind: activation_bytes(base, run) for kind, run in probes.items()}
        self._per_token = max(per_token for per_token, _ in measured.values())
        self._tokens = [run.config.batch_size * run.config.accumulate * measured[_kind(run)][1] for run in runs]
        self._vectors = [vector_bytes(base, run) for run in runs]
        self._blocks = [self._block_bytes(base, run) for run in runs]

    def need(self, num_runs: int, micro_tokens: int) -> MemoryNeed:
        """Return what the `num_runs` largest runs need together."""
        tokens, vectors, blocks = (
            sum(sorted(values, reverse=True)[:num_runs]) for values in (self._tokens, self._vectors, self._blocks)
        )
        return MemoryNeed(
            num_runs, micro_tokens, vectors, blocks, round(SLACK * min(micro_tokens, tokens) * self._per_token)
        )

    def _block_bytes(self, base: FrozenModel, run: Run) -> int:
        positions = run.template.block(base.tokenizer).num_positions
        kept = 3 * base.spec.kv_bytes(positions, base.dtype.itemsize)  # as made, as cut from the graph, its gradient
        return round(kept + (0 if run.config.method == "kv" else SLACK * positions * self._per_token))


def activation_bytes(base: FrozenModel, run: Run) -> tuple[float, int]:
    """Measure a step on a few rows: bytes kept for the backward pass by padded token, and the longest row's tokens."""
    config = dataclasses.replace(run.config, max_train_rows=PROBE_ROWS, share=None)
    task = dataclasses.replace(run.task, config=dataclasses.replace(run.task.config, dev=None))
    plain = dataclasses.replace(config, best_by="loss", patience=None)
    state = RunState(base, dataclasses.replace(run, task=task, config=plain))
    rows = sorted(state.train, key=lambda row: len(row.ids))[-PROBE_ROWS:]
    part = list(micro_batches([(0, row) for row in rows], 1 << 30))[-1]
    longest = max(len(row.ids) for _, row in part)
    with saved_bytes(base) as peak:
        step_gradients(base, [Batch(state.tuner, [row for _, row in part])], 1 << 30, choose_strategy(base))
    return peak[0] / (longest * len(part)), longest


@contextmanager
def saved_bytes(base: FrozenModel) -> Iterator[list[int]]:
    """While active, the list's one number is the most bytes that autograd kept at once, the base's tensors left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*base.model.parameters(), *base.model.buffers()]}
    held: dict[int, int] = {}
    now, peak = [0], [0]

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            storage = tensor.untyped_storage()
            self.key = storage.data_ptr()
            self.size = 0 if self.key in own else storage.nbytes()
            held[self.key] = held.get(self.key, 0) + 1
            if held[self.key] == 1:
                now[0] += self.size
                peak[0] = max(peak[0], now[0])

        def __del__(self) -> None:
            held[self.key] -= 1
            if held[self.key] == 0:
                now[0] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield peak


def vector_bytes(base: FrozenModel, run: Run) -> int:
    """Return the bytes of a run's parameters, gradients, optimizer and kept copies (now, good, best), all float32."""
    num = run.template.num_left + run.template.num_after
    width = {
        "prompt": base.spec.embed_size,
        "prefix": base.spec.num_layers * base.spec.hidden_size,
        "kv": sum(layer.num_kv_heads * (layer.head_dim + layer.value_dim) for layer in base.spec.layers),
    }[run.config.method]
    with torch.device("meta"):
        start = torch.empty(num, width)
        encoder = (
            LowRank(start, run.config.rank) if run.config.encoder == "low_rank" else ENCODERS[run.config.encoder](start)
        )
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return 4 * (parameters * (2 + OPTIMIZER_COPIES[run.optimizer]) + 5 * num * width)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes free on a device: of a GPU with what torch holds unused, of this machine or its container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    known = [size for size in (_available(), _left_in_container()) if size is not None]
    return min(known) if known else None


def show_bytes(count: float) -> str:
    """Return bytes as text: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def _available() -> int | None:
    """Bytes that the kernel says are available; None where it has no such file."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _left_in_container() -> int | None:
    """Bytes left under the memory limit of this control group (version 2); None without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        return None if limit == "max" else max(0, int(limit) - int((folder / "memory.current").read_text()))
    except (OSError, ValueError):
        return None


def _kind(run: Run) -> tuple[str, bool]:
    """What decides how a forward goes: the method, and whether vectors stand behind the text."""
    return run.config.method, run.template.num_after > 0


def _pass_size(num_runs: int, passes: int, unit: int) -> int:
    """Return the runs of the largest pass, whole units each."""
    return unit * -(-(num_runs // unit) // passes)


def _fitting(meter: Meter, num_runs: int, unit: int, micro_tokens: int, free: int) -> MemoryPlan | None:
    """Return the plan with the fewest passes that fits, with the largest micro-batches among those."""
    tokens = [micro_tokens]
    while tokens[-1] // 2 >= LEAST_TOKENS:
        tokens.append(tokens[-1] // 2)
    for passes in range(1, num_runs // unit + 1):
        for count in tokens:
            need = meter.need(_pass_size(num_runs, passes, unit), count)
            if need.total <= free * (1 - LEAVE_FREE):
                return MemoryPlan(passes, need, free)
    return None


def _advice(meter: Meter, num_runs: int, unit: int, fitting: MemoryPlan | None) -> str:
    if fitting is None:
        least = meter.need(unit, LEAST_TOKENS)
        return (
            f"Not even {_count(unit, 'run')} in micro-batches of {LEAST_TOKENS} tokens fits, with "
            f"{show_bytes(least.total)}: use a smaller base or dtype, fewer vectors or shorter inputs."
        )
    size, need = _pass_size(num_runs, fitting.passes, unit), fitting.need
    return (
        f"What fits: --passes {fitting.passes} ({_count(size, 'run')} each) with --micro-tokens {need.micro_tokens}, "
        f"{show_bytes(need.total)}; --passes auto chooses so by itself."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
