"""The plan behind a recommendation: length, start, template, evaluation, who ships what, and the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from foreword.advise.decide import Decision, Standing
from foreword.advise.effects import HELD_OUT, PROMPTS, VECTORS, is_hybrid
from foreword.advise.questions import Kind

EPOCHS = 5
BATCH = 16
USUAL_GAIN = 0.03
"""The difference that the evaluation must be able to see where no target says more."""
OTHER_DISAGREEMENT = 0.1
"""Share of rows, beside the gain itself, on which two systems are right and wrong by turns; an assumption."""
ALPHA, POWER = 0.05, 0.8

METRICS: Mapping[Kind, str] = {
    "classification": "exact_match",
    "extraction": "token_f1",
    "tagging": "token_f1",
    "generation": "rouge_l",
    "new_skill": "exact_match",
    "new_knowledge": "token_f1",
}
INSTRUCTIONS: Mapping[Kind, str] = {
    "classification": "Name the topic of the message. Answer with the label alone.",
    "extraction": "Copy the passage that answers the question, or answer none.",
    "tagging": "List every entity of the text as type: words, one a line.",
    "generation": "Write one sentence that says all the facts below.",
    "new_skill": "Carry out the steps below and give the result alone.",
    "new_knowledge": "Answer the question about the product in one sentence.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do about the recommended method."""

    method: str
    num_vectors: int | None
    """P; None for methods without vectors."""
    aligned_vectors: int | None
    """P with which the block in front of the input fills whole blocks of the engine's cache."""
    is_hybrid: bool
    """Whether hard text that can be edited at once stands beside the vectors."""
    task_toml: str
    """A task file that `foreword.config.load_task` takes."""
    eval_rows: int
    """Held-out rows that show `gain` with a power of 0.8 at 5 %."""
    gain: float
    held_out: int
    """Held-out rows that there are."""
    visible_gain: float
    """The smallest difference that those show with a power of 0.8 at 5 %."""


def make_plan(decision: Decision) -> Plan | None:
    """Return the plan for the recommended method; None where nothing is feasible."""
    standing = decision.best
    if standing is None:
        return None
    constraints, tasks = decision.constraints, decision.constraints.tasks
    vectors = standing.effects.load.num_vectors if standing.name in VECTORS else None
    hybrid = standing.name in VECTORS and is_hybrid(constraints)
    beside = tasks.instruction_tokens if hybrid else 0
    block = constraints.change.block_tokens
    aligned = -(-(beside + vectors) // block) * block - beside if vectors else None
    gain = USUAL_GAIN
    if tasks.quality_target is not None and tasks.baseline_score is not None:
        gain = max(tasks.quality_target - tasks.baseline_score, 0.005)
    held_out = math.floor(tasks.rows_per_task * HELD_OUT)
    return Plan(
        method=standing.name,
        num_vectors=vectors,
        aligned_vectors=aligned,
        is_hybrid=hybrid,
        task_toml=_task_toml(decision, standing, aligned, hybrid),
        eval_rows=rows_for(gain),
        gain=gain,
        held_out=held_out,
        visible_gain=gain_for(held_out) if held_out else 1.0,
    )


def rows_for(gain: float, other: float = OTHER_DISAGREEMENT) -> int:
    """Return the rows on which McNemar's test sees a difference of `gain` at 5 % with a power of 0.8.

    The two disagree on `gain + other` of the rows. Source: Connor 1987, Biometrics 43, 207-211.
    """
    disagree = min(gain + other, 1.0)
    z_alpha, z_power = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(POWER)
    root = z_alpha * math.sqrt(disagree) + z_power * math.sqrt(disagree - gain * gain)
    return math.ceil((root / gain) ** 2)


def gain_for(rows: int) -> float:
    """Return the smallest difference that `rows` rows show, the inverse of `rows_for`; 1 where there is none."""
    low, high = 1e-4, 1.0
    if rows_for(0.9) > rows:
        return 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if rows_for(middle) <= rows else (middle, high)
    return high


def _task_toml(decision: Decision, standing: Standing, aligned: int | None, hybrid: bool) -> str:
    tasks = decision.constraints.tasks
    instruction = INSTRUCTIONS[tasks.kind]
    lines = [
        "[task]",
        'name = "task-one"',
        'train = "train.jsonl"             # {"input": ..., "target": ...}, one a line',
        'dev = "dev.jsonl"                 # chooses the step that is kept',
        'test = "test.jsonl"               # nothing is tuned on it; the promotion rests on it',
        f'hard_text = "{instruction}"  # your own words here',
        f'template = "{_template(instruction, aligned, hybrid)}"',
        f'metric = "{METRICS[tasks.kind]}"',
        f"max_new_tokens = {8 * math.ceil(1.5 * tasks.output_tokens / 8)}",
    ]
    if standing.name not in VECTORS:
        return "\n".join(lines)
    steps = min(5000, max(100, round(tasks.rows_per_task * EPOCHS / BATCH / 10) * 10))
    init = 'init = "text"                     # starts as the words of hard_text'
    if tasks.related:
        init += '; for the next tasks: "from:task-one@1"'
    method = "prompt" if standing.name in PROMPTS else standing.name
    lines += [
        "",
        "[train]",
        f'method = "{method}"',
        init,
        f"steps = {steps:<25} # {tasks.rows_per_task:,} rows, {EPOCHS} times, {BATCH} at once",
        f"batch_size = {BATCH}",
    ]
    return "\n".join(lines)


def _template(instruction: str, aligned: int | None, hybrid: bool) -> str:
    if aligned is None:
        return f"{instruction}\\n{{input}}"
    return f"{{soft:{aligned}}}{instruction}\\n{{input}}" if hybrid else f"{{soft:{aligned}}}{{input}}"
