"""The recommendation, what is given up by it, and what the words of it rest on."""

from __future__ import annotations

from foreword.advise.cost.quantity import human
from foreword.advise.decide import Decision, Standing
from foreword.advise.effects import DEEP, PROMPTS, TEXT, VECTORS
from foreword.advise.essay.words import amount, capital, counted, hours, joined, noun, number, quantity, spelled, time
from foreword.advise.methods import METHODS
from foreword.advise.questions import SURFACES
from foreword.advise.rank import differences
from foreword.advise.rules import REACH, REACH_MEANS
from foreword.report import Block, Bullets, Section, Text

IDS_INSTEAD = (
    "A platform that lets unused rows of the vocabulary be overwritten can have the same vectors as plain ids: nothing "
    "is embedded or sent by the client's side, at the price of reloading the embedding table with every version and of "
    "barring those ids from sampling."
)


def recommendation(decision: Decision) -> Section:
    """Return the first section: what to do, what it costs, why, and what stands beside it."""
    best = decision.best
    if best is None:
        return _nothing(decision)
    blocks: list[Block] = [Text(_what(decision, best)), Text(_costs(decision, best)), Text(_why(decision, best))]
    if best.shortfall:
        blocks.append(Text(_warning(decision, best)))
    blocks.append(Text(_beside(decision, best)))
    return Section("Recommendation", tuple(blocks))


def given_up(decision: Decision) -> Section | None:
    """Return the section on what the recommended method cannot do."""
    best = decision.best
    if best is None:
        return None
    blocks: list[Block] = [Bullets(tuple(METHODS[best.name].limits))]
    stronger = [s for s in decision.standings if REACH[s.name] > REACH[best.name] and not s.effects.cost.impossible]
    if stronger:
        blocks.insert(0, Text(_reach_given_up(best, stronger)))
    if best.name == "prompt":
        blocks.append(Text(IDS_INSTEAD))
    if window := decision.constraints.base.window:
        blocks.append(Text(_window(decision, best, window)))
    return Section("What is given up", tuple(blocks))


def _what(decision: Decision, best: Standing) -> str:
    constraints = decision.constraints
    base, tasks = constraints.base, constraints.tasks
    size = human(base.num_parameters, "parameters")
    whom = "the task" if tasks.count == 1 else f"all {spelled(tasks.count)} tasks"
    text = f"Use **{noun(best.name)}** for {whom}. "
    if best.name == "full":
        return text + f"Each task gets its own copy of {base.name} ({size}), trained in full."
    text += f"One frozen {base.name} ({size}) answers every request, and a task is {_what_a_task_is(decision, best)}."
    if best.name == "prompt" and constraints.change.prefix_cache:
        text += (
            " The engine keeps the keys and values of the vectors after the first request that brings them, so they "
            "are computed once and not per request."
        )
    return text


def _what_a_task_is(decision: Decision, best: Standing) -> str:
    base, tasks = decision.constraints.base, decision.constraints.tasks
    load, each = best.effects.load, quantity(best, "bytes_per_task")
    count = load.num_vectors
    if best.name == "hard_text":
        return f"its instruction, about {tasks.instruction_tokens} tokens of text ({each})"
    if best.name == "few_shot":
        return (
            f"its instruction and {counted(tasks.shots, 'solved example')}, "
            f"{best.effects.context_tokens:,.0f} tokens of text ({each})"
        )
    if best.name in PROMPTS:
        served = ", compiled once per version into keys and values" if best.name == "compiled_prompt" else ""
        return f"{count} vectors of {base.hidden_size:,} numbers in front of its text{served}: a file of {each}"
    if best.name in DEEP:
        what = "keys and values" if best.name == "kv" else "vectors"
        return f"{count} trained positions of {what} in each of the {base.num_layers} layers: a file of {each}"
    if best.name == "cartridge":
        return f"{load.cartridge_tokens:,} positions of trained keys and values in place of its long text: {each}"
    return f"{human(number(best, 'trained_parameters'), 'parameters')} parameters beside the frozen weights: {each}"


