"""A tiny base with a tokenizer, a small task, and a registry with its versions: what recipes go out from."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from foreword.core.artefact import load_artefact, save_artefact
from foreword.core.model import FrozenModel
from foreword.registry.store import Registry
from foreword.train.loop import fit
from foreword.train.run import Run
from tests.bundled import BASE, write_task
from tests.tiny import tiny

FAST: dict[str, Any] = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "eval_every": 3, "lr": 0.05}
_KEPT = tempfile.TemporaryDirectory(prefix="foreword-recipes-")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(BASE)


def small(name: str = "llama", seed: int = 0) -> FrozenModel:
    """A random base of a few thousand parameters that reads text."""
    return tiny(name, seed=seed, vocab_size=4096, tokenizer=tokenizer())


@cache
def trained(
    name: str, methods: tuple[str, ...], task: str, steps: int, settings: tuple[tuple[str, Any], ...]
) -> dict[str, Path]:
    """Train a task once by each method, and keep the files as long as the process lives."""
    folder = Path(_KEPT.name) / f"{name}-{task}-{len(list(Path(_KEPT.name).iterdir()))}"
    written = write_task(folder / "data", task, **dict(settings))
    recipe = FAST | {"steps": steps}
    runs = [Run.from_toml(written, method=method, name=method, **recipe) for method in methods]
    results = fit(small(name), runs, out=folder / "out")
    return {result.name: result.artefact for result in results if result.artefact is not None}


def publish_trained(
    folder: Path,
    name: str = "llama",
    methods: tuple[str, ...] = ("kv",),
    task: str = "colour",
    steps: int = FAST["steps"],
    **settings: Any,
) -> Registry:
    """Publish a task trained on `small(name)` by each method, the first as prod; return the registry `folder/home`.

    Its rows are in `folder/data`, where the versions' headers look for them.
    """
    files = trained(name, methods, task, steps, tuple(settings.items()))
    write_task(folder / "data", task, **settings)
    registry = Registry.open(folder / "home")
    for place, (method, path) in enumerate(files.items()):
        artefact = load_artefact(path)
        training = dict(artefact.header.training)
        record = dict(training["task"])
        for split in ("train", "dev"):
            record[split] = str(folder / "data" / Path(record[split]).name)
        header = dataclasses.replace(artefact.header, training=training | {"task": record})
        save_artefact(folder / f"{task}-{method}.safetensors", header, artefact.tensors)
        alias = None if place else "prod"
        registry.publish(folder / f"{task}-{method}.safetensors", alias=alias, who="test")
    return registry


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"input": text, "target": target}) + "\n" for text, target in rows))
    return path


def purple(path: Path, num: int = 10, target: str = "purple") -> Path:
    """Rows that give one kind of text a new answer."""
    things = ["barn", "door", "bus"]
    return write_rows(path, [(f"the {'very ' * (i % 4)}new {things[i % 3]} {i} is violet", target) for i in range(num)])


def state(registry: Registry) -> list[Any]:
    """Everything that a registry says of its tasks, to see that nothing changed."""
    tasks = registry.tasks()
    return [
        (task, registry.versions(task.name), registry.aliases(task.name), registry.history(task.name)) for task in tasks
    ]
