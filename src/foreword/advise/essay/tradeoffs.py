"""The trade-offs, each with its number: parts to deploy, storage per task, speed of small updates."""

from __future__ import annotations

from foreword.advise.decide import Decision, Standing
from foreword.advise.effects import TEXT
from foreword.advise.essay.words import amount, capital, counted, hours, joined, noun, number, quantity, spelled, times
from foreword.advise.methods import METHODS
from foreword.advise.rank import parts_of
from foreword.report import Section, Table, Text


def trade_offs(decision: Decision) -> Section:
    """Return the section on deployment complexity, storage per task and speed of small updates."""
    compared = _compared(decision)
    return Section(
        "Trade-offs",
        (
            Text(_deployment(decision, compared)),
            Text(_storage(decision, compared)),
            Text(_updates(decision, compared)),
            _table(decision, compared),
        ),
    )


def _compared(decision: Decision) -> list[Standing]:
    """The recommended method, the best of the others, and the two that everybody asks about."""
    best = decision.ranking[0].shortfall if decision.ranking else 0.0
    names = [standing.name for standing in decision.ranking[:2] if standing.shortfall <= best]
    for name in ("prompt", "kv", "lora", "full"):
        if name not in names:
            names.append(name)
    found = [decision.standing(name) for name in names]
    return [standing for standing in found if not standing.effects.cost.impossible]


def _deployment(decision: Decision, compared: list[Standing]) -> str:
    first = compared[0]
    method = METHODS[first.name]
    text = f"**Deployment complexity.** {capital(noun(first.name))} adds {_parts(first.name)}. "
    text += (
        "Requests of all tasks share one batch on one copy of the base. "
        if method.composes
        else "Requests of different tasks cannot share a batch on stock engines. "
    )
    others = [standing for standing in compared[1:] if standing.name != first.name][:3]
    told = [f"{noun(standing.name)} adds {_parts(standing.name)}" for standing in others]
    apart = [noun(standing.name) for standing in compared if not METHODS[standing.name].composes]
    text += f"By comparison {'; '.join(told)}."
    if method.composes and apart:
        text += f" {capital(joined(apart))} would also part the batch: every task decodes by itself."
    return text


def _parts(method: str) -> str:
    parts = parts_of(METHODS[method])
    lead = "one part" if len(parts) == 1 else f"{spelled(len(parts))} parts"
    return f"{lead}: {joined(parts, 'and')}" if len(parts) == 1 else f"{lead} ({'; '.join(parts)})"


def _storage(decision: Decision, compared: list[Standing]) -> str:
    count, base = decision.constraints.tasks.count, decision.constraints.base
    first, rest = compared[0], compared[1:]
    text = f"**Storage per task.** A task takes {quantity(first, 'bytes_per_task')}"
    found = first.effects.cost.quantities["bytes_per_task"]
    if found is not None and found.formula and first.name not in TEXT:
        text += f" ({found.formula}: {found.worked})"
    text += f", {counted(count, 'task')} {amount(first.effects.storage_bytes)}. " if count > 1 else ". "
    own = max(number(first, "bytes_per_task"), 1.0)
    ratios = [
        f"{quantity(standing, 'bytes_per_task')} by {noun(standing.name)} "
        f"({times(number(standing, 'bytes_per_task') / own)})"
        for standing in rest
        if number(standing, "bytes_per_task") > own
    ]
    if ratios:
        text += f"The same task takes {joined(ratios)}. "
    share = first.effects.storage_bytes / base.weight_bytes
    if share < 0.5:
        percent = f"{100 * share:.2g} %" if share >= 1e-4 else "less than 0.01 %"
        text += f"Beside the {amount(base.weight_bytes)} of the base, all tasks together are {percent}."
    return text.rstrip()


def _updates(decision: Decision, compared: list[Standing]) -> str:
    first, review = compared[0], decision.constraints.change.review_hours
    rows = decision.constraints.tasks.rows_per_task
    training = number(first, "training_hours")
    text = f"**Speed of small updates.** A change to one task is live {hours(first.effects.update_hours)} after it is "
    text += "asked for. "
    if training:
        text += (
            f"Training on {rows:,} rows is {hours(training)} of one {decision.constraints.hardware.name} at the "
            "utilisation assumed; review and rollout are "
            f"{hours(review)}, so people and evaluation set the pace and not the machine. "
            if training < review
            else f"Training is {hours(training)} of it, review and rollout {hours(review)}. "
        )
        text += (
            f"What travels is {quantity(first, 'bytes_per_task')}, one alias moves, nothing restarts, and the way back "
            "is the same move."
            if METHODS[first.name].composes
            else f"What travels is {quantity(first, 'bytes_per_task')}, and engines load it anew."
        )
    else:
        text += (
            f"Nothing is trained: the words change, the evaluation runs, and {hours(review)} of review and rollout are "
            "all that is left to wait for."
        )
    full = next((standing for standing in compared if standing.name == "full"), None)
    if full is not None and full is not first:
        text += (
            f" Full fine-tuning would move {quantity(full, 'bytes_per_task')} for the same change, "
            f"{hours(number(full, 'training_hours'))} of training before it."
        )
    return text


def _table(decision: Decision, compared: list[Standing]) -> Table:
    rows = tuple(
        (
            METHODS[standing.name].title,
            len(parts_of(METHODS[standing.name])),
            quantity(standing, "bytes_per_task"),
            amount(standing.effects.storage_bytes),
            hours(standing.effects.update_hours),
            "yes" if standing.is_feasible else "no",
        )
        for standing in compared
    )
    return Table(("method", "parts added", "per task", "all tasks", "a change is live in", "fits"), rows)
