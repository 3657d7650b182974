"""Publishing, names, aliases and cleaning up, in one process."""

from __future__ import annotations

import os
import re
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from foreword.core.artefact import file_sha256, load_artefact
from foreword.errors import ArtefactCorrupt, ArtefactError, ConfigError, Conflict, NotFound
from foreword.registry.blobs import staged
from foreword.registry.store import Registry

from .conftest import BASE, Factory, Place, measured, numbers


def test_publish_keeps_what_the_file_says(registry: Registry, artefact: Factory, place: Place) -> None:
    evaluation = measured(0.9, 0.87, 0.93)
    path = artefact(num_vectors=3, evaluation=evaluation, parent="a" * 64)
    version = registry.publish(path, who="ann", why="first")
    assert version.reference == "triage@1"
    assert version.is_new
    assert version.sha256 == file_sha256(path)
    assert (version.method, version.num_vectors, version.num_bytes) == ("prompt", 3, path.stat().st_size)
    assert (version.base, version.parent, version.evaluation) == (BASE, "a" * 64, evaluation)
    assert (version.who, version.why) == ("ann", "first")
    assert datetime.now(UTC) - version.created < timedelta(minutes=1)
    assert version.created.tzinfo is UTC
    assert registry.resolve("triage@1") == version
    assert registry.home == place.home
    blob = registry.path(version)
    folder = place.home / ("cache" if place.blob_url else "blobs")
    assert blob == folder / version.sha256[:2] / f"{version.sha256}.safetensors"
    assert load_artefact(blob).sha256 == version.sha256


def test_everything_survives_reopening(place: Place, artefact: Factory) -> None:
    with place.open() as registry:
        version = registry.publish(artefact(), alias="prod", who="ann")
        history = registry.history("triage")
    with place.open() as registry:
        assert registry.resolve("triage") == version
        assert registry.history("triage") == history
        assert registry.aliases("triage") == {"prod": 1}


def test_who_defaults_to_the_user(registry: Registry, artefact: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "zoe")
    assert registry.publish(artefact(), alias="canary").who == "zoe"
    assert registry.history("triage")[0].who == "zoe"

    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert registry.publish(artefact()).who == f"uid-{os.getuid()}"


def test_numbers_are_per_task_and_never_used_twice(registry: Registry, artefact: Factory) -> None:
    for _ in range(3):
        registry.publish(artefact())
    assert registry.publish(artefact("mail")).number == 1
    registry.delete("triage@3", who="ann", why="leaked labels")
    registry.delete("triage@2")
    assert registry.publish(artefact()).number == 4
    assert numbers(registry.versions("triage")) == [1, 4]
    with pytest.raises(
        NotFound, match=r"triage@3 was deleted by ann at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC: leaked labels"
    ):
        registry.resolve("triage@3")
    with pytest.raises(NotFound):
        registry.delete("triage@3")


def test_publishing_the_same_file_again(registry: Registry, artefact: Factory) -> None:
    path = artefact()
    first = registry.publish(path, who="ann", why="first")
    again = registry.publish(path, who="bob", why="again", alias="canary")
    assert again == first
    assert not again.is_new
    assert again.why == "first"
    assert registry.aliases("triage") == {"canary": 1}
    other = registry.publish(path, task="mail")
    assert (other.reference, other.sha256) == ("mail@1", first.sha256)
    registry.untag("triage", "canary")
    registry.delete("triage@1")
    assert registry.publish(path).number == 2
    assert registry.publish(artefact()).number == 3


def test_an_evaluation_given_at_publishing(registry: Registry, artefact: Factory) -> None:
    path, report = artefact(evaluation={"score": 0.1}), measured(0.9, 0.87, float("nan"))
    version = registry.publish(path, evaluation=report, alias="prod")
    assert version.evaluation == measured(0.9, 0.87, 0) | {"interval": [0.87, None]}
    assert registry.history("triage")[0].evaluation == version.evaluation
    for again in (None, report):
        assert not registry.publish(path, evaluation=again).is_new
    with pytest.raises(Conflict, match="triage@1 is this file with another evaluation"):
        registry.publish(path, evaluation={"score": 0.95})
    registry.publish(artefact(evaluation={"score": 0.1}), evaluation={"score": 0.2})
    changes = {change.name: (change.a, change.b) for change in registry.diff("triage@1", "triage@2").changes}
    assert changes["evaluation.score"] == (0.9, 0.2)


def test_tasks(registry: Registry, artefact: Factory) -> None:
    assert registry.tasks() == []
    registry.publish(artefact(), alias="prod")
    registry.publish(artefact(), alias="canary")
    registry.publish(artefact("mail"))
    registry.delete("mail@1")
    mail, triage = registry.tasks()
    assert (mail.name, mail.num_versions, mail.newest, mail.aliases) == ("mail", 0, None, {})
    assert (triage.name, triage.num_versions, triage.newest) == ("triage", 2, 2)
    assert triage.aliases == {"prod": 1, "canary": 2}
    with pytest.raises(NotFound, match="mail has no versions"):
        registry.resolve("mail")


