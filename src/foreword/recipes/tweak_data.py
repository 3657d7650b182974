"""The rows of a tweak: what is added, what of the old still holds, and the mix that is trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from foreword.errors import DataError
from foreword.eval.tasks import Row, Task, read_rows, rows_sha256, sample_rows
from foreword.recipes.origin import Origin, read_split, write_rows
from foreword.train.data import Example, encode_rows

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.core.template import TaskTemplate

MIX_DEV_ROWS = 48
"""Old dev rows that early stopping looks at; as many of the new stand beside them, by the mix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TweakRows:
    """Old and new rows, apart; what contradicts the new ones is gone from the old."""

    old_train: list[Row]
    old_dev: list[Row]
    new_train: list[Row]
    new_dev: list[Row]
    num_replaced: int
    """Old rows with the input of an added row: the added one stands in their place."""
    num_dropped: int
    """Old rows whose answer is no longer right, as the user said."""

    @property
    def train(self) -> list[Row]:
        """All training rows, each once."""
        return [*self.old_train, *self.new_train]

    @property
    def dev(self) -> list[Row]:
        """All dev rows, each once."""
        return [*self.old_dev, *self.new_dev]


def read_tweak_rows(
    origin: Origin,
    add: str | Path,
    new_dev: str | Path | None,
    *,
    dev_share: float,
    drop_targets: Collection[str] = (),
    needs_old_train: bool = True,
    seed: int = 0,
) -> TweakRows:
    """Read the added rows and the version's own; hold out `dev_share` of the added ones where no `new_dev` is given.

    Raises DataError where the old dev set is gone (or the old training rows, if needed), where too few rows are added
    to hold one out, and where a dropped target is no old answer.
    """
    cure = "Give them: --old-dev dev.jsonl, or --task with the task file. Without them a loss would go unseen."
    old_dev = read_split(origin.task, "dev", origin.reference, cure)
    old_train: list[Row] = []
    if needs_old_train:
        cure = "Give the task file with --task, or train on the new rows alone: --rehearsal 0."
        old_train = read_split(origin.task, "train", origin.reference, cure)
    added = _of_task(origin.task, add)
    if new_dev is not None:
        new_train, held_out = added, _of_task(origin.task, new_dev)
    else:
        new_train, held_out = hold_out(added, dev_share, seed, add)
    if unknown := sorted(set(drop_targets) - {row.target for row in (*old_train, *old_dev)}):
        raise DataError(
            f"--drop-target {unknown[0]!r}: no old row has this answer", hint="Write it as it stands in the rows."
        )
    inputs = {_key(row) for row in (*new_train, *held_out)}
    kept = [[row for row in rows if _key(row) not in inputs] for rows in (old_train, old_dev)]
    right = [[row for row in rows if row.target not in drop_targets] for rows in kept]
    if not right[1]:
        raise DataError(
            f"none of the {len(old_dev)} old dev rows is left beside the added ones", hint="Give others: --old-dev."
        )
    num_kept = sum(map(len, kept))
    return TweakRows(
        old_train=right[0],
        old_dev=right[1],
        new_train=new_train,
        new_dev=held_out,
        num_replaced=len(old_train) + len(old_dev) - num_kept,
        num_dropped=num_kept - sum(map(len, right)),
    )


def hold_out(rows: Sequence[Row], share: float, seed: int, path: str | Path) -> tuple[list[Row], list[Row]]:
    """Return rows to train on and rows to judge on, drawn by `seed`. Raises DataError where one part would be empty."""
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise DataError(
            f"{path} holds {len(rows)} rows; with {share:.0%} of them held out none is left to train on",
            hint="Add rows, or give the rows to judge on with --new-dev.",
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    chosen = set(order[:count])
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def write_task(folder: Path, origin: Origin, rows: TweakRows) -> tuple[Task, Task, Task]:
    """Write the tweaked task's rows into `folder`; return the task, and it with the old and the new dev rows alone.

    New answers join the labels of a closed set, answers that no row has any more leave it.
    """
    files = {
        "train.jsonl": rows.train,
        "dev.jsonl": rows.dev,
        "dev.old.jsonl": rows.old_dev,
        "dev.new.jsonl": rows.new_dev,
    }
    for name, part in files.items():
        write_rows(folder / name, part)
    config = dataclasses.replace(
        origin.task.config,
        train=str(folder / "train.jsonl"),
        dev=str(folder / "dev.jsonl"),
        columns=None,
        labels=None,
    )
    if known := origin.task.config.labels or origin.artefact.header.labels:
        targets = [row.target for row in (*rows.train, *rows.dev)]
        dropped = set(known) - set(targets) if rows.num_dropped else set()
        labels = [label for label in dict.fromkeys([*known, *targets]) if label not in dropped]
        config = dataclasses.replace(config, labels=tuple(labels) if len(labels) > 1 else None)
    old, new = (dataclasses.replace(config, dev=str(folder / name)) for name in ("dev.old.jsonl", "dev.new.jsonl"))
    return Task(config), Task(old), Task(new)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Training material: the new rows, repeated, among a seeded sample of the old ones."""

    task: Task
    rows: TweakRows
    share: float
    """Of old rows in the mix, 0 to below 1."""
    num_rows: int
    """Rows that training will look at; no more old ones are drawn than their share of these."""
    seed: int = 0

    def mixed(self) -> list[Row]:
        """Return the rows of the mix: each new row as often as the share asks, at least once."""
        old = sample_rows(self.rows.old_train, max(1, round(self.num_rows * self.share)), self.seed)
        return _blend(old, self.rows.new_train, self.share)

    def examples(self, base: FrozenModel, template: TaskTemplate) -> tuple[list[Example], list[Example]]:
        """Return the mix as examples, and a mix of dev rows of the same share for early stopping."""
        dev = _blend(sample_rows(self.rows.old_dev, MIX_DEV_ROWS, self.seed), self.rows.new_dev, self.share)
        made: list[list[Example]] = []
        for rows in (self.mixed(), dev):
            unique = list({id(row): row for row in rows}.values())
            encoded = dict(zip(map(id, unique), encode_rows(base, self.task, template, unique), strict=True))
            made.append([encoded[id(row)] for row in rows])
        return made[0], made[1]

    def sha256(self) -> str:
        """Return the hash of the rows and of how they are mixed."""
        parts = rows_sha256(self.rows.train), rows_sha256(self.rows.dev), self.share, self.num_rows, self.seed
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def _blend(old: Sequence[Row], new: Sequence[Row], share: float) -> list[Row]:
    """Return old rows and as many of the new, repeated in turn, that the old are `share` of all."""
    if not share or not old:
        return list(new)
    count = max(len(new), round(len(old) * (1 - share) / share))
    return [*old, *(new[place % len(new)] for place in range(count))]


def _of_task(task: Task, path: str | Path) -> list[Row]:
    """Read rows that are to join a task, its column names holding; a new answer is no error here."""
    rows = read_rows(path, task.config.columns)
    for row in rows:
        if row.messages is not None and not task.config.chat:
            raise DataError(
                f"{path}, row {row.line}: a conversation, and task {task.name!r} is no chat",
                hint="Give input and target.",
            )
    return rows


def _key(row: Row) -> tuple[str, str]:
    return row.input, repr(row.messages)
