"""The registry: publish artefacts as versions, name them by aliases, move aliases, go back, clean up.

A reference is `triage@7` (a number), `triage@canary` (an alias) or `triage` (the alias prod where it is set, else the
newest version). Every change is one transaction; a blob is stored before the row that names it, so that a crash or a
full disk at any point leaves at most a stray file, which `gc` collects.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import URL, func, select

from foreword.core.artefact import ArtefactHeader, read_header
from foreword.core.compiled import read_compiled_header
from foreword.errors import ConfigError, Conflict, NotFound, did_you_mean
from foreword.registry.access import Access
from foreword.registry.aliases import Gate, evaluation_refusal, move_alias, rollback_number
from foreword.registry.audit import signed
from foreword.registry.blobs import MARKER, Blobs, open_blobs, staged
from foreword.registry.compiled import find_compiled, insert_compiled, same_compiled
from foreword.registry.database import Database, open_engine
from foreword.registry.folders import home_folder
from foreword.registry.lookup import PROD, aliases_of, find, find_task, find_version
from foreword.registry.migrations import ensure_schema
from foreword.registry.records import (
    CompiledBlob,
    Difference,
    Freed,
    Move,
    Task,
    Version,
    check_compiled_header,
    check_header,
    check_name,
    difference,
    is_sha256,
    is_text,
    move_from_row,
    split_reference,
    version_from_row,
)
from foreword.registry.tables import AliasRow, MoveRow, RegistryRow, TaskRow, VersionRow
from foreword.registry.upkeep import collect
from foreword.registry.versions import delete_version, insert_version


class Registry:
    """Versions and aliases in a database, artefacts in a blob store. May be shared by threads; close it at the end."""

    def __init__(self, database: Database, blobs: Blobs, home: Path) -> None:
        self.home = home
        self.blobs = blobs
        self.access = Access(database)
        self._database = database
        self._is_owner = False

    @classmethod
    def open(
        cls, home: str | Path | None = None, *, database_url: str | None = None, blob_url: str | None = None
    ) -> Registry:
        """Open the registry, creating it or migrating it to this foreword's schema.

        `database_url` (sqlite:///file or postgresql://…) and `blob_url` (a folder or an fsspec URL) say where its parts
        are. Without them and without a `home` the environment does: FOREWORD_DATABASE_URL, FOREWORD_BLOB_URL. What
        nobody says is in the home (see `home_folder`), where also lies what is fetched.
        Raises ConfigError when one of them cannot be used, RegistryError when the schema is newer than this foreword or
        the database fails.
        """
        if home is None:
            database_url = database_url or os.environ.get("FOREWORD_DATABASE_URL")
            blob_url = blob_url or os.environ.get("FOREWORD_BLOB_URL")
        folder = home_folder(home)
        engine = open_engine(database_url or URL.create("sqlite", database=str(folder / "registry.sqlite")))
        try:
            ensure_schema(engine)
            return cls(Database(engine), open_blobs(blob_url or folder / "blobs", folder / "cache"), folder)
        except BaseException:
            engine.dispose()
            raise

    def close(self) -> None:
        """Close the database connections."""
        self._database.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def publish(
        self,
        artefact: str | Path,
        *,
        task: str | None = None,
        who: str | None = None,
        why: str = "",
        alias: str | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> Version:
        """Store an artefact as the next version of its task, and point `alias` at it in the same transaction.

        `task` defaults to the header's; so does `evaluation`, which an artefact judged after training lacks. A file
        that the task has already (same sha256, not deleted) gives that version again, with `is_new` False: its who and
        why stay, a lost blob is restored, the alias moves all the same. No gate is asked; `promote` is the gated way.
        Raises ArtefactError or ArtefactCorrupt when the file is none, ConfigError on a bad task or alias name, Conflict
        when the version has another evaluation, RegistryError when the disk is full; nothing is published then.
        """
        artefact = Path(artefact)
        check_header(header := read_header(artefact))
        name = check_name(header.task if task is None else task, "task")
        if alias is not None:
            check_name(alias, "alias")
        who, why = signed(who, why)
        with staged(artefact, self.blobs.staging) as copy:
            check_header(header := read_header(copy.path))  # of the copy, which nobody else can change
            if task is None and header.task != name:
                raise Conflict(f"{artefact} was replaced while it was read", hint="Publish it again.")
            self._claim_blobs()
            self.blobs.put(copy)
        with self._database.writing() as session:
            if not self.blobs.has(copy.sha256):
                raise Conflict(
                    f"{name}: the new blob {copy.sha256[:12]} was collected before its version was written",
                    hint="Publish again, and give gc a grace period longer than a publish takes.",
                )
            now = self._database.now(session)
            row, is_new = insert_version(session, now, name, header, copy, who=who, why=why, evaluation=evaluation)
            if alias is not None:
                move_alias(session, now, name, alias, row, action="tag", who=who, why=why)
            return replace(version_from_row(row), is_new=is_new)

    def resolve(self, reference: str) -> Version:
        """Return the version that "triage" (prod, else the newest), "triage@canary" or "triage@7" names now.

        "sha256:" and the digest of an artefact name the version that has it, the newest where several tasks have.
        Raises NotFound, with near names, when it names none.
        """
        with self._database.reading(statements=1) as session:
            return version_from_row(find(session, reference))

    def tasks(self) -> list[Task]:
        """Return all tasks by name, with counts and aliases."""
        with self._database.reading() as session:
            live = select(VersionRow.task, func.count(), func.max(VersionRow.number)).where(
                VersionRow.deleted.is_(None)
            )
            counts = {task: (count, newest) for task, count, newest in session.execute(live.group_by(VersionRow.task))}
            aliases: dict[str, dict[str, int]] = {}
            for row in session.scalars(select(AliasRow).order_by(AliasRow.name)):
                aliases.setdefault(row.task, {})[row.name] = row.number
            return [
                Task(
                    name=row.name,
                    num_versions=counts.get(row.name, (0, None))[0],
                    newest=counts.get(row.name, (0, None))[1],
                    aliases=aliases.get(row.name, {}),
                    created=row.created,
                )
                for row in session.scalars(select(TaskRow).order_by(TaskRow.name))
            ]

    def versions(self, task: str) -> list[Version]:
        """Return a task's versions, oldest first, without deleted ones. Raises NotFound when there is no such task."""
        with self._database.reading() as session:
            find_task(session, task)
            live = select(VersionRow).where(VersionRow.task == task, VersionRow.deleted.is_(None))
            return [version_from_row(row) for row in session.scalars(live.order_by(VersionRow.number))]

    def aliases(self, task: str) -> dict[str, int]:
        """Return a task's aliases and the numbers they point at. Raises NotFound when there is no such task."""
        with self._database.reading() as session:
            find_task(session, task)
            return aliases_of(session, task)

    def history(self, task: str, alias: str | None = None) -> list[Move]:
        """Return the moves of a task's aliases, or of one, oldest first.

        Raises NotFound when there is no such task, or the alias never was.
        """
        with self._database.reading() as session:
            find_task(session, task)
            moves = list(session.scalars(select(MoveRow).where(MoveRow.task == task).order_by(MoveRow.id)))
            if alias is not None and alias not in (known := {row.alias for row in moves}):
                raise NotFound(f"{task} never had an alias {alias!r}", hint=did_you_mean(alias, known))
            return [move_from_row(row) for row in moves if alias in (None, row.alias)]

    def tag(
        self, reference: str, alias: str, *, who: str | None = None, why: str = "", expect: int | None = None
    ) -> Move:
        """Point an alias at a version, without a gate; `promote` is the gated way.

        `expect` is the number that the alias must point at now (0: it must not be set). Where it points at the version
        already nothing is written, and the move that brought it there is returned with `is_new` False.
        Raises NotFound, ConfigError on a bad alias name, Conflict when `expect` does not hold.
        """
        check_name(alias, "alias")
        who, why = signed(who, why)
        with self._database.writing() as session:
            row = find(session, reference)
            now = self._database.now(session)
            return move_alias(session, now, row.task, alias, row, action="tag", who=who, why=why, expect=expect)

    def untag(self, task: str, alias: str, *, who: str | None = None, why: str = "", expect: int | None = None) -> Move:
        """Remove an alias; its history stays, and `rollback` brings it back. Raises NotFound, Conflict as `tag`."""
        who, why = signed(who, why)
        with self._database.writing() as session:
            find_task(session, task)
            if alias not in (known := aliases_of(session, task)):
                raise NotFound(f"{task} has no alias {alias!r}", hint=did_you_mean(alias, known))
            now = self._database.now(session)
            return move_alias(session, now, task, alias, None, action="untag", who=who, why=why, expect=expect)

    def promote(
        self,
        reference: str,
        alias: str = PROD,
        *,
        who: str | None = None,
        why: str = "",
        force: bool = False,
        gate: Gate | None = None,
    ) -> Move:
        """Point an alias at a version if it passes the gate.

        Two judges: the stored evaluations (`evaluation_refusal`), then `gate(candidate, current)`, which returns a
        reason to refuse or None and may take its time: no lock is held. `force` overrules the first, which is written
        down, and does not ask the second. A version that the alias points at already is not judged again.
        Raises NotFound, ConfigError on a bad alias name, and Conflict when a judge refuses, or when the alias was
        moved while they judged.
        """
        check_name(alias, "alias")
        with self._database.reading() as session:
            candidate = version_from_row(find(session, reference))
            row = session.get(AliasRow, (candidate.task, alias))
            current = version_from_row(find_version(session, candidate.task, row.number)) if row else None
        refusal = None
        if candidate != current:
            refusal = evaluation_refusal(candidate, current)
            if refusal is None and gate is not None and not force:
                refusal = gate(candidate, current)
        if refusal is not None and not force:
            raise Conflict(
                f"{candidate.reference} is not promoted to {alias}: {refusal}",
                hint="Train a better version, or force the promotion; the move then says that it was forced.",
            )
        who, why = signed(who, why)
        with self._database.writing() as session:
            return move_alias(
                session,
                self._database.now(session),
                candidate.task,
                alias,
                find_version(session, candidate.task, candidate.number),
                action="promote",
                who=who,
                why=why,
                expect=current.number if current else 0,
                forced=force,
                overruled=refusal or "",
            )

    def rollback(
        self, task: str, alias: str = PROD, *, who: str | None = None, why: str = "", expect: int | None = None
    ) -> Move:
        """Point an alias at the version that it pointed at before; again, and it goes further back, not to and fro.

        Versions deleted since are skipped. `expect` as in `tag`: with it, two people who roll back at once go one step.
        Raises NotFound when task or alias are not known, Conflict when nothing is left to go back to.
        """
        who, why = signed(who, why)
        with self._database.writing() as session:
            find_task(session, task)
            known = set(session.scalars(select(MoveRow.alias).where(MoveRow.task == task).distinct()))
            if alias not in known:
                raise NotFound(f"{task} has no alias {alias!r}", hint=did_you_mean(alias, known))
            number = rollback_number(session, task, alias)
            if number is None:
                raise Conflict(
                    f"{task}@{alias} has no earlier version to go back to",
                    hint=f"Point it at one with `tag`: `foreword list {task}` shows them.",
                )
            target = find_version(session, task, number)
            now = self._database.now(session)
            return move_alias(session, now, task, alias, target, action="rollback", who=who, why=why, expect=expect)

    def delete(self, reference: str, *, who: str | None = None, why: str = "") -> Version:
        """Delete a version, named by its number; return it. Its number is not used again, gc frees its blob.

        Raises NotFound, ConfigError when the reference has no number, Conflict while an alias or a route points at it.
        """
        task, selector = split_reference(reference)
        if not isinstance(selector, int):
            raise ConfigError(f"{reference!r} has no version number", hint=f"Say which: {task}@1, for example.")
        who, why = signed(who, why)
        with self._database.writing() as session:
            row = find(session, reference)
            delete_version(session, self._database.now(session), row, who=who, why=why)
            return version_from_row(row)

    def gc(self, grace_s: float = 3600, *, dry_run: bool = False, who: str | None = None) -> Freed:
        """Remove blobs of no version, and staged copies that a killed publisher left; return what was freed.

        A compiled file stays as long as a version has its source. Nothing younger than `grace_s` seconds is touched, so
        that a publish in flight is safe. Raises Conflict when the blob store belongs to another registry.
        """
        if not grace_s >= 0:
            raise ConfigError(f"a grace period of {grace_s} s", hint="Give 0 or more seconds.")
        who, _ = signed(who)
        self._is_owner = False  # asked anew: what gc removes is gone
        self._claim_blobs()
        return collect(self._database, self.blobs, grace_s, None if dry_run else who)

    def compiled(self, source: str, dtype: str) -> CompiledBlob | None:
        """Return the file compiled from an artefact, by its sha256, on its own base in a dtype; None if there is none.

        Also None where no live version has the source.
        """
        if not (is_sha256(source) and is_text(dtype)):
            return None
        with self._database.reading(statements=1) as session:
            return find_compiled(session, source, dtype)

    def add_compiled(self, path: str | Path) -> CompiledBlob:
        """Store a compiled file; one stored before for the same source, base and dtype is returned instead.

        Raises NotFound when no live version has the source, ArtefactError or ArtefactCorrupt when the file is none.
        """
        with staged(Path(path), self.blobs.staging) as copy:
            header = read_compiled_header(copy.path)
            check_compiled_header(header)
            with self._database.reading() as session:
                stored = same_compiled(session, header)
            if stored is not None and self.blobs.has(stored.sha256):
                return stored
            self._claim_blobs()
            self.blobs.put(copy)
        with self._database.writing() as session:
            stored = same_compiled(session, header)
            if stored is not None and self.blobs.has(stored.sha256):
                return stored
            if not self.blobs.has(copy.sha256):
                raise Conflict(f"the compiled file {copy.sha256[:12]} was collected", hint="Compile it again.")
            return insert_compiled(session, self._database.now(session), header, copy)

    def _claim_blobs(self) -> None:
        """Mark the blob store as this registry's, or raise Conflict: another one's gc would remove our blobs."""
        if self._is_owner:
            return
        with self._database.reading(statements=1) as session:
            mine = session.execute(select(RegistryRow.id)).scalar_one()
        if (owner := self.blobs.claim(mine)) != mine:
            raise Conflict(
                f"the blobs at {self.blobs.url} belong to the registry {owner}, this one is {mine}",
                hint=f"Give each registry a place of its own. If the other one is no more, remove {MARKER} there.",
            )
        self._is_owner = True

    def diff(self, a: str, b: str) -> Difference:
        """Return the fields in which the version `b` differs from `a`. Raises NotFound, and as `path` does."""
        left, right = self.resolve(a), self.resolve(b)
        return difference(left, right, self.header(left), self.header(right))

    def header(self, version: Version) -> ArtefactHeader:
        """Return the header of a version's artefact. Raises as `path` does."""
        return read_header(self.path(version))

    def path(self, version: Version) -> Path:
        """Return a local file with a version's artefact, its sha256 proved now.

        Raises ArtefactCorrupt when the blob was changed, with both digests, and RegistryError when it is gone.
        """
        return self.blobs.fetch(version.sha256)


__all__ = ["PROD", "Difference", "Freed", "Gate", "Move", "Registry", "Task", "Version", "home_folder"]
