"""Writes the four demo tasks: `python -m foreword.demo.make_tasks [folder]`. Seeded, standard library only.

Every row is put together from the phrases in `phrases.toml`: a *frame* (a sentence with `[choice|choice]` and `{value}`
gaps), values for its gaps, and around it greetings, asides and details. An aside names the matter of another label, or
a decoy value, so that no single key word settles a row; the words around it do.

**Splits.** Every pool of phrases and values is cut into three disjoint shares: train, dev, test. Train rows draw from
the train share only. Of the dev rows, and of the test rows, the part `NEW_SHARE` draws *everything* (frames, asides,
greetings, names, amounts, topics) from the share of its own split; the others recombine the train share. So the
wordings of test are unknown to train and to dev. No input occurs twice, within a split or across splits. Closed sets
stay closed: labels, weekdays, months, letters, ranks.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROWS = {"train": 600, "dev": 80, "test": 120}
NEW_SHARE = 0.6
"""Part of the dev and test rows made of phrases and values that no train row has."""

Row = dict[str, str]


def _pools(value: Any) -> Any:
    """What `phrases.toml` says, each pool as its three shares: a closed set whole in all, numbers cut by remainder."""
    if isinstance(value, list):
        return dict.fromkeys(ROWS, value)
    if not isinstance(value, dict) or value.keys() == ROWS.keys():
        return value
    if "low" in value:
        numbers = range(value["low"], value["high"])
        remainders = {"train": (0, 1), "dev": (2,), "test": (3,)}
        return {split: [value["form"].format(n) for n in numbers if n % 4 in remainders[split]] for split in ROWS}
    return {name: _pools(part) for name, part in value.items()}


PHRASES: dict[str, Any] = _pools(tomllib.loads(Path(__file__).with_name("phrases.toml").read_text("utf-8")))
VALUES, LETTERS, TRIAGE, CLAUSE, HANDBOOK, ORDERS = PHRASES.values()
MESSAGES, CLAUSES, FACTS = TRIAGE["messages"], CLAUSE["clauses"], HANDBOOK["facts"]


def write_tasks(folder: Path) -> None:
    """Write `<task>/{train,dev,test}.jsonl` and `<task>/<task>.toml` for the four tasks under `folder`.

    The same bytes each time, on every platform. Existing files of these names are replaced.
    """
    for task, (make, settings) in TASKS.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, rows in _splits(task, make).items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / task / f"{split}.jsonl").write_bytes(text.encode())
        (folder / task / f"{task}.toml").write_bytes(_toml(task, settings).encode())


def _splits(task: str, make: Callable[[random.Random, str, int], Row]) -> dict[str, list[Row]]:
    """All rows of a task by split; `make(rng, share, index)` makes one row, its class chosen by the running index."""
    used: set[str] = set()
    splits: dict[str, list[Row]] = {}
    for split, num_rows in ROWS.items():
        rng = random.Random(f"foreword demo, {task}, {split}")
        rows: list[Row] = []
        num_new = round(num_rows * NEW_SHARE)
        while len(rows) < num_rows:
            row = make(rng, split if len(rows) < num_new else "train", len(rows))
            if (key := row["input"].lower()) not in used:
                used.add(key)
                rows.append(row)
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def _toml(task: str, settings: Mapping[str, object]) -> str:
    """The task file; JSON strings, numbers and lists are TOML too."""
    files = {split: f"{split}.jsonl" for split in ROWS}
    table = {"name": task, **files, "template": "{soft:20}{input}", "chat": True, **settings}
    return "[task]\n" + "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in table.items())


def _fill(rng: random.Random, share: str, frame: str, **given: str) -> str:
    """Settle each `[a|b]` and fill each `{gap}`: from `given`, else from the pool of that name."""
    while "[" in frame:
        frame = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), frame)

    def value(match: re.Match[str]) -> str:
        gap = match[1]
        if gap in given:
            return given[gap]
        return str(rng.choice(VALUES[gap][share]))

    text = re.sub(r"\{(\w+)\}", value, frame)
    return re.sub(r"\ba (?=[aeio])", "an ", text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _typo(rng: random.Random, text: str, keep: str = "") -> str:
    """Swap, drop or double one letter inside one longer lower-case word that is not part of `keep`."""
    words = [match for match in re.finditer(r"\b[a-z]{5,}\b", text) if match[0] not in keep]
    if not words:
        return text
    at = (word := rng.choice(words)).start() + rng.randrange(1, len(word[0]) - 2)
    pair = text[at : at + 2]
    return text[:at] + rng.choice([pair[::-1], pair[0], pair[0] + pair]) + text[at + 2 :]


# triage -------------------------------------------------------------------------------------------------------------


def _letter(rng: random.Random, share: str, body: str) -> str:
    """Put a greeting and a closing, each on a line of its own, around some of the messages."""
    greeting = rng.choice(LETTERS["greetings"][share]) + "\n" if rng.random() < 0.3 else ""
    closing = "\n" + rng.choice(LETTERS["closings"][share]) if rng.random() < 0.2 else ""
    return greeting + body + closing


def _triage(rng: random.Random, share: str, index: int) -> Row:
    """A message of 8 to 40 words with one matter, often beside a settled matter of another team."""
    label = list(MESSAGES)[index % len(MESSAGES)]
    body = [rng.choice(MESSAGES[label][share])]
    if rng.random() < 0.5:
        body.append(rng.choice(TRIAGE["follows"][label][share]))
    if rng.random() < 0.3:
        other = rng.choice([name for name in TRIAGE["asides"] if name != label])
        body.insert(rng.choice([0, 0, len(body)]), rng.choice(TRIAGE["asides"][other][share]))
    if rng.random() < 0.15:
        body.insert(rng.choice([0, len(body)]), rng.choice(TRIAGE["details"][share]))
    text = _fill(rng, share, _letter(rng, share, " ".join(body)))
    if rng.random() < 0.08:
        text = _typo(rng, text)
    if rng.random() < 0.04:
        text = text.lower()
    if not 8 <= len(text.split()) <= 40:
        return _triage(rng, share, index)
    return {"input": text, "target": label}


# clause -------------------------------------------------------------------------------------------------------------


def _clause(rng: random.Random, share: str, index: int) -> Row:
    """A clause of 15 to 45 words, often behind a lead-in that names the matter of another clause."""
    label = list(CLAUSES)[index % len(CLAUSES)]
    first, second = rng.choice(CLAUSE["parties"][share]).split(" + ")
    core = rng.choice(CLAUSES[label][share])
    if rng.random() < 0.55:
        other = rng.choice([name for name in CLAUSE["leads"] if name != label])
        core = rng.choice(CLAUSE["leads"][other][share]) + " " + core
    text = _fill(rng, share, core, A=first, B=second)
    parts = [_capital(text) + "."]
    if rng.random() < 0.4:
        parts.append(_capital(_fill(rng, share, rng.choice(CLAUSE["tails"][share]), A=first, B=second)))
    if rng.random() < 0.25:
        parts.insert(0, _fill(rng, share, "{section}.{section}"))
    text = " ".join(parts)
    if not 15 <= len(text.split()) <= 45:
        return _clause(rng, share, index)
    return {"input": text, "target": label}


# handbook -----------------------------------------------------------------------------------------------------------


def _handbook(rng: random.Random, share: str, index: int) -> Row:
    """Two or three facts on one or two topics, and a question about one; the answer is a span of the excerpt.

    A third of the rows hold the asked kind of fact for both topics, so that the topic decides; elsewhere the kind does.
    """
    kind = list(FACTS)[index % len(FACTS)]
    topic, second = rng.sample(HANDBOOK["topics"][share], 2)
    others = rng.sample([name for name in FACTS if name != kind], 2)
    asked, *rest = rng.choice([
        [(topic, kind), (second, kind)],
        [(topic, kind), (second, kind), (topic, others[0])],
        [(topic, kind), (topic, others[0])],
        [(topic, kind), (topic, others[0]), (topic, others[1])],
        [(topic, kind), (topic, others[0]), (second, others[1])],
        [(topic, kind), (second, others[0])],
    ])  # fmt: skip
    values = {name: [_fill(rng, share, FACTS[name]["value"]) for _ in range(2)] for name in FACTS}
    sentences = []
    for about, fact in [asked, *rest]:
        frame = rng.choice(FACTS[fact]["statements"][share])
        sentences.append(_capital(_fill(rng, share, frame, t=about, v=values[fact][about == second])))
    rng.shuffle(sentences)
    if len(sentences) == 2 and rng.random() < 0.3:
        sentences.append(_fill(rng, share, rng.choice(HANDBOOK["remarks"][share])))
    policy, answer = " ".join(sentences), values[kind][0]
    if len(re.findall(rf"\b{answer}\b", policy)) != 1:  # the same value by chance in a second fact
        return _handbook(rng, share, index)
    question = _fill(rng, share, rng.choice(FACTS[kind]["questions"][share]), t=topic)
    return {"input": f"Policy: {policy}\nQuestion: {question}", "target": answer}


# order_slots --------------------------------------------------------------------------------------------------------

ORDER_KINDS = ["size", "size colour", "size city", "size colour city", ""]


def _order_slots(rng: random.Random, share: str, index: int) -> Row:
    """An order with 1 to 3 slots, or a message without an order ("none"); a quarter has a decoy value beside it."""
    slots = ORDER_KINDS[index % len(ORDER_KINDS)].split()
    pools = {"size": ORDERS["sizes"][share], "colour": ORDERS["colours"][share], "city": VALUES["city"][share]}
    picked = {slot: rng.sample(pool, 2) for slot, pool in pools.items()}
    gold = {slot: picked[slot][0] for slot in slots}
    gaps = {"garment": rng.choice(ORDERS["garments"][share]), "name": rng.choice(VALUES["name"][share])}
    if slots:
        thing = rng.choice(ORDERS["things"][" ".join(slot for slot in slots if slot != "city")][share])
        place = rng.choice(ORDERS["places"][share]) if "city" in slots else ""
        wish = rng.choice(ORDERS["wishes"][share]).replace("{thing}", thing)
        text = wish + (" " if place[:1].isalpha() else "") + place
        text = _fill(rng, share, text, **gaps, **gold).strip()
        main = _capital(text) + ("?" if text.startswith(("can", "could")) else ".")
    else:
        main = _fill(rng, share, rng.choice(ORDERS["chatter"][share]), **gaps)
    parts = [main]
    if rng.random() < 0.25:
        slot = rng.choice(list(ORDERS["decoys"]))
        frame = rng.choice(ORDERS["decoys"][slot][share])
        decoy = _fill(rng, share, frame, name=gaps["name"], **{slot: picked[slot][1]})
        parts.insert(rng.randrange(2), _capital(decoy))
    text = _fill(rng, share, _letter(rng, share, " ".join(parts)))
    if rng.random() < 0.08:
        values = " ".join(value for pool in pools.values() for value in pool)
        text = _typo(rng, text, keep=values)
    return {"input": text, "target": "; ".join(f"{slot}: {value}" for slot, value in gold.items()) or "none"}


def _one_of(labels: Mapping[str, object]) -> str:
    return "Answer with one of: " + ", ".join(labels) + "."


TASKS: dict[str, tuple[Callable[[random.Random, str, int], Row], dict[str, object]]] = {
    "triage": (_triage, {
        "metric": "exact_match", "labels": list(MESSAGES), "max_new_tokens": 6,
        "hard_text": f"Which team should answer this message? {_one_of(MESSAGES)}",
    }),
    "clause": (_clause, {
        "metric": "exact_match", "labels": list(CLAUSES), "max_new_tokens": 8,
        "hard_text": f"Which type of contract clause is this? {_one_of(CLAUSES)}",
    }),
    "handbook": (_handbook, {
        "metric": "token_f1", "max_new_tokens": 12,
        "hard_text": "Answer the question with the exact words of the policy, as short as possible.",
    }),
    "order_slots": (_order_slots, {
        "metric": "exact_match", "max_new_tokens": 24,
        "hard_text": "Write the size, colour and city of the order, as in size: 40; colour: red; city: York. Leave "
        "out what is not named, and answer none if nothing is ordered.",
    }),
}  # fmt: skip
"""task -> its row maker, and what its task file says beside names and files"""


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tasks")
