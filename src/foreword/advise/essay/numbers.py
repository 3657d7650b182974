"""All methods in numbers: cost tables, formulas of the recommended method and its neighbours, figures."""

from __future__ import annotations

from foreword.advise.cost.method_cost import QUANTITIES
from foreword.advise.decide import Decision, Standing
from foreword.advise.essay.words import amount, hours, joined, noun, number, quantity, time
from foreword.advise.methods import METHODS
from foreword.report import Block, Bullets, Code, Lines, Point, Scatter, Section, Table, Text

FORMULAS = (
    "bytes_per_task",
    "trained_parameters",
    "kv_bytes_per_sequence",
    "prefill_flops_uncached",
    "prefill_s_uncached",
    "prefill_s_cached",
    "decode_bytes_per_token",
    "decode_s_per_token",
    "wire_bytes_per_request",
    "training_flops",
    "training_hours",
)
"""What is worked out with its formula."""
FIGURE_FLOOR_S = 1e-5
"""Where a method adds nothing, a logarithmic axis shows this."""
COUNTS = (1, 10, 100, 1000)


def numbers(decision: Decision) -> Section:
    """Return the section with every method's numbers."""
    shown = sorted(decision.standings, key=lambda standing: list(METHODS).index(standing.name))
    load = decision.standing("prompt").effects.load
    letters = (
        "P vectors, T text tokens, D hidden size, L layers, H query heads, Hkv key/value heads, Dh head size, F "
        "feed-forward width, N parameters, b bytes per number"
    )
    hardware = decision.constraints.hardware
    blocks: list[Block] = [
        Text(
            f"Every method on {decision.constraints.base.name}, for inputs of {load.input_tokens:,} and answers of "
            f"{load.output_tokens:,} tokens, {load.batch} decoded together, on one {hardware.name} at "
            f"{hardware.flops_per_s / 1e12:,.0f} TFLOP/s reached and {hardware.bytes_per_s / 1e12:.3g} TB/s. Times "
            "follow from operations and bytes and are not measurements: kernels, queues and transfers come on top. A "
            "dash means that the base cannot carry the method or the number does not exist."
        ),
        _storage(shown),
        _serving(shown),
        _training(shown),
        _picture(decision, shown),
        _growth(decision, shown),
    ]
    worked = decision.standings[:3] if decision.ranking else decision.standings[:2]
    blocks.append(
        Text(
            f"The formulas behind {joined([noun(standing.name) for standing in worked])}, with this base's numbers "
            f"put in. Letters: {letters}."
        )
    )
    for standing in worked:
        blocks.append(Text(f"**{METHODS[standing.name].title}**"))
        blocks.append(Code("\n".join(_formulas(standing))))
        if standing.effects.cost.notes:
            blocks.append(Bullets(standing.effects.cost.notes))
    return Section("All methods in numbers", tuple(blocks))


def _storage(shown: list[Standing]) -> Table:
    rows = tuple(
        (
            METHODS[standing.name].title,
            quantity(standing, "trained_parameters"),
            quantity(standing, "bytes_per_task"),
            quantity(standing, "bytes_all_tasks"),
            quantity(standing, "context_tokens"),
            quantity(standing, "kv_bytes_per_sequence"),
            quantity(standing, "kv_bytes_per_task"),
        )
        for standing in shown
    )
    columns = ("method", "trained", "per task", "all tasks", "context used", "KV per sequence", "KV per task, shared")
    return Table(columns, rows, "What is kept")


def _serving(shown: list[Standing]) -> Table:
    rows = tuple(
        (
            METHODS[standing.name].title,
            quantity(standing, "prefill_s_uncached"),
            quantity(standing, "prefill_s_cached"),
            quantity(standing, "decode_s_per_token"),
            quantity(standing, "decode_share_of_weights"),
            quantity(standing, "wire_bytes_per_request"),
        )
        for standing in shown
    )
    columns = (
        "method",
        "prefill, uncached",
        "prefill, cached",
        "per token of one sequence",
        "reads against weights",
        "wire",
    )
    return Table(columns, rows, "What a request pays beside the base's own work")


def _training(shown: list[Standing]) -> Table:
    rows = tuple(
        (
            METHODS[standing.name].title,
            quantity(standing, "training_flops"),
            quantity(standing, "training_hours"),
            hours(standing.effects.update_hours),
        )
        for standing in shown
    )
    return Table(("method", "training of one task", "on one card", "a change is live in"), rows, "What a change takes")


def _picture(decision: Decision, shown: list[Standing]) -> Scatter:
    """Bytes per task against time added to a request; the front joins feasible methods that none beats in both."""
    tokens = decision.constraints.tasks.output_tokens
    places = {
        standing.name: (
            max(number(standing, "bytes_per_task"), 1.0),
            max(standing.effects.request_s(tokens), FIGURE_FLOOR_S) * 1e3,
        )
        for standing in shown
        if not standing.effects.cost.impossible and (standing.name != "cartridge" or standing.is_feasible)
    }
    feasible = [standing.name for standing in decision.ranking]
    points = []
    for name, (x, y) in places.items():
        beaten = any(
            places[other] != (x, y) and places[other][0] <= x and places[other][1] <= y
            for other in feasible
            if other in places
        )
        label = name if name in feasible else f"({name})"
        points.append(Point(label, x, y, on_front=name in feasible and not beaten))
    return Scatter(
        title="Bytes per task against time added to a request; what does not fit in brackets",
        x_title="bytes per task",
        y_title="ms added to a request",
        points=tuple(points),
        x_log=True,
        y_log=True,
    )


def _growth(decision: Decision, shown: list[Standing]) -> Lines:
    """Storage of all tasks over their number."""
    series = {
        METHODS[standing.name].title: tuple(
            (float(count), number(standing, "bytes_per_task") * count / 1e6) for count in COUNTS
        )
        for standing in shown
        if standing.name in ("prompt", "prefix", "kv", "lora", "full") and not standing.effects.cost.impossible
    }
    limit = decision.constraints.limits.storage_total_bytes
    if limit is not None:
        series["the limit"] = tuple((float(count), limit / 1e6) for count in (COUNTS[0], COUNTS[-1]))
    return Lines(
        title="Storage of all tasks over their number",
        x_title="tasks",
        y_title="MB in all",
        series=series,
        x_log=True,
        y_log=True,
    )


def _formulas(standing: Standing) -> list[str]:
    lines = []
    for key in FORMULAS:
        found = standing.effects.cost.quantities[key]
        if found is None or not found.value:
            continue
        lines.append(f"{QUANTITIES[key]}: {found.formula}")
        lines.append(f"    {found.worked}")
    effects = standing.effects
    lines.append(f"Added before the first token here: {time(effects.prefill_s)} prefill, {time(effects.wire_s)} wire")
    lines.append(f"    {amount(effects.wire_bytes)} on the wire per request")
    return lines