def test_resolve(registry: Registry, artefact: Factory) -> None:
    for _ in range(3):
        registry.publish(artefact())
    assert registry.resolve("triage").number == 3
    registry.tag("triage@1", "prod")
    registry.tag("triage@2", "canary")
    assert registry.resolve("triage").number == 1
    assert registry.resolve("triage@canary").number == 2
    assert registry.resolve("triage@3").number == 3


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("triag", "no task 'triag'\nDid you mean triage?"),
        ("Triage", "no task 'Triage'\nDid you mean triage?"),
        ("", "no task ''\nKnown: triage."),
        ("triage@cannary", "triage has no alias 'cannary'\nDid you mean canary?"),
        ("triage@", "triage has no alias ''\nKnown: canary."),
        ("triage@canary@1", "triage has no alias 'canary@1'\nDid you mean canary?"),
        ("triage@9", "no version triage@9\nThe newest is triage@1."),
        ("triage@0", "triage has no alias '0'\nKnown: canary."),
        ("triage@01", "triage has no alias '01'\nKnown: canary."),
        ("triage@-1", "triage has no alias '-1'\nKnown: canary."),
        ("triage@" + "9" * 40, "triage has no alias '" + "9" * 40 + "'\nKnown: canary."),
        ("triage@٣", "triage has no alias '٣'\nKnown: canary."),
        ("\ud800", "no task '\\ud800'\nKnown: triage."),
        ("a\0b", "no task 'a\\x00b'\nKnown: triage."),
        ("x" * 999, f"no task {'x' * 80!r}\nKnown: triage."),
        ("'; drop table tasks; --", 'no task "\'; drop table tasks; --"\nKnown: triage.'),
    ],
)
def test_what_names_nothing_is_not_found(registry: Registry, artefact: Factory, reference: str, message: str) -> None:
    registry.publish(artefact(), alias="canary")
    with pytest.raises(NotFound) as caught:
        registry.resolve(reference)
    assert str(caught.value) == message
    assert (caught.value.status, caught.value.exit_code) == (404, 6)


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a b", "a@b", "a/b", "ä", "a\n", "x" * 65, "..", "\ud800"])
def test_bad_names_are_refused(registry: Registry, artefact: Factory, name: str) -> None:
    path = artefact()
    with pytest.raises(ConfigError, match="is no task name"):
        registry.publish(path, task=name)
    with pytest.raises(ConfigError, match="is no alias name"):
        registry.publish(path, alias=name)
    registry.publish(path)
    for move in (registry.tag, registry.promote):
        with pytest.raises(ConfigError, match="is no alias name"):
            move("triage@1", name)
    assert registry.history("triage") == []


def test_an_alias_cannot_be_a_number(registry: Registry, artefact: Factory) -> None:
    with pytest.raises(ConfigError, match="the alias '12' reads as a version number"):
        registry.publish(artefact(), alias="12")
    assert registry.tasks() == []
    registry.publish(artefact("2024"), alias="v12")
    assert registry.resolve("2024@v12").number == 1


