"""A distillation as a report: what it stands for, what it answers, what it costs, what it harms."""

from __future__ import annotations

from collections.abc import Sequence

from foreword.distil.run import Distilled
from foreword.report import Bullets, Cell, Report, Section, Table, Text

WHAT = {
    "student": "the trained vectors",
    "full": "the context itself",
    "none": "no context",
    "truncated": "the text's beginning, as long",
    "summary": "the model's own summary, as long",
    "untrained": "keys and values of the first tokens",
    "start": "the vectors before training",
}


def report(found: Sequence[Distilled]) -> Report:
    """Return the report of one or many contexts; `.data` holds every number."""
    names = ", ".join(item.prepared.job.distil.name for item in found)
    sections = [section for item in found for section in _sections(item)]
    return Report(f"Compressed: {names}", tuple(sections), {"contexts": [item.to_json() for item in found]})


def _sections(item: Distilled) -> list[Section]:
    data, judged = item.to_json(), item.judged
    name, questions = data["name"], data["questions"]
    of_chunk = " The full context is the chunk with the answer." if data["num_chunks"] > 1 else ""
    learned = ", ".join(f"{count} {kind}" for kind, count in questions["by_type"].items())
    sizes = data["bytes"]
    facts = (
        f"{data['num_context_tokens']} tokens of context into {data['num_vectors']} vectors of method "
        f"{data['method']}: ratio {data['ratio']:.1f}.",
        f"Keys and values in a server: {_kib(sizes['kv_of_vectors'])} in place of {_kib(sizes['kv_of_context'])} "
        f"({sizes['kv_dtype']}); the file has {_kib(sizes['file'])}.",
        f"Learned from {questions['learned']} questions ({learned}).",
        f"**KL gap closed {judged['student'].gap_closed:.3f}**"
        + ("" if judged.retained is None else f", **{judged.retained:.1%} of the full context's score**")
        + f"; {data['status']} after {data['seconds']} s.",
    )
    right = "the answers given" if judged.against == "given" else "the teacher's own answers"
    which = {"test": "questions of the test file", "held back": "questions held back", "learned": "learned questions"}
    rows: list[tuple[Cell, ...]] = []
    for standing in judged.standings:
        low, high = standing.report.interval
        paired = "-" if standing.paired is None else f"{standing.paired.verdict}, {standing.paired.difference:+.3f}"
        score = f"{standing.report.score:.3f} [{low:.3f}, {high:.3f}]"
        rows.append(
            (WHAT[standing.name], standing.num_tokens, score, paired, standing.divergence, f"{standing.gap_closed:.3f}")
        )
    columns = ("in front of the question", "tokens", "score", "student against it", "KL nats/token", "KL gap closed")
    caption = (
        f"{judged.standings[0].report.num_rows} {which[judged.held_out]}, answered by generation; right are {right}."
    )
    sections = [
        Section(name, (Bullets(facts),)),
        Section(f"{name}: held-out questions", (Table(columns, tuple(rows), caption + of_chunk),)),
        Section(f"{name}: elsewhere", (_damage(item),)),
    ]
    if judged.held_out == "learned":
        warning = "Too few questions to hold any back: these were learned. Give --test for a judgement."
        sections.insert(2, Section(f"{name}: mind", (Text(warning),)))
    return sections


def _damage(item: Distilled) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for damage in item.judged.damage:
        score = (
            None
            if damage.score is None or damage.interval is None
            else (f"{damage.score:.3f} [{damage.interval[0]:.3f}, {damage.interval[1]:.3f}]")
        )
        rows.append((WHAT[damage.name], damage.divergence, score))
    caption = "On prompts that have nothing to do with the context: distance from the plain base, over its own answers."
    return Table(("in front of the prompt", "KL nats/token", "score"), tuple(rows), caption)


def _kib(count: int | None) -> str:
    return "-" if count is None else f"{count / 1024:,.1f} KiB"
