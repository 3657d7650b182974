"""Small notes on disk, and jobs over them, for the tests of this room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foreword.demo.make_notes import HELD_OUT, TAUGHT, make_notes
from foreword.distil.settings import DistilConfig, Job, train_config

FAST = {"steps": 6, "batch_size": 8, "warmup_steps": 2, "eval_every": 3}


def write_small(folder: Path, seed: int = 0, num_facts: int = 6) -> Path:
    """Write notes of a few facts, their questions and held-out ones; return the notes' path."""
    notes = make_notes(seed, num_facts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notes.txt").write_text(notes.text)
    for name, wordings in (("questions", TAUGHT), ("test", HELD_OUT)):
        rows = [json.dumps(row) + "\n" for row in notes.questions(wordings)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder / "notes.txt"


def job(notes: Path, train: dict[str, Any] | None = None, **given: Any) -> Job:
    """Return the job over `write_small`'s files; keywords are fields of [distil]."""
    settings: dict[str, Any] = {
        "context": str(notes),
        "name": "notes",
        "questions": str(notes.with_name("questions.jsonl")),
        "test": str(notes.with_name("test.jsonl")),
        "max_new_tokens": 8,
        **given,
    }
    return Job(DistilConfig(**settings), train_config({**FAST, **(train or {})}))