def _costs(decision: Decision, best: Standing) -> str:
    tasks, limits = decision.constraints.tasks, decision.constraints.limits
    effects = best.effects
    storage = f"In all the tasks take {amount(effects.storage_bytes)}" if tasks.count > 1 else ""
    if tasks.count > 1 and limits.storage_total_bytes:
        storage += f" of the {amount(limits.storage_total_bytes)} allowed"
    first = f"A request waits {time(effects.first_token_s)} longer for its first token"
    batch = decision.constraints.traffic.batch
    together = f", {batch} requests decoding together" if batch > 1 and effects.per_token_s else ""
    token = f"and {time(effects.per_token_s)} for each token after it" if effects.per_token_s else "and no longer after"
    wire = _wire(decision, best)
    change = f"A wanted change is live {hours(effects.update_hours)} later"
    machine = effects.update_hours - decision.constraints.change.review_hours
    change += f", {hours(machine)} of it machine time"
    if limits.update_deadline_hours:
        change += f"; the deadline is {hours(limits.update_deadline_hours)}"
    lead = f"{storage}. " if storage else ""
    return f"{lead}{first} {token}{together}. {wire}{change}."


def _wire(decision: Decision, best: Standing) -> str:
    """Say what the embeddings of a request cost on the wire, where that is most of its wait."""
    effects, traffic = best.effects, decision.constraints.traffic
    if effects.wire_s < max(effects.prefill_s, 1e-4):
        return ""
    rate = effects.wire_bytes * 8 * traffic.requests_per_s / 1e9
    return (
        f"Of the wait, {time(effects.wire_s)} is for {amount(effects.wire_bytes)} of embeddings on the wire: the "
        f"payload costs more than the vectors in it, and at {traffic.requests_per_s:g} requests per second it fills "
        f"{rate:.2g} of the network's {traffic.network_gbit_s:g} Gbit/s. "
    )


def _why(decision: Decision, best: Standing) -> str:
    if decision.measured is not None and best.judged_by == "measured":
        lost = decision.measured.losses(best.name, _names(decision), decision.constraints.tasks.quality_target)
        judged = len(decision.measured.of(best.name))
        text = f"The choice rests on measurement: on {judged - len(lost)} of {counted(judged, 'measured task')} "
        text += "nothing that fits is better beyond doubt. "
    else:
        text = f"{' '.join(decision.need.reasons)} "
        text += f"That calls for {REACH_MEANS[decision.need.reach]}. " if decision.need.reach else ""
    others = [standing for standing in decision.ranking[1:] if standing.shortfall <= best.shortfall]
    fits = len(decision.ranking)
    if fits == 1 and best.shortfall:
        return text + "No method that fits goes that far, and no other fits at all."
    if fits == 1:
        return text + f"No other of the {len(decision.standings)} methods weighed fits the constraints."
    if not others:
        rest = capital(joined([noun(standing.name) for standing in decision.ranking[1:]]))
        fit = "also fits, and falls" if fits == 2 else "also fit, and fall"
        if best.shortfall:
            return text + f"No method that fits goes that far; {noun(best.name)} comes nearest."
        return text + f"No other method that fits goes that far. {rest} {fit} short of it."
    second = others[0]
    gap = second.total_points - best.total_points
    leading = [item for item in differences(best.points, second.points) if item[0] > 0.05][:2]
    reason = joined([f"{b.criterion} ({a.amount} against {b.amount})" for _, a, b in leading]) or "bytes"
    return (
        f"{text}Of {spelled(fits)} methods that fit, {spelled(len(others) + 1)} go far enough, and this one costs "
        f"least. The next, {noun(second.name)}, stands {gap:.1f} points behind, mostly for {reason}; a point is a "
        "factor of ten, and the ranking below shows them all."
    )


