"""What a method does to a deployment under given constraints: its costs at its own length, served as the engine can."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from foreword.advise.constraints import Constraints
from foreword.advise.cost.method_cost import Load, MethodCost, method_cost
from foreword.advise.methods import METHODS, Method

PROMPTS = ("prompt", "compiled_prompt")
DEEP = ("prefix", "kv")
VECTORS = (*PROMPTS, *DEEP)
"""Methods with P trained vectors, P by `num_vectors`."""
BROUGHT = ("compiled_prompt", "prefix", "kv", "cartridge")
"""Methods whose keys and values the engine is given, so nothing is prefilled."""
TEXT = ("hard_text", "few_shot")

FEW_ROWS = 100
"""Below it, more freedom than a few vectors before the first layer has is not learned but memorised."""
SHORT = 8
USUAL = 20
"""The project's default; dev rows decide about others."""
TAGGING = 64
"""About the geometric mean of the 11 to 224 in P-tuning v2's scripts for tagging, in whole blocks."""
HELD_OUT = 0.2
"""Share of the rows that is kept for judging."""
CARTRIDGE_RATIO = 32
"""Tokens of context per vector; the cartridges paper reports 38.6 times less memory at in-context quality."""
SHORTEST_CONTEXT = 512
"""The shortest chunk of text that cartridges are trained on; shorter texts are cheap to keep as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """A method's numbers as these constraints count them."""

    method: Method
    load: Load
    cost: MethodCost
    storage_bytes: float
    """All tasks."""
    device_bytes: float
    """What all tasks add on the accelerator: blocks shared by a task's requests, or weights."""
    prefill_s: float
    """Added before the first token by the engine."""
    wire_s: float
    """Added before the first token by the network."""
    per_token_s: float
    """Added to each decoding step of a full batch, and so to each token of everybody in it."""
    context_tokens: float
    """Positions that the method takes from a request."""
    wire_bytes: float
    update_hours: float
    """From a wanted change to its being live: training, evaluation, review."""
    carries_context: bool
    """Whether the shared context stands in the request as text, and its cost is counted in."""

    @property
    def first_token_s(self) -> float:
        """Everything added before the first token."""
        return self.prefill_s + self.wire_s

    def request_s(self, output_tokens: int) -> float:
        """Everything added to one request."""
        return self.first_token_s + output_tokens * self.per_token_s


def is_hybrid(constraints: Constraints) -> bool:
    """Whether editable words are to stand beside the vectors: a change must be live within two days."""
    return (constraints.limits.update_deadline_hours or math.inf) <= 48


def num_vectors(method: str, constraints: Constraints) -> int:
    """Return P of a method under these constraints: what the user set, else by rows and kind."""
    tasks = constraints.tasks
    if tasks.num_vectors is not None:
        return tasks.num_vectors
    if tasks.rows_per_task < FEW_ROWS:
        return SHORT
    if method in DEEP and tasks.kind in ("tagging", "new_skill", "new_knowledge"):
        return TAGGING
    return USUAL


