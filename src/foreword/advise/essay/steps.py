"""The plan as a reader follows it: length and start, training, evaluation, who ships what, the way back."""

from __future__ import annotations

import math

from foreword.advise.decide import Decision
from foreword.advise.effects import DEEP, PROMPTS, TEXT, VECTORS
from foreword.advise.essay.words import amount, hours, noun, number, quantity, time
from foreword.advise.plan import METRICS, Plan
from foreword.report import Block, Bullets, Code, Section, Text


def plan_section(decision: Decision, plan: Plan) -> Section:
    """Return the section with the numbered plan and the task file to start from."""
    best = decision.best
    assert best is not None  # a plan is made for a recommended method only
    steps = [
        text
        for text in (
            _baseline(decision, plan),
            _length(decision, plan),
            _start(decision, plan),
            _evaluation(decision, plan),
            _escalation(decision, plan),
            _shipping(decision, plan),
            _rollback(decision, plan),
        )
        if text
    ]
    blocks: list[Block] = [Bullets(tuple(steps), numbered=True)]
    intro = "A task file to start from; paths and words are yours to fill in:"
    if plan.method in TEXT or plan.num_vectors is None:
        intro = "A task file with which the baseline is judged; paths and words are yours to fill in:"
    blocks += [Text(intro), Code(plan.task_toml), Code(_commands(plan))]
    return Section("Plan", tuple(blocks))


def _baseline(decision: Decision, plan: Plan) -> str:
    tasks = decision.constraints.tasks
    known = ""
    if tasks.baseline_score is not None:
        known = f" The {tasks.baseline_score:g} reported for it is to be confirmed on these rows first."
    return (
        "**Baseline.** Judge the base with the instruction in words, and with solved examples, on the held-out rows of "
        f"each task before anything else.{known}"
    )


def _length(decision: Decision, plan: Plan) -> str:
    constraints = decision.constraints
    if plan.num_vectors is None:
        return _no_vectors(decision, plan)
    block, count, aligned = constraints.change.block_tokens, plan.num_vectors, plan.aligned_vectors
    text = f"**Length.** P = {count}"
    if constraints.tasks.num_vectors is not None:
        text += ", as given"
    elif count > 20:
        text += ", since tasks that label every token used 11 to 224 in the published runs of P-tuning v2"
    elif count < 20:
        text += f", short because {constraints.tasks.rows_per_task} rows pin down no more"
    if aligned != count:
        beside = f" beside the {constraints.tasks.instruction_tokens} tokens of instruction" if plan.is_hybrid else ""
        text += (
            f". Engines share whole blocks of {block} positions: P = {aligned}{beside} fills the last one, where "
            f"{count} {_tail(decision, plan)}. Take one less where the tokenizer writes a BOS token"
        )
    elif plan.is_hybrid:
        text += (
            f". With the {constraints.tasks.instruction_tokens} tokens of instruction they fill whole blocks of "
            f"{block} positions, which engines share; take one less where the tokenizer writes a BOS token"
        )
    else:
        text += f", a whole number of the engine's blocks of {block} positions"
    longer = {20: "10 and 50", 64: "32 and 128", 8: "4 and 16"}.get(count, f"{max(1, count // 2)} and {2 * count}")
    return f"{text}. Try {longer} on one task before settling; dev rows decide."


def _tail(decision: Decision, plan: Plan) -> str:
    """Say what happens to the positions behind the last whole block."""
    assert plan.num_vectors is not None
    beside = decision.constraints.tasks.instruction_tokens if plan.is_hybrid else 0
    rest = (plan.num_vectors + beside) % decision.constraints.change.block_tokens
    if plan.method == "prompt":
        dense = number(decision.standing("prompt"), "prefill_dense_s")
        return (
            f"would leave {rest} positions that every request computes again ({time(dense * rest / plan.num_vectors)})"
        )
    return f"would leave {rest} positions that are copied into a block of every request's own"


def _no_vectors(decision: Decision, plan: Plan) -> str:
    tasks = decision.constraints.tasks
    load = decision.standing(plan.method).effects.load
    if plan.method == "few_shot":
        return (
            f"**Examples.** {tasks.shots} solved examples, {load.few_shot_tokens:,} tokens with the instruction. Draw "
            "them from the rows for training, try several draws and orders on dev rows, and keep the best: the choice "
            "moves the score as much as the wording does."
        )
    if plan.method == "hard_text":
        return (
            f"**Wording.** Keep the instruction within {tasks.instruction_tokens} tokens, put what never changes first "
            "so that its blocks are shared, and change one thing at a time, judged on dev rows."
        )
    if plan.method == "cartridge":
        return (
            f"**Length.** {load.cartridge_tokens:,} positions for {tasks.shared_context_tokens:,} tokens of text, one "
            "for 32; halve and double it on one text. Start from the keys and values of the text's beginning."
        )
    if plan.method == "lora":
        return (
            f"**Size.** Rank {load.lora_rank} on all linear maps; about ten times the learning rate of full "
            "fine-tuning. Train it with the PEFT library on the same rows that the baseline was judged with."
        )
    return "**Training.** With the training code of your choice, on the rows that the baseline was judged with."


