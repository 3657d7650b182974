"""The facts of a base that runs elsewhere: read once, kept, right; and what does not fit it is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from foreword.core.artefact import read_header
from foreword.errors import ConfigError, IncompatibleModel
from foreword.serve.engines import base_info as module
from foreword.serve.engines.base_info import BaseInfo, base_info, check_served
from tests.serve.artefacts import BASE, demo_base, write_artefact


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> BaseInfo:
    return base_info(BASE, tmp_path_factory.mktemp("cache"))


def test_it_says_what_loading_the_base_says(info: BaseInfo) -> None:
    base = demo_base()
    assert (info.fingerprint, info.spec, info.stop_ids) == (base.fingerprint, base.spec, base.stop_ids)
    assert BaseInfo.from_json(info.to_json()) == info


def test_it_is_read_once_until_a_file_changes(info: BaseInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = tmp_path / "base", tmp_path / "cache"
    shutil.copytree(BASE, folder)
    calls: list[object] = []

    class Done:
        stderr = ""
        stdout = __import__("json").dumps(info.to_json())

    monkeypatch.setattr(module.subprocess, "run", lambda *args, **options: calls.append(args) or Done())
    assert base_info(folder, cache) == base_info(folder, cache) == info
    assert len(calls) == 1
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    base_info(folder, cache)
    assert len(calls) == 2


def test_a_folder_without_a_base_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        base_info(tmp_path, tmp_path / "cache")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot read the base"):
        base_info(tmp_path, tmp_path / "cache")


def test_what_cannot_be_served_is_refused_with_the_cure(info: BaseInfo, tmp_path: Path) -> None:
    prompt = read_header(write_artefact(tmp_path, "a", "prompt"))
    check_served(info, prompt, max_model_len=None, by_embeddings=True)
    check_served(info, prompt, max_model_len=64, by_embeddings=False)
    with pytest.raises(ConfigError, match="the longest sequence has 4"):
        check_served(info, prompt, max_model_len=4, by_embeddings=False)
    kv = read_header(write_artefact(tmp_path, "b", "kv"))
    with pytest.raises(IncompatibleModel, match="no embeddings can carry"):
        check_served(info, kv, max_model_len=None, by_embeddings=True)
    with pytest.raises(IncompatibleModel, match="soft slots behind"):
        check_served(info, dataclasses.replace(prompt, soft_after=2), max_model_len=None, by_embeddings=False)
    other = dataclasses.replace(prompt, base=dataclasses.replace(prompt.base, weights_sha256="other"))
    with pytest.raises(IncompatibleModel, match="weights_sha256 other there"):
        check_served(info, other, max_model_len=None, by_embeddings=False)
