"""Writes notes of facts and questions about them: `python -m foreword.demo.make_notes <folder> [seed]`.

A context to compress whose every fact can be asked for: 24 facts of six named projects, each with an access code, a
manager, a city and a deadline. The bundled base and its siblings answer such questions with the notes in their context;
without them they can only guess. Seeded, standard library only; the same bytes each time.

**Splits.** Every fact is asked for in six wordings. Four are in `questions.jsonl`, to learn from; the other two are in
`test.jsonl` alone, so that what is judged is the fact and not the sentence. Facts are the same in both: what is not in
the notes cannot be known.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECTS = (
    "Alder", "Amber", "Basil", "Birch", "Cedar", "Copper", "Daisy", "Dorian", "Elm", "Ember", "Falcon", "Fern",
    "Garnet", "Grove", "Harbor", "Hazel", "Indigo", "Iris", "Juniper", "Kestrel", "Kite", "Lark", "Lotus", "Maple",
    "Moss", "Nimbus", "Nova", "Onyx", "Opal", "Quartz", "Quill", "Raven", "Ridge", "Sable", "Sage", "Thorn", "Topaz",
    "Vale", "Violet", "Willow", "Xenon", "Zephyr",
)  # fmt: skip
FIRST_NAMES = ("Amanda", "David", "Greta", "Maria", "Oscar", "Paula", "Tara", "Victor", "Wendy")
LAST_NAMES = ("Mason", "Norton", "Reed", "Stone")
CITIES = ("Austin", "Chicago", "Dublin", "Lima", "Lisbon", "London", "Madrid", "Oslo", "Quito", "Tokyo", "Vienna")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
ATTRIBUTES = ("access code", "manager", "city", "deadline")
HEADING = "Answer from the notes."
STATEMENTS = (
    "Project {project} has the {attribute} {value}.",
    "The {attribute} of project {project} is {value}.",
    "For project {project}, the {attribute} is {value}.",
    "{project}: {attribute} {value}.",
)
TAUGHT = (
    "What is the {attribute} of project {project}?",
    "Which {attribute} does project {project} have?",
    "What {attribute} does project {project} have?",
    "Give the {attribute} of {project}.",
)
HELD_OUT = ("Tell me the {attribute} for project {project}.", "{project} {attribute}?")
NUM_FACTS = 24


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact of a project."""

    project: str
    attribute: str
    value: str

    def fill(self, wording: str) -> str:
        """Return a statement or question about it."""
        return wording.format(project=self.project, attribute=self.attribute, value=self.value)


@dataclass(frozen=True, slots=True)
class Notes:
    """A context and what may be asked about it."""

    text: str
    facts: tuple[Fact, ...]

    def questions(self, wordings: tuple[str, ...]) -> list[dict[str, str]]:
        """Return a row (input, target) for every fact and wording, facts in turn."""
        return [{"input": fact.fill(wording), "target": fact.value} for wording in wordings for fact in self.facts]


def make_notes(seed: int, num_facts: int = NUM_FACTS) -> Notes:
    """Return notes of `num_facts` facts, a function of the seed; at most four for each of the 42 projects."""
    rng = random.Random(f"notes/{seed}")
    projects = rng.sample(PROJECTS, -(-num_facts // len(ATTRIBUTES)))
    facts = [Fact(project, name, _value(name, rng)) for project in projects for name in ATTRIBUTES][:num_facts]
    rng.shuffle(facts)
    return Notes(" ".join([HEADING, *(fact.fill(rng.choice(STATEMENTS)) for fact in facts)]), tuple(facts))


def write_notes(folder: Path, seed: int = 0) -> None:
    """Write notes.txt, questions.jsonl (four wordings) and test.jsonl (two others) into `folder`."""
    notes = make_notes(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notes.txt").write_bytes((notes.text + "\n").encode())
    for name, wordings in (("questions", TAUGHT), ("test", HELD_OUT)):
        lines = (json.dumps(row) + "\n" for row in notes.questions(wordings))
        (folder / f"{name}.jsonl").write_bytes("".join(lines).encode())


def _value(attribute: str, rng: random.Random) -> str:
    if attribute == "access code":
        return str(rng.randint(1000, 9999))
    if attribute == "manager":
        return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    return rng.choice(CITIES) if attribute == "city" else f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"


if __name__ == "__main__":
    write_notes(Path(sys.argv[1] if len(sys.argv) > 1 else "notes"), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