def _start(decision: Decision, plan: Plan) -> str:
    if plan.method not in VECTORS:
        return ""
    tasks = decision.constraints.tasks
    what = "keys and values" if plan.method == "kv" else "vectors"
    text = f"**Start and template.** Start the {what} from the words of the instruction, not at random"
    if decision.constraints.audit.needed:
        text += (
            ": an auditor can then read what they began as, and `foreword explain` says how far training moved them "
            "and what their nearest words are worth"
        )
    text += ". "
    if plan.is_hybrid:
        text += (
            "Keep the instruction as hard text behind them: a same-day wish is met by editing its words, judged at "
            "once, and the vectors are trained again behind it overnight, starting from the version in use. Its "
            f"{tasks.instruction_tokens} tokens cost what the text prompt's cost, "
            f"{time(_text_first_token(decision))} before the first token. "
        )
    if tasks.related and tasks.count > 1:
        text += (
            f"Train the task with the most rows first and start the other {tasks.count - 1} from it "
            '(`init = "from:…"`): related tasks lend each other more than random starts do. '
        )
    return text.rstrip()


def _text_first_token(decision: Decision) -> float:
    return decision.standing("hard_text").effects.prefill_s


def _evaluation(decision: Decision, plan: Plan) -> str:
    tasks = decision.constraints.tasks
    target = "the target asks for" if tasks.quality_target is not None and tasks.baseline_score is not None else "of"
    gain = (
        f"the gain of {100 * plan.gain:.3g} points that {target}"
        if target != "of"
        else (f"a gain of {100 * plan.gain:.3g} points")
    )
    text = (
        f"**Evaluation.** Judge by {METRICS[tasks.kind]}, candidate and baseline on the same held-out rows, by "
        "McNemar's test where rows are right or wrong, else by the paired bootstrap. To see "
        f"{gain} four times in five takes {plan.eval_rows:,} rows"
    )
    known = ""
    if tasks.quality_target is not None and plan.held_out:
        half = 1.96 * math.sqrt(tasks.quality_target * (1 - tasks.quality_target) / plan.held_out)
        known = (
            f" On {plan.held_out:,} rows a score near {tasks.quality_target:g} is known to ± {100 * half:.2g} points."
        )
    if plan.held_out >= plan.eval_rows:
        return f"{text}; a fifth of {tasks.rows_per_task:,} gives {plan.held_out:,}, which is enough.{known}"
    if plan.visible_gain >= 1:
        return f"{text}; a fifth of {tasks.rows_per_task:,} gives {plan.held_out:,}, too few for any verdict."
    return (
        f"{text}; a fifth of {tasks.rows_per_task:,} gives {plan.held_out:,}, which show {100 * plan.visible_gain:.2g} "
        f"points or more. Label more rows, or accept that smaller gains stay unproved.{known}"
    )


def _escalation(decision: Decision, plan: Plan) -> str:
    if plan.method not in VECTORS or decision.constraints.tasks.count == 1:
        return ""
    order = [standing for standing in decision.standings if standing.name in ("kv", "lora") and plan.method not in DEEP]
    if not order:
        order = [standing for standing in decision.standings if standing.name == "lora"]
    names = " or ".join(
        f"{noun(standing.name)} ({quantity(standing, 'bytes_per_task')} each"
        + ("" if standing.is_feasible else ", outside the present constraints")
        + ")"
        for standing in order
    )
    return (
        f"**Tasks that fail.** Where a task stays short of its target, measure {names} for that task alone with "
        "`foreword compare`, and raise it if the paired test says so."
    )


def _shipping(decision: Decision, plan: Plan) -> str:
    best = decision.standing(plan.method)
    constraints = decision.constraints
    text = "**Updates.** The task's owner changes rows or words"
    if number(best, "training_hours"):
        text += f" and trains ({hours(number(best, 'training_hours'))} on one {constraints.hardware.name})"
    text += f"; the platform judges, reviews and promotes ({hours(constraints.change.review_hours)}). "
    text += f"What travels is {quantity(best, 'bytes_per_task')}"
    if plan.method in (*VECTORS, "cartridge"):
        text += f", and the engine's cache holds {amount(number(best, 'kv_bytes_per_task'))} for it"
    text += f". In all {hours(best.effects.update_hours)}"
    deadline = constraints.limits.update_deadline_hours
    return f"{text} of the {hours(deadline)} allowed." if deadline else f"{text}."


def _rollback(decision: Decision, plan: Plan) -> str:
    if plan.method in VECTORS:
        text = (
            "**Way back.** Versions never change and stay in the registry; `prod` is an alias. `foreword rollback` "
            "moves it to the version before, within seconds, and running answers end on the version they began with."
        )
        if decision.constraints.audit.needed:
            text += " Every move is kept with who, when, why and the evaluation that it rested on."
        return text
    if plan.method in TEXT:
        return "**Way back.** Keep every wording with its score; the earlier one is a file away."
    return "**Way back.** Keep the earlier adapter or checkpoint loadable until the new one has been judged in use."


def _commands(plan: Plan) -> str:
    if plan.method not in VECTORS:
        return "foreword eval task-one.toml --base BASE"
    vectors = f"runs/first/task-one-{_trained(plan)}.safetensors"
    return "\n".join(
        (
            "foreword train task-one.toml --base BASE --out runs/first",
            f"foreword eval task-one.toml --base BASE --vectors {vectors} --out report.json",
            f"foreword publish {vectors} --alias canary --evaluation report.json",
            "foreword promote task-one@canary --base BASE --why 'beats the text prompt'",
            "foreword rollback task-one",
        )
    )


def _trained(plan: Plan) -> str:
    return "prompt" if plan.method in PROMPTS else plan.method
