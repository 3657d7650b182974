"""What a report rests on: defaults that were assumed, hardware, and constraints that pull against each other."""

from __future__ import annotations

from foreword.advise.constraints import Constraints
from foreword.advise.essay.words import amount
from foreword.advise.questions import SURFACES
from foreword.report import Bullets, Section, Text


def tensions(constraints: Constraints) -> tuple[str, ...]:
    """Return what pulls against each other without being impossible, each with both keys and numbers."""
    tasks, limits, found = constraints.tasks, constraints.limits, []
    if tasks.quality_target is not None and tasks.baseline_score is not None:
        gap = tasks.quality_target - tasks.baseline_score
        if gap > 0 and constraints.change.surface == "text":
            found.append(
                f"`tasks.quality_target` is {tasks.quality_target:g}, {gap:.2g} above `tasks.baseline_score`, and "
                "`change.surface` allows text only: wording and examples must close the gap, nothing can be trained."
            )
    if tasks.baseline_score is None and tasks.quality_target is not None:
        found.append(
            f"`tasks.quality_target` is {tasks.quality_target:g}, but `tasks.baseline_score` is not known: whether "
            "words alone reach it is the first thing to measure."
        )
    weights, memory = constraints.base.weight_bytes, constraints.hardware.memory_bytes
    if weights > 0.9 * memory:
        found.append(
            f"The weights take {amount(weights)} and one {constraints.hardware.name} has {amount(memory)}: the base "
            "needs several cards. Times are counted for one; n cards in tensor parallel divide them by up to n."
        )
    new = tasks.kind in ("new_skill", "new_knowledge")
    if new and SURFACES.index(constraints.change.surface) < SURFACES.index("lora"):
        found.append(
            f"`tasks.kind` is {tasks.kind} and `change.surface` is {constraints.change.surface}: what the base lacks "
            "is not to be had without changing weights."
        )
    if limits.storage_per_task_bytes and limits.storage_total_bytes:
        together = limits.storage_per_task_bytes * tasks.count
        if together > limits.storage_total_bytes:
            found.append(
                f"`limits.storage_per_task_bytes` times {tasks.count} tasks is {amount(together)}, more than "
                f"`limits.storage_total_bytes`, {amount(limits.storage_total_bytes)}: the total binds."
            )
    return tuple(found)


def assumptions(constraints: Constraints) -> Section:
    """Return the section that lists every default that was assumed, and what pulls against each other."""
    found = tensions(constraints)
    blocks: list[Text | Bullets] = []
    if found:
        blocks += [Text("What pulls against each other:"), Bullets(found)]
    if constraints.assumed:
        blocks += [
            Text("Not given, so assumed; set any of them and ask again:"),
            Bullets(constraints.assumed),
        ]
    else:
        blocks.append(Text("Everything was given; nothing was assumed."))
    blocks.append(Text(f"Hardware: {constraints.hardware.source or constraints.hardware.name}."))
    return Section("What this rests on", tuple(blocks))
