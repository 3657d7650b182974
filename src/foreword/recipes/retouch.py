"""`retouch`: the tweak without training: other hard text around the same vectors, judged and published."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import foreword
from foreword.core.artefact import Artefact, save_artefact
from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.conformance import make_probes
from foreword.core.prompt import SoftKV, Vectors
from foreword.core.template import SLOT, TaskTemplate
from foreword.doctor.rotation import rotations, turned
from foreword.errors import ConfigError
from foreword.eval.tasks import Task
from foreword.recipes.judging import Decoding, engine_with, publish_candidate
from foreword.recipes.origin import Origin, check_publishable, live_version, open_origin, read_split
from foreword.recipes.tweak import NEW, OLD, TweakResult, check_empty, check_same_base, judge_rows
from foreword.train.export import NUM_PROBES, task_record

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.registry.store import Registry


def retouch(
    registry: Registry,
    base: FrozenModel | Callable[[], FrozenModel],
    task: str,
    template: str,
    *,
    out: str | Path,
    system: str | None = None,
    new_dev: str | Path | None = None,
    start: str | None = None,
    task_file: str | Path | None = None,
    old_dev: str | Path | None = None,
    eval_rows: int | None = 200,
    decoding: Decoding = "auto",
    publish: bool = True,
    who: str | None = None,
    why: str = "",
) -> TweakResult:
    """Put a task's live vectors into another template, judge that against the live version, publish a candidate.

    `template` has the slots of the version's own, in number and length; `system` replaces the task's system turn. The
    vectors stay as they are; where those of a `kv` come to stand elsewhere, their keys are turned to the new positions.
    Raises as `tweak` does, and ConfigError where the slots are others or nothing changes.
    """
    folder = Path(out)
    version = live_version(registry, task, start)
    if publish:
        check_publishable(registry, version.task)
    origin = open_origin(registry, version, task_file=task_file, dev=old_dev)
    new = dataclasses.replace(
        origin.template, text=template, system=origin.template.system if system is None else system
    )
    check_slots(origin.template, new)
    cure = "Give them: --old-dev dev.jsonl, or --task with the task file. Without them a loss would go unseen."
    read_split(origin.task, "dev", origin.reference, cure)
    check_empty(folder)
    frozen = base() if callable(base) else base
    check_same_base(frozen, origin)
    edited = Task(dataclasses.replace(origin.task.config, template=new.text, system=new.system))
    artefact, notes = write_retouched(frozen, origin, edited, folder / f"{version.task}-{version.method}.safetensors")
    engine = engine_with(frozen, {"current": origin.artefact, "candidate": artefact})
    sets: dict[str, tuple[Task, int | None]] = {OLD: (edited, eval_rows)}
    if new_dev is not None:
        sets[NEW] = (Task(dataclasses.replace(edited.config, dev=str(new_dev))), None)
    reports, paired = judge_rows(engine, sets, decoding)
    published = None
    assert artefact.path is not None
    if publish:
        said = why or f"template {new.text!r} in place of {origin.template.text!r}"
        published = publish_candidate(registry, artefact, origin, reports[OLD][0], paired, who=who, why=said)
    return TweakResult(
        current=version.reference,
        artefact=artefact.path,
        paired=paired,
        reports=reports,
        version=published,
        notes=tuple(notes),
    )


def with_hard_text(template: TaskTemplate, text: str) -> str:
    """Return a template's text with its one slot in front, then `text`, then the input.

    Raises ConfigError where the template has hard text of its own or several slots, so that it is not clear where the
    new text goes.
    """
    left, _, right = template.text.partition("{input}")
    slots = [match.group() for match in SLOT.finditer(left)]
    if len(slots) != 1 or right or not left.startswith(slots[0]):
        raise ConfigError(
            f"where hard text goes is not clear in the template {template.text!r}",
            hint="Write the whole template: --template.",
        )
    escaped = text.replace("{", "{{").replace("}", "}}")
    return f"{slots[0]}{escaped}\n{{input}}" if escaped else f"{slots[0]}{{input}}"


def check_slots(old: TaskTemplate, new: TaskTemplate) -> None:
    """Raise ConfigError where the slots differ in number, length or side, or where the templates do not differ."""
    had, has = _slots(old), _slots(new)
    if had != has:
        before, after = (" ".join(f"{{soft:{n}}}" for part in sides for n in part) or "no slot" for sides in (had, has))
        raise ConfigError(
            f"the version's vectors fill {before} of {old.text!r}, the new template {new.text!r} has {after}",
            hint="Keep the slots as they are, each on its side of {input}; only hard text can change without training.",
        )
    if old == new:
        raise ConfigError(f"the template {new.text!r} is the version's own", hint="Change its hard text.")


def _slots(template: TaskTemplate) -> list[list[str]]:
    """Return the slots' lengths: in front of all turns, in the system turn, left and right of the input."""
    left, _, right = template.text.partition("{input}")
    lead = re.match(f"(?:{SLOT.pattern})*", left) if template.chat and template.system else None
    cut = lead.end() if lead else 0
    return [SLOT.findall(part) for part in (left[:cut], template.system or "", left[cut:], right)]


def write_retouched(base: FrozenModel, origin: Origin, task: Task, path: Path) -> tuple[Artefact, list[str]]:
    """Write the version's vectors with the template of `task` to `path`; return the artefact and what is to be told."""
    header, template = origin.artefact.header, task.template
    block = template.block(base.tokenizer)
    base.check_holds(block.num_positions)
    vectors, notes = moved(base, origin.artefact.vectors, block)
    prefix = compile(base, vectors, name=header.task)
    rows = [template.render(base.tokenizer, row.input) for row in task.rows("dev") if row.messages is None]
    probes = [row.ids for row in rows if not row.slots][:NUM_PROBES]
    shown = {**template.to_json(), "sha256": template.sha256(base.tokenizer)}
    training = {
        **header.training,
        "task": task_record(task),
        "retouched": {"of": origin.version.sha256, "template": template.to_json()},
    }
    header = dataclasses.replace(
        header,
        block=block,
        template=shown,
        training=training,
        parent=origin.version.sha256,
        evaluation={},
        conformance=make_probes(base, prefix, probes) if probes else (),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        foreword=foreword.__version__,
    )
    return save_artefact(path, header, vectors.tensors()), notes


def moved(base: FrozenModel, vectors: Vectors, block: Block) -> tuple[Vectors, list[str]]:
    """Return vectors in another block with the same number of slots.

    The keys of a `kv` lie rotated for the positions where they stood: they are turned to those of `block`, if the base
    rotates keys at all.
    """
    if not isinstance(vectors, SoftKV):
        return dataclasses.replace(vectors, block=block), []
    assert vectors.block is not None
    before, after = vectors.block.soft_positions(), block.soft_positions()
    put = dataclasses.replace(vectors, block=block)
    if before == after:
        return put, []
    told = f"The vectors stand at positions {after[0]} to {after[-1]}, before at {before[0]} to {before[-1]}"
    turns = rotations(base)
    if turns is None:
        return put, [f"{told}; this base does not rotate keys, they stay as they are."]
    steps = [new - old for new, old in zip(after, before, strict=True)]
    return turned(put, turns, steps), [f"{told}; their keys were turned there."]
