"""From a finished run to its artefact: encoder folded away, conformance probe taken, everything it needs written in."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import foreword
from foreword.core.artefact import Artefact, ArtefactHeader, save_artefact
from foreword.core.compile import compile
from foreword.core.conformance import make_probes
from foreword.core.model import FrozenModel
from foreword.core.prompt import vectors_from_tensors
from foreword.train.sharing import Group
from foreword.train.state import RunState

if TYPE_CHECKING:
    from foreword.eval.tasks import Task

NUM_PROBES = 8


def export(base: FrozenModel, state: RunState, path: Path) -> Artefact:
    """Write the run's kept vectors as an artefact to `path` and return it."""
    return save_artefact(path, _header(base, state, state.best_tensors), state.best_tensors)


def export_shared(base: FrozenModel, group: Group, path: Path) -> Artefact:
    """Write a group's source, as it is after the last step, as an artefact: `init = "from:<path>"` starts from it.

    Block, template and probe are those of the first member; its task is the group's name, its training names all.
    """
    tensors, names = group.tensors(), [state.run.name for state in group.members]
    header = _header(base, group.members[0], tensors)
    training = {**header.training, "best": {"step": group.step, "by": "last", "value": None}, "shared_by": names}
    return save_artefact(path, dataclasses.replace(header, task=group.name, labels=(), training=training), tensors)


def _header(base: FrozenModel, state: RunState, tensors: Mapping[str, Tensor]) -> ArtefactHeader:
    run, config = state.run, state.run.task.config
    prefix = compile(base, vectors_from_tensors(tensors, state.block), name=config.name)
    rows = [row for row in state.dev or state.train if not row.slots][:NUM_PROBES]
    probes = [row.ids[: len(row.ids) - row.num_targets] for row in rows]
    return ArtefactHeader(
        method=run.config.method,
        task=config.name,
        block=state.block,
        soft_after=state.template.num_after,
        base=base.fingerprint,
        spec=base.spec,
        template={**state.template.to_json(), "sha256": state.template.sha256(base.tokenizer)},
        labels=run.task.labels(),
        metric=config.metric,
        max_new_tokens=config.max_new_tokens,
        training={
            **run.resolved()["train"],
            "status": state.status,
            "best": state.best,
            "steps_done": state.step,
            "rows": len(state.train),
            "data_sha256": run.data_sha256(),
            "task": task_record(run.task),
            "dtype": str(base.dtype).removeprefix("torch."),
            "versions": versions(),
        },
        parent=state.parent,
        conformance=make_probes(base, prefix, probes) if probes else (),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        foreword=foreword.__version__,
    )


def task_record(task: Task) -> dict[str, Any]:
    """Return the task's configuration with whole paths of its data: where a tweak finds the rows again."""
    record = task.config.to_json()
    places = {split: os.path.abspath(record[split]) for split in ("train", "dev", "test") if record[split] is not None}
    return record | places


def versions() -> dict[str, str]:
    """Return the versions that a number depends on."""
    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
