"""A published version with what it takes to train it again: its vectors, its task's rows, its recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from foreword.config import OptimizerName, TaskConfig, TrainConfig, load_task
from foreword.core.artefact import Artefact, ArtefactHeader, load_artefact, write_atomically
from foreword.core.template import TaskTemplate
from foreword.errors import ConfigError, Conflict, DataError, NotFound
from foreword.eval.read import is_there
from foreword.eval.tasks import Row, Split, Task
from foreword.registry.lookup import PROD
from foreword.train.run import default_lr

if TYPE_CHECKING:
    from foreword.registry.store import Registry, Version

CANDIDATE = "candidate"
"""The alias that recipes give to what they publish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A version that a recipe goes out from."""

    version: Version
    artefact: Artefact
    task: Task
    """Its task: template, labels and metric of the version, rows from its own record or from a task file."""
    recipe: TrainConfig
    """What its task was trained with at first; a tweak does not change it."""

    @property
    def reference(self) -> str:
        """The version's name, for example triage@7."""
        return self.version.reference

    @property
    def template(self) -> TaskTemplate:
        """The template that its vectors were trained for."""
        return self.task.template


def live_version(registry: Registry, task: str, start: str | None = None) -> Version:
    """Return the version that a task's alias prod names, or the one that `start` names ("3", "canary", "triage@3").

    Raises NotFound where there is no such task, alias or version.
    """
    if start is not None:
        return registry.resolve(start if "@" in start or start.startswith("sha256:") else f"{task}@{start}")
    try:
        return registry.resolve(f"{task}@{PROD}")
    except NotFound as error:
        hint = error.hint
        if task in {known.name for known in registry.tasks()}:
            hint = (
                f"Say which version serves: `foreword tag {task}@1 {PROD}`. Or start from one of your choice: --from."
            )
        elif not hint:
            hint = (
                f"The registry {registry.home} holds no tasks; `foreword publish FILE --alias {PROD}` makes the first."
            )
        raise NotFound(error.message, hint=hint) from error


def check_publishable(registry: Registry, task: str) -> None:
    """Raise Conflict where a new version of `task` would be served at once, for want of an alias prod."""
    aliases = {known.name: known.aliases for known in registry.tasks()}
    if task not in aliases or PROD not in aliases[task]:
        raise Conflict(
            f"{task} has no alias {PROD}: its newest version is served, so a candidate would go live unasked",
            hint=f"Name the version that serves: `foreword tag {task}@1 {PROD}`. Or train without publishing.",
        )


def open_origin(
    registry: Registry, version: Version, *, task_file: str | Path | None = None, dev: str | Path | None = None
) -> Origin:
    """Return a version with its vectors, task and recipe; `task_file` and `dev` stand above what its header says.

    Raises ConfigError where the header does not name a task and none is given, or the file's template is another.
    """
    artefact = load_artefact(registry.path(version))
    task = task_of(artefact.header, version.reference, task_file)
    config = dataclasses.replace(task.config, name=version.task, dev=str(dev) if dev else task.config.dev)
    return Origin(version=version, artefact=artefact, task=Task(config), recipe=recipe_of(artefact.header))


def task_of(header: ArtefactHeader, reference: str, task_file: str | Path | None = None) -> Task:
    """Return the task of an artefact: its own record, or a task file, with the template it was trained for."""
    template = None if header.template is None else TaskTemplate.from_json(header.template)
    if task_file is not None:
        config, _ = load_task(task_file)
        given = TaskTemplate(config.template, config.chat, config.system)
        if template is not None and given.hard() != template.hard():
            raise ConfigError(
                f"{reference} was trained for the template {template.text!r} (system {template.system!r}, "
                f"chat {template.chat}), {task_file} has {given.text!r} (system {given.system!r}, chat {given.chat})",
                hint="Give the task file that it was trained with; `foreword tweak --template` edits the hard text.",
            )
    elif isinstance(record := header.training.get("task"), Mapping):
        config = TaskConfig.from_mapping(record, source=f"{reference}: its header")
        if header.labels and config.labels is None:
            config = dataclasses.replace(config, labels=tuple(header.labels))
    else:
        raise ConfigError(
            f"{reference} does not say on which rows it was trained", hint="Give its task file: --task task.toml."
        )
    if template is not None:
        config = dataclasses.replace(config, template=template.text, chat=template.chat, system=template.system)
    if header.max_new_tokens is not None:
        config = dataclasses.replace(config, max_new_tokens=header.max_new_tokens)
    return Task(config)


def recipe_of(header: ArtefactHeader) -> TrainConfig:
    """Return the settings that a version's task was trained with at first, its method's defaults where it has none.

    Its vectors' number is the template's, its start the recipe's own, where it was not from given vectors.
    """
    stored = header.training.get("recipe", header.training)
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    settings = {key: value for key, value in stored.items() if key in known} | {"method": header.method}
    if str(settings.get("init", "")).startswith("from:") or settings.get("init") == "given vectors":
        settings["init"] = None
    if settings.get("share") is not None:  # a group of tasks trains together or not at all; each goes on by itself
        settings |= {"share": None, "encoder": "none", "rank": 1, "lr": None}
    config = TrainConfig.from_mapping(settings, source="the header's training settings")
    return dataclasses.replace(config, num_vectors=None)


def continued(recipe: TrainConfig, *, steps: int, lr_factor: float, patience: int | None, seed: int) -> TrainConfig:
    """Return a recipe's settings for training on from its own vectors: short, without encoder, with an early stop.

    Dev loss is looked at six times, and picks the vectors that are kept.
    """
    return dataclasses.replace(
        recipe,
        init=None,
        encoder="none",
        optimizer=restart_optimizer(recipe),
        rank=1,
        share=None,
        lr=restart_lr(recipe) * lr_factor,
        steps=steps,
        warmup_steps=min(recipe.warmup_steps, max(1, steps // 10)),
        eval_every=max(1, steps // 6),
        patience=patience,
        best_by="loss",
        seed=seed,
    )


def restart_lr(recipe: TrainConfig) -> float:
    """Return the recipe's learning rate for the vectors themselves: an encoder's is of another kind."""
    own = recipe.lr if recipe.encoder == "none" else None
    return own or default_lr(dataclasses.replace(recipe, encoder="none", optimizer=restart_optimizer(recipe)))


def restart_optimizer(recipe: TrainConfig) -> OptimizerName | None:
    """Return the recipe's optimizer for the vectors themselves; None, the default, where it was an encoder's."""
    return recipe.optimizer if recipe.encoder == "none" else None


def read_split(task: Task, split: Split, reference: str, cure: str) -> list[Row]:
    """Return a split's rows. Raises DataError with `cure` where the task names no such file, or it is gone."""
    path = {"train": task.config.train, "dev": task.config.dev, "test": task.config.test}[split]
    name = {"train": "training rows", "dev": "dev rows", "test": "test rows"}[split]
    if path is None:
        raise DataError(f"{reference} was trained without {name}", hint=cure)
    if not is_there(path):
        raise DataError(f"{reference}: its {name} are gone, there is no {path}", hint=cure)
    return task.rows(split)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL, whole: `read_rows` gives them back, but for their places."""
    write_atomically(path, "".join(json.dumps(row.record(), ensure_ascii=False) + "\n" for row in rows).encode())
