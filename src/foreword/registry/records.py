"""What the registry hands out: immutable records, and the names that they go by."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from foreword.core.artefact import ArtefactHeader
from foreword.core.compiled import CompiledHeader
from foreword.core.spec import Fingerprint
from foreword.errors import ArtefactCorrupt, ConfigError
from foreword.registry.tables import MoveRow, VersionRow

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One published artefact of a task. Nothing in it ever changes."""

    task: str
    number: int
    """1, 2, 3, … within the task, never used twice."""
    sha256: str
    """Identity of the artefact's file, and its key among the blobs."""
    method: str
    num_vectors: int
    """P, with those behind the input."""
    num_bytes: int
    """Of the whole file."""
    base: Fingerprint
    """The base that the vectors belong to."""
    parent: str | None
    """sha256 of the artefact that training started from."""
    evaluation: Mapping[str, Any]
    """As published, by default the header's; a number that is NaN or Inf there is None here."""
    who: str
    why: str
    created: datetime
    """When it was published, UTC."""
    is_new: bool = field(default=False, compare=False)
    """Set by `publish` on the version that it made; False where the same file was published before."""

    @property
    def reference(self) -> str:
        """The version's name, for example triage@7."""
        return f"{self.task}@{self.number}"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "task": self.task,
            "number": self.number,
            "sha256": self.sha256,
            "method": self.method,
            "num_vectors": self.num_vectors,
            "num_bytes": self.num_bytes,
            "base": self.base.to_json(),
            "parent": self.parent,
            "evaluation": dict(self.evaluation),
            "who": self.who,
            "why": self.why,
            "created": self.created.isoformat(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task as it stands."""

    name: str
    num_versions: int
    """Those not deleted."""
    newest: int | None
    """The highest number that is not deleted; None where all are."""
    aliases: Mapping[str, int]
    created: datetime

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "name": self.name,
            "num_versions": self.num_versions,
            "newest": self.newest,
            "aliases": dict(self.aliases),
            "created": self.created.isoformat(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One move of an alias."""

    task: str
    alias: str
    action: str
    """tag, untag, promote or rollback."""
    from_number: int | None
    """None where the alias was not set."""
    to_number: int | None
    """None where it was removed."""
    who: str
    when: datetime
    why: str
    evaluation: Mapping[str, Any]
    """That of the version moved to: what the move rested on."""
    forced: bool
    overruled: str
    """The reason for a refusal that `force` overruled, else empty."""
    is_new: bool = field(default=False, compare=False)
    """Set on the move that the call made; False where the alias pointed there already."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "task": self.task,
            "alias": self.alias,
            "action": self.action,
            "from": self.from_number,
            "to": self.to_number,
            "who": self.who,
            "when": self.when.isoformat(),
            "why": self.why,
            "evaluation": dict(self.evaluation),
            "forced": self.forced,
            "overruled": self.overruled,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A field in which two versions differ; None where one of them has none."""

    name: str
    """With dots where it is nested: training.lr."""
    a: Any
    b: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How version `b` differs from version `a`."""

    a: Version
    b: Version
    changes: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        changes = {change.name: [change.a, change.b] for change in self.changes}
        return {"a": self.a.reference, "b": self.b.reference, "changes": changes}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledBlob:
    """A compiled file among the blobs: what an engine that cannot compile loads."""

    sha256: str
    """Of the compiled file."""
    source: str
    """Of the artefact that it was made from."""
    dtype: str
    num_positions: int
    """N: literal tokens of the block and vectors."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Freed:
    """What gc removed."""

    num_blobs: int
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {"num_blobs": self.num_blobs, "num_bytes": self.num_bytes}


def is_name(name: str) -> bool:
    """Return whether a task or an alias could have this name."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str, kind: str) -> str:
    """Return a valid task or alias name (`kind` says which). Raises ConfigError on any other."""
    hint = "Names are 1 to 64 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit."
    if not is_name(name):
        raise ConfigError(f"{name[:80]!r} is no {kind} name", hint=hint)
    if kind == "alias" and name.isdigit():
        raise ConfigError(f"the alias {name!r} reads as a version number", hint="An alias has a letter in it.")
    return name


def is_text(value: object) -> bool:
    """Return whether the value is a string that every database takes: no NUL, no half of a surrogate pair."""
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)


def is_sha256(value: str) -> bool:
    """Return whether the value is a digest as the registry writes it: 64 hex digits, in lower case."""
    return _SHA256.fullmatch(value) is not None


def split_reference(reference: str) -> tuple[str, str | int | None]:
    """Split "triage", "triage@canary" or "triage@7" into the task and None, an alias or a number.

    Nothing is checked: what is no name names nothing, and is then not found.
    """
    task, at, selector = reference.partition("@")
    if not at:
        return task, None
    return task, int(selector) if _NUMBER.fullmatch(selector) else selector


def digest_of(reference: str) -> str | None:
    """Return the digest that "sha256:…" names a version by, or None where the reference is no such one."""
    sha256 = reference.removeprefix("sha256:")
    return sha256 if sha256 != reference and is_sha256(sha256) else None


def version_from_row(row: VersionRow) -> Version:
    """Return the row as a record."""
    return Version(
        task=row.task,
        number=row.number,
        sha256=row.sha256,
        method=row.method,
        num_vectors=row.num_vectors,
        num_bytes=row.num_bytes,
        base=Fingerprint(
            model_type=row.base_model_type,
            shapes_sha256=row.base_shapes_sha256,
            quantisation=row.base_quantisation,
            weights_sha256=row.base_weights_sha256,
            tokenizer_sha256=row.base_tokenizer_sha256,
            chat_template_sha256=row.base_chat_template_sha256,
        ),
        parent=row.parent,
        evaluation=row.evaluation,
        who=row.who,
        why=row.why,
        created=row.created,
    )


def check_header(header: ArtefactHeader) -> None:
    """Raise ArtefactCorrupt where a field that the registry stores has a wrong type."""
    texts = {"task": header.task, **{f"base.{name}": value for name, value in header.base.to_json().items()}}
    if header.parent is not None:
        texts["parent"] = header.parent
    if wrong := [name for name, value in texts.items() if not is_text(value)]:
        raise ArtefactCorrupt(f"{wrong[0]} in the artefact's header is {texts[wrong[0]]!r}, not a text")
    if header.parent is not None and not _SHA256.fullmatch(header.parent):
        raise ArtefactCorrupt(f"parent in the artefact's header is {header.parent[:80]!r}, not a sha256")
    if not isinstance(header.evaluation, Mapping):
        raise ArtefactCorrupt(f"evaluation in the artefact's header is a {type(header.evaluation).__name__}, no table")


def check_compiled_header(header: CompiledHeader) -> None:
    """Raise ArtefactCorrupt where a field that the registry stores is none."""
    if not is_sha256(header.source):
        raise ArtefactCorrupt(f"source in the compiled file's header is {header.source[:80]!r}, not a sha256")
    if not is_text(header.base.weights_sha256):
        raise ArtefactCorrupt(f"base.weights_sha256 in its header is {header.base.weights_sha256!r}, not a text")


def version_to_row(header: ArtefactHeader, **columns: Any) -> VersionRow:
    """Return a new row for an artefact; `columns` are those that its header does not give."""
    base = {f"base_{name}": value for name, value in header.base.to_json().items()}
    return VersionRow(
        method=header.method,
        num_vectors=header.num_vectors,
        parent=header.parent,
        **base,
        **columns,
    )


def move_from_row(row: MoveRow) -> Move:
    """Return the row as a record."""
    return Move(
        task=row.task,
        alias=row.alias,
        action=row.action,
        from_number=row.from_number,
        to_number=row.to_number,
        who=row.who,
        when=row.moved,
        why=row.why,
        evaluation=row.evaluation,
        forced=row.forced,
        overruled=row.overruled,
    )


def difference(a: Version, b: Version, a_header: ArtefactHeader, b_header: ArtefactHeader) -> Difference:
    """Compare two versions field by field, nested ones too, in the order of the header."""
    left, right = dict(_flat("", _comparable(a, a_header))), dict(_flat("", _comparable(b, b_header)))
    names = list(dict.fromkeys([*left, *right]))
    changes = [Change(name=name, a=left.get(name), b=right.get(name)) for name in names]
    return Difference(a=a, b=b, changes=tuple(change for change in changes if change.a != change.b))


def finite(value: Any) -> Any:
    """Return JSON data with None for NaN and Inf, which JSON has not: PostgreSQL would refuse the row."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _comparable(version: Version, header: ArtefactHeader) -> dict[str, Any]:
    data: dict[str, Any] = {"task": version.task, "num_vectors": header.num_vectors, "num_bytes": version.num_bytes}
    for name, value in header.to_json().items():
        if name not in ("format", "task", "created", "conformance"):
            data[name] = value
    data["evaluation"] = version.evaluation
    data["num_conformance_probes"] = len(header.conformance)
    return data


def _flat(prefix: str, data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
