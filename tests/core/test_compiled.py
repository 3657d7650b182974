"""The compiled file: the very keys and values of `compile`, and every damage refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from foreword.core.artefact import ArtefactHeader, load_artefact, save_artefact
from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.compile_file import compile_file, main, told_error
from foreword.core.compiled import (
    METADATA_KEY,
    CompiledHeader,
    load_compiled,
    read_compiled_header,
    save_compiled,
)
from foreword.core.spec import Method
from foreword.errors import ArtefactCorrupt, ArtefactError, BadRequest, IncompatibleModel
from tests.bundled import BASE, bundled
from tests.tiny import tiny

METHODS: list[Method] = ["prompt", "prefix", "kv"]
BLOCK = Block(((1, 7), 3, (9,), 2))


def write(folder: Path, method: Method = "prompt", *, name: str = "llama", dtype: str = "float32") -> Path:
    base = tiny(name, dtype)
    header = ArtefactHeader(method=method, task="triage", block=BLOCK, base=base.fingerprint, spec=base.spec)
    generator = torch.Generator().manual_seed(1)
    shapes = header.tensor_shapes().items()
    path = folder / f"{name}-{method}.safetensors"
    save_artefact(path, header, {key: torch.randn(shape, generator=generator) for key, shape in shapes})
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_file_holds_what_compile_gives(tmp_path: Path, method: Method, name: str, dtype: str) -> None:
    base, path, out = tiny(name, dtype), write(tmp_path, method, name=name, dtype=dtype), tmp_path / "out.safetensors"
    header = compile_file(base, path, out)
    artefact = load_artefact(path)
    prefix = compile(base, artefact)
    found, layers = load_compiled(out, sha256=hashlib.sha256(out.read_bytes()).hexdigest())
    assert found == header == read_compiled_header(out)
    assert (header.source, header.task, header.dtype) == (artefact.sha256, "triage", dtype)
    assert (header.base, header.spec, header.num_positions) == (base.fingerprint, base.spec, BLOCK.num_positions)
    for (key, value), other_key, other_value in zip(layers, prefix.keys, prefix.values, strict=True):
        assert torch.equal(key, other_key) and torch.equal(value, other_value)


def test_soft_slots_behind_the_text_are_refused(tmp_path: Path) -> None:
    base = tiny("llama")
    header = ArtefactHeader(
        method="prompt", task="triage", block=BLOCK, soft_after=2, base=base.fingerprint, spec=base.spec
    )
    path = tmp_path / "after.safetensors"
    save_artefact(path, header, {key: torch.zeros(shape) for key, shape in header.tensor_shapes().items()})
    with pytest.raises(IncompatibleModel, match="2 soft slots behind the text") as caught:
        compile_file(base, path, tmp_path / "out.safetensors")
    assert "embeddings" in caught.value.hint
    assert not (tmp_path / "out.safetensors").exists()


def test_another_base_is_refused_unless_allowed(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out.safetensors"
    other = tiny("llama", seed=1)
    with pytest.raises(IncompatibleModel, match="weights_sha256"):
        compile_file(other, path, out)
    assert not out.exists()
    assert compile_file(other, path, out, allow_mismatch=True).base == other.fingerprint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    compile_file(tiny("llama"), write(folder, "kv"), folder / "out.safetensors")
    return folder / "out.safetensors"


def test_another_digest_is_refused(whole: Path) -> None:
    with pytest.raises(ArtefactCorrupt, match=f"has sha256 .*{'0' * 64} was asked for"):
        load_compiled(whole, sha256="0" * 64)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_flipped_bit_is_refused_by_its_digest_and_never_crashes_without(whole: Path, data: st.DataObject) -> None:
    good = whole.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1) | st.integers(0, 600))
    bad = bytearray(good)
    bad[place] ^= 1 << data.draw(st.integers(0, 7))
    path = whole.with_name("flipped.safetensors")
    path.write_bytes(bad)
    with pytest.raises(ArtefactCorrupt):
        load_compiled(path, sha256=hashlib.sha256(good).hexdigest())
    try:
        header, layers = load_compiled(path)
    except ArtefactCorrupt:
        return
    assert len(layers) == header.spec.num_layers and all(key.isfinite().all() for key, _ in layers)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_cut_file_is_refused(whole: Path, data: st.DataObject) -> None:
    good = whole.read_bytes()
    path = whole.with_name("cut.safetensors")
    path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    with pytest.raises(ArtefactCorrupt):
        load_compiled(path)
    with pytest.raises(ArtefactCorrupt):
        read_compiled_header(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_refused(whole: Path, value: float) -> None:
    tensors = load(whole.read_bytes())
    tensors["value.1"][0, 2, 3] = value
    path = whole.with_name("nan.safetensors")
    path.write_bytes(save(tensors, metadata=metadata(whole)))
    with pytest.raises(ArtefactCorrupt, match=r"'value\.1' holds NaN or Inf"):
        load_compiled(path)


def metadata(path: Path) -> dict[str, str]:
    return {METADATA_KEY: json.dumps(read_compiled_header(path).to_json())}


def test_tensors_that_are_not_the_headers_are_refused(whole: Path) -> None:
    path = whole.with_name("odd.safetensors")
    for change, what in (
        (lambda tensors: tensors.pop("key.2"), r"'key\.2' has shape None"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"'extra' has shape \(1,\)"),
        (lambda tensors: tensors.update({"key.0": tensors["key.0"][:, :-1].clone()}), r"'key\.0' has shape"),
    ):
        tensors = load(whole.read_bytes())
        change(tensors)
        path.write_bytes(save(tensors, metadata=metadata(whole)))
        with pytest.raises(ArtefactCorrupt, match=what):
            read_compiled_header(path)
    path.write_bytes(save({key: t.bfloat16() for key, t in load(whole.read_bytes()).items()}, metadata=metadata(whole)))
    with pytest.raises(ArtefactCorrupt, match="dtype BF16, the header says float32"):
        read_compiled_header(path)


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"num_positions": 0}, {"num_positions": True}, {"dtype": "int8"}, {"source": 3}, {"other": 1}],
)
def test_a_wrong_header_is_refused(whole: Path, change: dict[str, object]) -> None:
    with pytest.raises(ArtefactCorrupt):
        CompiledHeader.from_json({**read_compiled_header(whole).to_json(), **change})


def test_a_missing_file_and_a_plain_artefact_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="cannot read"):
        read_compiled_header(tmp_path / "none")
    with pytest.raises(ArtefactCorrupt, match="no foreword header"):
        read_compiled_header(write(tmp_path))


def test_a_prefix_of_another_shape_is_not_written(tmp_path: Path) -> None:
    base = tiny("llama")
    prefix = compile(base, load_artefact(write(tmp_path)))
    short = dataclasses.replace(prefix, keys=prefix.keys[:-1], values=prefix.values[:-1])
    with pytest.raises(ValueError, match="does not fit"):
        save_compiled(tmp_path / "out.safetensors", short, base=base.fingerprint, spec=base.spec)


def run(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "foreword.core.compile_file", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1]


def test_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = bundled("float32"), tmp_path / "out.safetensors"
    header = ArtefactHeader(method="kv", task="triage", block=BLOCK, base=base.fingerprint, spec=base.spec)
    path = tmp_path / "a.safetensors"
    save_artefact(path, header, {key: torch.ones(shape) for key, shape in header.tensor_shapes().items()})
    status, line = run(BASE, path, out, "float32")
    assert status == 0 and CompiledHeader.from_json(json.loads(line)["header"]) == read_compiled_header(out)
    for layer, (key, value) in enumerate(load_compiled(out)[1]):
        prefix = compile(base, load_artefact(path))
        assert torch.equal(key, prefix.keys[layer]) and torch.equal(value, prefix.values[layer])
    path.write_bytes(path.read_bytes()[:-1])
    assert main([str(BASE), str(path), str(out), "float32"]) == ArtefactCorrupt.exit_code
    error = told_error(capsys.readouterr().out)
    assert type(error) is ArtefactCorrupt and error.hint


def test_told_errors() -> None:
    error = told_error('{"error": "BadRequest", "message": "m", "hint": "h"}')
    assert type(error) is BadRequest and (error.message, error.hint) == ("m", "h")
    for line in ("", "{}", "[]", '{"error": "Path", "message": "m", "hint": ""}', '{"error": "nearest"}'):
        assert told_error(line) is None
