"""The rules: which constraint forbids a method, and how much of the model the tasks need to steer."""

from __future__ import annotations

from dataclasses import dataclass

from foreword.advise.constraints import Constraints
from foreword.advise.cost.quantity import human
from foreword.advise.effects import FEW_ROWS, SHORTEST_CONTEXT, VECTORS, Effects
from foreword.advise.questions import SURFACE_MEANS, SURFACES

REACH = {
    "hard_text": 0,
    "few_shot": 1,
    "prompt": 2,
    "compiled_prompt": 2,
    "prefix": 3,
    "kv": 3,
    "cartridge": 3,
    "ia3": 3,
    "lora": 4,
    "adapter": 4,
    "full": 5,
}
"""How much of the model a method steers; see REACH_MEANS."""
REACH_MEANS = (
    "words",
    "words and solved examples",
    "vectors before the first layer",
    "vectors or scales in every layer",
    "low-rank or bottleneck weights in every layer",
    "all weights",
)

SMALL_PARAMETERS = 3e9
"""Below it prompt tuning lags behind; Lester et al. see the gap close beyond billions of parameters."""
MANY_ROWS = 10_000
"""Above it there is enough data for a skill that the base lacks, which vectors alone do not give (Petrov et al.)."""
NO_TRAINING_ROWS = 20
"""Below it nothing is left to judge on: of 20 held-out rows a score of 0.5 is known to ± 0.22."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objection:
    """One constraint that forbids a method."""

    key: str
    """The constraint: `limits.storage_total_bytes`."""
    text: str
    """A sentence with both numbers."""
    needed: float | str
    allowed: float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """How much of the model the tasks need to steer."""

    reach: int
    """Index into REACH_MEANS."""
    reasons: tuple[str, ...]
    """Sentences, each with its number."""


def objections(effects: Effects, constraints: Constraints) -> tuple[Objection, ...]:
    """Return every constraint that forbids a method; empty where it is feasible."""
    found = [*_structure(effects, constraints), *_sizes(effects, constraints), *_times(effects, constraints)]
    return tuple(found)


def need_of(constraints: Constraints) -> Need:
    """Return how far into the model the tasks must reach, by base size, kind of task and rows."""
    tasks, base = constraints.tasks, constraints.base
    if tasks.baseline_score is not None and tasks.quality_target is not None:
        gap = tasks.quality_target - tasks.baseline_score
        if gap <= 0:
            text = f"The hard text prompt scores {tasks.baseline_score:g}, and the target is {tasks.quality_target:g}."
            return Need(reach=0, reasons=(f"{text} Words alone are enough.",))
    if tasks.rows_per_task < NO_TRAINING_ROWS:
        text = (
            f"{tasks.rows_per_task} rows per task, fewer than {NO_TRAINING_ROWS}, are too few to train on and judge by"
        )
        return Need(reach=1, reasons=(f"{text}; they serve best as examples in the prompt.",))
    if tasks.rows_per_task < FEW_ROWS:
        text = f"{tasks.rows_per_task} rows per task, fewer than {FEW_ROWS}, pin down a few vectors and no more"
        return Need(reach=2, reasons=(f"{text}: words, and a short prompt that starts as those words.",))
    reach, reasons = 2, []
    size = human(base.num_parameters, "parameters")
    new = tasks.kind in ("new_skill", "new_knowledge")
    held_as_text = tasks.kind == "new_knowledge" and tasks.shared_context_tokens > 0
    if base.num_parameters < SMALL_PARAMETERS:
        reach = 3
        reasons.append(
            f"The base has {size}, fewer than {human(SMALL_PARAMETERS, 'parameters')}: on small bases vectors before "
            "the first layer lag behind, so every layer is to be steered."
        )
    if tasks.kind in ("tagging", "generation"):
        reach = 3
        what = (
            "Tagging labels every token" if tasks.kind == "tagging" else "Text is wanted in a form foreign to the base"
        )
        reasons.append(f"{what}, and what is set before the first layer alone seldom carries through all the others.")
    if new and not held_as_text:
        reach = 4
        what = "a skill" if tasks.kind == "new_skill" else "knowledge"
        reasons.append(
            f"The tasks need {what} that the base lacks; vectors elicit what is there and cannot change which words "
            "attend to which, so weights must change."
        )
    if tasks.rows_per_task > MANY_ROWS:
        reach = max(reach, 4)
        reasons.append(f"{tasks.rows_per_task:,} rows per task are more than {MANY_ROWS:,}, more than vectors can use.")
    if held_as_text:
        reasons.append(
            f"The knowledge stands in {tasks.shared_context_tokens:,} tokens of text that a request can carry, or that "
            "a cartridge can stand for."
        )
    if not reasons:
        reasons.append(
            f"{tasks.kind.capitalize().replace('_', ' ')} is a skill that a base of {size} has. What is to be learned "
            f"is to call it up in the right form, and {tasks.rows_per_task:,} rows per task are enough for that; more "
            f"could be taught from about {MANY_ROWS:,} on."
        )
    return Need(reach=reach, reasons=tuple(reasons))


def shortfall(method: str, constraints: Constraints, need: Need) -> tuple[int, str]:
    """Return by how many steps a method misses what the tasks need, and the reason; 0 and "" where it does not."""
    reach, rows = REACH[method], constraints.tasks.rows_per_task
    if reach < need.reach:
        return need.reach - reach, f"works through {REACH_MEANS[reach]} where {REACH_MEANS[need.reach]} are called for"
    if rows < FEW_ROWS and reach > max(need.reach, 2):
        return reach - need.reach, f"has more freedom than {rows} rows can pin down"
    if rows < NO_TRAINING_ROWS and reach > 1:
        return reach - need.reach, f"cannot be trained and judged on {rows} rows"
    return 0, ""


def _structure(effects: Effects, constraints: Constraints) -> list[Objection]:
    method, tasks, allowed = effects.method, constraints.tasks, constraints.change.surface
    found = []
    if effects.cost.impossible:
        text = f"`base` {constraints.base.name} cannot carry it: {effects.cost.impossible.rstrip('.')}."
        found.append(Objection(key="base", text=text, needed=method.name, allowed=constraints.base.name))
    if SURFACES.index(method.surface) > SURFACES.index(allowed):
        text = f"`change.surface` is `{allowed}`; this needs `{method.surface}`, {SURFACE_MEANS[method.surface]}."
        found.append(Objection(key="change.surface", text=text, needed=method.surface, allowed=allowed))
    held = tasks.shared_context_tokens
    if method.name == "cartridge" and held < SHORTEST_CONTEXT:
        what = "there is no long text that it could stand for" if not held else "a text so short is cheaper to keep"
        text = (
            f"`tasks.shared_context_tokens` is {held}, less than the {SHORTEST_CONTEXT} of a cartridge's text: {what}."
        )
        found.append(Objection(key="tasks.shared_context_tokens", text=text, needed=SHORTEST_CONTEXT, allowed=held))
    if method.name == "few_shot" and tasks.rows_per_task < tasks.shots:
        text = f"`tasks.shots` asks for {tasks.shots} examples; `tasks.rows_per_task` is {tasks.rows_per_task}."
        found.append(Objection(key="tasks.rows_per_task", text=text, needed=tasks.shots, allowed=tasks.rows_per_task))
    return found


def _sizes(effects: Effects, constraints: Constraints) -> list[Objection]:
    limits, count = constraints.limits, constraints.tasks.count
    per_task = effects.storage_bytes / count
    checks = [
        ("storage_per_task_bytes", per_task, "one task takes", None),
        ("storage_total_bytes", effects.storage_bytes, f"{count} tasks take", per_task),
        ("device_memory_bytes", effects.device_bytes, f"{count} tasks add", None),
        ("wire_bytes", effects.wire_bytes, "a request sends", None),
    ]
    found = []
    for key, needed, words, each in checks:
        allowed = getattr(limits, key)
        if allowed is not None and needed > allowed:
            fits = _fitting(effects, needed, allowed) if key != "wire_bytes" else ""
            worked = "" if each is None else f" ({count} · {_bytes(each)})"
            text = f"`limits.{key}` is {_bytes(allowed)}; {words} {_bytes(needed)}{worked}.{fits}"
            found.append(Objection(key=f"limits.{key}", text=text, needed=needed, allowed=allowed))
    found += _network(effects, constraints)
    room = limits.context_tokens or constraints.base.context_tokens
    used = effects.context_tokens + constraints.tasks.input_tokens + constraints.tasks.output_tokens
    if room is not None and used > room:
        key = "limits.context_tokens" if limits.context_tokens else "base"
        what = "`limits.context_tokens` is" if limits.context_tokens else f"{constraints.base.name} holds"
        text = f"{what} {room:,} tokens; input, answer and what the method adds ({effects.context_tokens:,.0f}) are "
        found.append(Objection(key=key, text=f"{text}{used:,.0f}.", needed=used, allowed=room))
    return found


def _network(effects: Effects, constraints: Constraints) -> list[Objection]:
    """The requests of a second must get through the network."""
    traffic = constraints.traffic
    needed = effects.wire_bytes * 8 * traffic.requests_per_s / 1e9
    if needed <= traffic.network_gbit_s:
        return []
    text = (
        f"`traffic.network_gbit_s` is {traffic.network_gbit_s:g}; {traffic.requests_per_s:g} requests per second of "
        f"{_bytes(effects.wire_bytes)} are {needed:.3g} Gbit/s."
    )
    return [Objection(key="traffic.network_gbit_s", text=text, needed=needed, allowed=traffic.network_gbit_s)]


def _times(effects: Effects, constraints: Constraints) -> list[Objection]:
    limits, found = constraints.limits, []
    first, token = effects.first_token_s * 1e3, effects.per_token_s * 1e3
    checks = [
        ("first_token_added_ms", first),
        ("per_token_added_ms", token),
        ("update_deadline_hours", effects.update_hours),
    ]
    for key, needed in checks:
        allowed = getattr(limits, key)
        if allowed is not None and needed > allowed:
            shown = human(allowed, "hours") if key == "update_deadline_hours" else human(allowed / 1e3, "s")
            text = f"`limits.{key}` is {shown}; {_time_needed(key, effects, constraints)}."
            found.append(Objection(key=f"limits.{key}", text=text, needed=needed, allowed=allowed))
    return found


def _time_needed(key: str, effects: Effects, constraints: Constraints) -> str:
    if key == "first_token_added_ms":
        parts = f"{human(effects.prefill_s, 's')} of prefill and {human(effects.wire_s, 's')} on the wire"
        return f"this adds {human(effects.first_token_s, 's')}, {parts}"
    if key == "per_token_added_ms":
        return f"this adds {human(effects.per_token_s, 's')}"
    review = human(constraints.change.review_hours, "hours")
    return f"a change takes {human(effects.update_hours, 'hours')}, of which {review} are review and rollout"


def _fitting(effects: Effects, needed: float, allowed: float) -> str:
    """Say at which P vectors would fit, where a size is in proportion to P."""
    if effects.method.name not in VECTORS:
        return ""
    fits = int(allowed / (needed / effects.load.num_vectors))
    if fits < 1:
        return " Not even P = 1 would fit."
    return f" At P = {fits} instead of {effects.load.num_vectors} it would fit."


def _bytes(value: float) -> str:
    return human(value, "bytes")