def test_a_bad_file_is_not_published(registry: Registry, artefact: Factory, tmp_path: Path) -> None:
    short = artefact()
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(ArtefactCorrupt, match=re.escape(str(short))):
        registry.publish(short)
    with pytest.raises(ArtefactError, match="cannot read"):
        registry.publish(tmp_path / "nowhere.safetensors")
    with pytest.raises(ArtefactError):
        registry.publish(tmp_path)
    assert registry.tasks() == []
    assert registry.gc(0).num_blobs == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": {**BASE.to_json(), "model_type": ["llama"]}}, "wrong base: .*'llama'"),
        (
            {"base": {**BASE.to_json(), "quantisation": "\ud800"}},
            "not a text|surrogates not",
        ),
        ({"parent": 7}, "wrong parent: 7"),
        ({"parent": "abc"}, "parent .* is 'abc', not a sha256"),
        ({"evaluation": [1]}, "wrong evaluation: .1"),
        ({"task": 7}, "wrong task: 7"),
    ],
)
def test_a_hostile_header_is_not_published(
    registry: Registry, artefact: Factory, fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foreword.core.artefact import ArtefactHeader

    whole = ArtefactHeader.to_json
    monkeypatch.setattr(ArtefactHeader, "to_json", lambda self: {**whole(self), **fields})
    path = artefact()
    with pytest.raises(ArtefactCorrupt, match=message):
        registry.publish(path)
    assert registry.gc(0).num_blobs == 0


def test_not_a_number_in_an_evaluation_is_none(registry: Registry, artefact: Factory) -> None:
    path = artefact(evaluation={"score": float("nan"), "curve": [1.0, float("inf")], "by": {"label": float("-inf")}})
    assert registry.publish(path).evaluation == {"score": None, "curve": [1.0, None], "by": {"label": None}}


def test_who_and_why_must_be_text(registry: Registry, artefact: Factory) -> None:
    path = artefact()
    for bad in ({"who": "a\0"}, {"why": "\udcff"}):
        with pytest.raises(ConfigError, match="is no text"):
            registry.publish(path, **bad)
    why = "wegen: [bold]Rückfragen[/bold] 🙂'; --\nsecond line"
    assert registry.publish(path, why=why).why == why
    assert registry.resolve("triage").why == why


def test_a_file_that_changes_while_it_is_published(
    registry: Registry, artefact: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = artefact(num_vectors=2), artefact("mail", num_vectors=3)

    def late(source: Path, folder: Path) -> Any:
        source.write_bytes(late_content)
        return staged(source, folder)

    monkeypatch.setattr("foreword.registry.store.staged", late)
    late_content = b"garbage"
    with pytest.raises(ArtefactCorrupt):
        registry.publish(path)
    late_content = other.read_bytes()
    with pytest.raises(Conflict, match="was replaced while it was read"):
        registry.publish(artefact())
    version = registry.publish(artefact(), task="triage")
    assert (version.num_vectors, version.sha256) == (3, file_sha256(other))  # the row says what the blob holds


def test_unknown_names_everywhere(registry: Registry, artefact: Factory) -> None:
    registry.publish(artefact(), alias="prod")
    for call in (registry.versions, registry.aliases, registry.history, registry.rollback):
        with pytest.raises(NotFound, match="Did you mean triage"):
            call("triaje")
    with pytest.raises(NotFound, match="triage never had an alias 'prot'\nDid you mean prod"):
        registry.history("triage", "prot")
    with pytest.raises(NotFound, match="Did you mean prod"):
        registry.untag("triage", "prot")
    with pytest.raises(NotFound, match="Did you mean prod"):
        registry.rollback("triage", "prot")


def test_delete(registry: Registry, artefact: Factory) -> None:
    registry.publish(artefact(), alias="prod")
    registry.tag("triage@1", "canary")
    for reference in ("triage", "triage@prod"):
        with pytest.raises(ConfigError, match="has no version number"):
            registry.delete(reference)
    with pytest.raises(Conflict, match="triage@1 is in use by the alias canary and the alias prod"):
        registry.delete("triage@1")
    registry.publish(artefact(), alias="prod")
    registry.untag("triage", "canary")
    gone = registry.delete("triage@1")
    assert gone.number == 1
    with pytest.raises(NotFound):
        registry.tag("triage@1", "canary")
    with pytest.raises(NotFound):
        registry.promote("triage@1", "canary")


def test_diff(registry: Registry, artefact: Factory) -> None:
    a = registry.publish(artefact(training={"lr": 0.3, "steps": {"max": 100}, "seed": 1}, evaluation={"score": 0.8}))
    b = registry.publish(
        artefact(
            num_vectors=5,
            training={"lr": 0.1, "steps": {"max": 100}},
            template={"text": "{soft:5}{input}", "chat": True, "system": None},
            parent=a.sha256,
            evaluation={"score": 0.9},
        )
    )
    difference = registry.diff("triage@1", "triage@2")
    changes = {change.name: (change.a, change.b) for change in difference.changes}
    assert changes == {
        "num_vectors": (2, 5),
        "num_bytes": (a.num_bytes, b.num_bytes),
        "block": ([[1], 2], [[1], 5]),
        "template.text": (None, "{soft:5}{input}"),
        "template.chat": (None, True),
        "training.lr": (0.3, 0.1),
        "training.seed": (1, None),
        "parent": (None, a.sha256),
        "evaluation.score": (0.8, 0.9),
    }
    assert registry.diff("triage@1", "triage@1").changes == ()
    kv = registry.publish(artefact("mail", method="kv", base=type(BASE)(**{**BASE.to_json(), "model_type": "qwen3"})))
    changes = {change.name: (change.a, change.b) for change in registry.diff("triage@1", kv.reference).changes}
    assert changes["task"] == ("triage", "mail")
    assert changes["method"] == ("prompt", "kv")
    assert changes["base.model_type"] == ("llama", "qwen3")


def test_threads_share_a_registry(registry: Registry, artefact: Factory) -> None:
    paths = [artefact() for _ in range(24)]
    seen: list[int] = []

    def publish(mine: list[Path]) -> None:
        seen.extend(registry.publish(path).number for path in mine)

    threads = [threading.Thread(target=publish, args=(paths[index::4],)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(1, 25))
