"""From a finished run to its artefact: encoder folded away, conformance probe taken, everything it needs written in."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import foreword
from foreword.core.artefact import Artefact, ArtefactHeader, save_artefact
from foreword.core.compile import compile
from foreword.core.conformance import make_probes
from foreword.core.model import FrozenModel
from foreword.core.prompt import vectors_from_tensors
from foreword.train.state import RunState

NUM_PROBES = 8


def export(base: FrozenModel, state: RunState, path: Path) -> Artefact:
    """Write the run's kept vectors as an artefact to `path` and return it."""
    run, config = state.run, state.run.task.config
    prefix = compile(base, vectors_from_tensors(state.best_tensors, state.block), name=config.name)
    rows = [row for row in state.dev or state.train if not row.slots][:NUM_PROBES]
    probes = [row.ids[: len(row.ids) - row.num_targets] for row in rows]
    header = ArtefactHeader(
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
            "dtype": str(base.dtype).removeprefix("torch."),
            "versions": versions(),
        },
        parent=state.parent,
        conformance=make_probes(base, prefix, probes) if probes else (),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        foreword=foreword.__version__,
    )
    return save_artefact(path, header, state.best_tensors)


def versions() -> dict[str, str]:
    """Return the versions that a number depends on."""
    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