def _warning(decision: Decision, best: Standing) -> str:
    if best.judged_by == "measured":
        return f"It does not win everywhere: {best.shortfall_text}. Those tasks are to be raised one by one."
    able = [s for s in decision.infeasible if not s.shortfall and not s.effects.cost.impossible]
    better = min(able, key=lambda s: (SURFACES.index(s.method.surface), s.order), default=None)
    text = f"**It falls short of what the tasks call for**: it {best.shortfall_text}. "
    if better is not None:
        keys = joined(sorted({f"`{objection.key}`" for objection in better.objections}), "and")
        text += f"{capital(noun(better.name))} would go far enough, and {keys} forbids it. "
    return text + "It is the best of what fits; whether that is good enough is for the evaluation to say."


def _beside(decision: Decision, best: Standing) -> str:
    tasks = decision.constraints.tasks
    if best.name == "hard_text":
        return (
            "Nothing is trained, so there is nothing to win over: the text prompt is its own baseline. It stays the "
            "measure for whatever is tried later."
        )
    baseline = decision.standing("hard_text")
    score = f", which scores {tasks.baseline_score:g} today" if tasks.baseline_score is not None else ""
    text = (
        f"Beside it stands the text prompt{score}. It takes {tasks.instruction_tokens} tokens of instruction and "
        f"{quantity(baseline, 'bytes_per_task')}, and it is judged on the same held-out rows as every candidate. What "
        "does not beat it beyond doubt is not promoted, however well it trained."
    )
    if best.name in VECTORS and best.name in PROMPTS:
        text += (
            " A task that stays short of its target is raised alone, to keys and values in every layer or to LoRA, "
            "when a measurement shows that this gains; the others stay as they are."
        )
    return text


def _reach_given_up(best: Standing, stronger: list[Standing]) -> str:
    strongest = max(stronger, key=lambda standing: (REACH[standing.name], standing.name))
    nearest = min(stronger, key=lambda standing: (REACH[standing.name], standing.total_points))
    text = f"{capital(noun(best.name))} works through {REACH_MEANS[REACH[best.name]]} and nothing else. "
    if number(best, "trained_parameters"):
        own, more = number(best, "trained_parameters"), number(nearest, "trained_parameters")
        ratio = f", {more / own:,.0f} times as many as the {own:,.0f} here" if more > 1.5 * own else ""
        text += (
            f"The next step, {noun(nearest.name)}, trains {human(more, 'parameters')} per task{ratio}; "
            f"{noun(strongest.name)} trains {human(number(strongest, 'trained_parameters'), 'parameters')}. What the "
            "base cannot do at all, no soft prompt will make it do."
        )
    else:
        text += (
            "Nothing is learned from the rows beyond what the words say, so whatever they hold that is hard to put "
            "into words stays unused."
        )
    return text


def _window(decision: Decision, best: Standing, window: int) -> str:
    base = decision.constraints.base
    if best.name in TEXT or best.name not in (*VECTORS, "cartridge"):
        return ""
    full = base.num_full_layers
    if full:
        return (
            f"{base.num_layers - full} of {base.num_layers} layers see {window:,} tokens back only. Beyond that, the "
            f"vectors act through the {full} layers that see everything."
        )
    reach = base.num_layers * (window - 1)
    return (
        f"Every layer sees {window:,} tokens back. After {window:,} tokens no layer reads the vectors themselves, and "
        f"beyond {reach:,} tokens of text nothing that they changed can arrive."
    )


def _nothing(decision: Decision) -> Section:
    nearest = min(decision.infeasible, key=lambda standing: (len(standing.objections), standing.order))
    keys = joined([f"`{objection.key}`" for objection in nearest.objections])
    text = (
        "**Nothing fits.** Every one of the methods weighed breaks at least one constraint, and this report will not "
        f"name a winner among them. The nearest is {noun(nearest.name)}, which only {keys} forbids. Below stand all "
        "reasons with both numbers, and how far each limit would have to move before something fits."
    )
    return Section("Recommendation", (Text(text), Bullets(tuple(capital(o.text) for o in nearest.objections))))


def _names(decision: Decision) -> tuple[str, ...]:
    return tuple(standing.name for standing in decision.ranking)
