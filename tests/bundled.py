"""The bundled base and small tasks made on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import foreword.demo
from foreword.core.model import FrozenModel, load_base

BASE = Path(foreword.demo.__file__).parent / "base-3m"


@cache
def bundled(dtype: str = "float32") -> FrozenModel:
    """Return the bundled base, loaded once."""
    return load_base(str(BASE), dtype=dtype)


def write_task(folder: Path, name: str = "colour", rows: int = 48, **task: object) -> Path:
    """Write a tiny task (the last word's colour class) and its TOML; return the TOML's path."""
    words = {"warm": ["red", "orange", "yellow"], "cold": ["blue", "green", "violet"]}
    made = []
    for index in range(rows):
        label = ("warm", "cold")[index % 2]
        text = f"the {'very ' * (index % 5)}old {['house', 'cart', 'boat'][index % 3]} is {words[label][index % 3]}"
        made.append(json.dumps({"input": text, "target": label}))
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", made[: rows * 2 // 3]), ("dev", made[rows * 2 // 3 :])):
        (folder / f"{name}.{split}.jsonl").write_text("\n".join(part) + "\n")
    settings = {
        "name": name,
        "train": f"{name}.train.jsonl",
        "dev": f"{name}.dev.jsonl",
        "template": "{soft:4}{input}",
        "chat": True,
        "max_new_tokens": 8,
        **task,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    path = folder / f"{name}.toml"
    path.write_text("[task]\n" + "\n".join(lines) + "\n")
    return path