def cartridge_vectors(constraints: Constraints) -> int:
    """Return P of a cartridge: a vector for 32 tokens of context, in whole blocks."""
    block = constraints.change.block_tokens
    return max(block, -(-constraints.tasks.shared_context_tokens // (CARTRIDGE_RATIO * block)) * block)


def load_of(method: str, constraints: Constraints) -> Load:
    """Return what `method_cost` is asked under these constraints; a method's own sizes alone, others stay as they are.

    So a change that touches one method leaves the costs of the others where they were kept.
    """
    tasks, traffic = constraints.tasks, constraints.traffic
    own: dict[str, int] = {}
    if method == "few_shot":
        shown = tasks.input_tokens + tasks.output_tokens
        own = {"few_shot_tokens": tasks.instruction_tokens + tasks.shots * shown}
    elif method == "hard_text":
        own = {"hard_tokens": tasks.instruction_tokens}
    elif method == "cartridge":
        own = {
            "cartridge_tokens": cartridge_vectors(constraints),
            "cartridge_context_tokens": max(tasks.shared_context_tokens, 1),
        }
    elif method in VECTORS:
        own = {"num_vectors": num_vectors(method, constraints)}
    return Load(
        num_tasks=tasks.count,
        input_tokens=tasks.input_tokens,
        output_tokens=tasks.output_tokens,
        batch=traffic.batch,
        rows=tasks.rows_per_task,
        block_tokens=constraints.change.block_tokens,
        eval_rows=max(1, int(tasks.rows_per_task * HELD_OUT)),
        **own,
    )


def effects_of(method: str, constraints: Constraints) -> Effects:
    """Return a method's effects; its numbers are 0 where the base cannot carry it (`cost.impossible` says so)."""
    load = load_of(method, constraints)
    cost = _cost(method, constraints.base, load, constraints.hardware)
    tasks, change = constraints.tasks, constraints.change
    cached = method in BROUGHT or change.prefix_cache
    wire = _value(cost, "wire_bytes_per_request")
    added = _Added(
        prefill_s=_prefill_s(method, cost, constraints, cached),
        per_token_s=_value(cost, "decode_s_per_token") * constraints.traffic.batch,
        context_tokens=_value(cost, "context_tokens"),
        kv_bytes=_value(cost, "kv_bytes_per_task" if cached else "kv_bytes_per_sequence"),
    )
    carries = tasks.shared_context_tokens > 0 and method != "cartridge"
    if carries:
        added = added.plus(_context_added(constraints))
    kept = added.kv_bytes * (tasks.count if cached else constraints.traffic.batch)
    weights = 0.0 if method in (*TEXT, *VECTORS, "cartridge") else _value(cost, "bytes_all_tasks")
    return Effects(
        method=METHODS[method],
        load=load,
        cost=cost,
        storage_bytes=_value(cost, "bytes_all_tasks"),
        device_bytes=kept + weights,
        prefill_s=added.prefill_s,
        wire_s=wire * 8 / (constraints.traffic.network_gbit_s * 1e9),
        per_token_s=added.per_token_s,
        context_tokens=added.context_tokens,
        wire_bytes=wire,
        update_hours=_value(cost, "tweak_hours") + change.review_hours,
        carries_context=carries,
    )


def _prefill_s(method: str, cost: MethodCost, constraints: Constraints, cached: bool) -> float:
    """Return the added prefill; of a beginning that the engine keeps, the positions behind the last whole block count.

    Keys and values that the engine is given are copied there, not computed.
    """
    if not cached:
        return _value(cost, "prefill_s_uncached")
    found, positions = _value(cost, "prefill_s_cached"), _value(cost, "context_tokens")
    if method in BROUGHT or not positions:
        return found
    beside = constraints.tasks.instruction_tokens if method == "prompt" and is_hybrid(constraints) else 0
    tail = min((positions + beside) % constraints.change.block_tokens, positions)
    return found + _value(cost, "prefill_dense_s") * tail / positions


@dataclass(frozen=True, slots=True, kw_only=True)
class _Added:
    """What a piece in front of the text adds to a request."""

    prefill_s: float
    per_token_s: float
    context_tokens: float
    kv_bytes: float

    def plus(self, other: _Added) -> _Added:
        return _Added(
            prefill_s=self.prefill_s + other.prefill_s,
            per_token_s=self.per_token_s + other.per_token_s,
            context_tokens=self.context_tokens + other.context_tokens,
            kv_bytes=self.kv_bytes + other.kv_bytes,
        )


def _context_added(constraints: Constraints) -> _Added:
    """What the shared context adds where it stands in the request as text."""
    load = Load(
        num_tasks=constraints.tasks.count,
        input_tokens=constraints.tasks.input_tokens,
        output_tokens=constraints.tasks.output_tokens,
        batch=constraints.traffic.batch,
        hard_tokens=constraints.tasks.shared_context_tokens,
        block_tokens=constraints.change.block_tokens,
    )
    cost = _cost("hard_text", constraints.base, load, constraints.hardware)
    cached = constraints.change.prefix_cache
    return _Added(
        prefill_s=_value(cost, "prefill_s_cached" if cached else "prefill_s_uncached"),
        per_token_s=_value(cost, "decode_s_per_token") * constraints.traffic.batch,
        context_tokens=_value(cost, "context_tokens"),
        kv_bytes=_value(cost, "kv_bytes_per_task" if cached else "kv_bytes_per_sequence"),
    )


_cost = lru_cache(maxsize=4096)(method_cost)
"""Costs do not depend on limits, and the search for flips asks for the same ones again and again."""


def _value(cost: MethodCost, key: str) -> float:
    return cost.value(key) or 0.0


def as_json(effects: Effects) -> Mapping[str, float]:
    """Return the numbers, JSON-ready."""
    return {
        "storage_bytes": effects.storage_bytes,
        "device_bytes": effects.device_bytes,
        "prefill_s": effects.prefill_s,
        "wire_s": effects.wire_s,
        "per_token_s": effects.per_token_s,
        "context_tokens": effects.context_tokens,
        "wire_bytes": effects.wire_bytes,
        "update_hours": effects.update_hours,
    }
