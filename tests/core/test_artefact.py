"""The artefact: round trips bit for bit, refuses every damage before model work, and knows its base."""

import copy
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from foreword.core import artefact as artefact_module
from foreword.core.artefact import (
    MAX_HEADER_BYTES,
    METADATA_KEY,
    ArtefactHeader,
    file_sha256,
    load_artefact,
    read_header,
    save_artefact,
    write_atomically,
)
from foreword.core.block import Block
from foreword.core.compile import check_base, compile
from foreword.core.model import FrozenModel, load_base
from foreword.core.spec import Fingerprint
from foreword.errors import ArtefactCorrupt, ArtefactError, IncompatibleModel
from tests.bundled import BASE
from tests.tiny import tiny

METHODS = ["prompt", "prefix", "kv"]
BLOCK = Block(((1, 7), 3, (9,), 2))


def header(method="prompt", base=None, **changes):
    base = base or tiny("llama")
    fields = {
        "method": method,
        "task": "triage",
        "block": BLOCK,
        "base": base.fingerprint,
        "spec": base.spec,
        "template": {"text": "{soft:5}{input}", "chat": True, "system": None},
        "labels": ("yes", "no"),
        "metric": "exact_match",
        "max_new_tokens": 8,
        "training": {"lr": 0.3, "seed": 1, "data": ["a", {"b": None}]},
        "parent": "0" * 64,
        "evaluation": {"exact_match": 0.5},
        "conformance": ({"ids": [5], "top": [7], "logprobs": [-0.5], "dtype": "float32"},),
        "created": "2026-11-20T12:00:00+00:00",
        "foreword": "0.1.0",
    }
    return ArtefactHeader(**fields | changes)


def tensors_for(head, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=generator).to(dtype) for k, shape in head.tensor_shapes().items()}


def written(folder, method="prompt", dtype=torch.float32, **changes):
    head = header(method, **changes)
    return save_artefact(Path(folder) / "a.safetensors", head, tensors_for(head, dtype))


def split(data):
    """Return (table, tensor bytes) of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(table, body):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + body


def refused(path, data, match=None):
    path.write_bytes(data)
    for function in (read_header, load_artefact):
        with pytest.raises(ArtefactCorrupt, match=match):
            function(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_round_trip_is_bit_identical(method, dtype, tmp_path):
    head = header(method)
    tensors = tensors_for(head, dtype)
    saved = save_artefact(tmp_path / "deep" / "a.safetensors", head, tensors)
    loaded = load_artefact(saved.path)
    assert loaded.header == head == read_header(saved.path)
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == dtype
        assert torch.equal(loaded.tensors[name], tensor)
        assert torch.equal(saved.tensors[name], tensor)
    assert loaded.sha256 == saved.sha256 == file_sha256(saved.path)
    assert loaded.num_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    again = save_artefact(tmp_path / "again.safetensors", loaded.header, loaded.tensors)
    assert again.path.read_bytes() == saved.path.read_bytes()
    assert loaded.vectors.method == method
    assert loaded.vectors.block == BLOCK


def test_rows_behind_the_input_come_last(tmp_path):
    loaded = load_artefact(written(tmp_path, soft_after=2).path)
    assert loaded.tensors["prompt"].shape == (7, 64)
    assert torch.equal(loaded.vectors.vectors, loaded.tensors["prompt"][:5])
    assert torch.equal(loaded.vectors.after, loaded.tensors["prompt"][5:])


def test_views_on_other_memory_are_written_whole(tmp_path):
    head = header("kv")
    wide = {name: torch.randn(shape[1], 2, shape[0], shape[2]) for name, shape in head.tensor_shapes().items()}
    views = {name: tensor[:, 1].transpose(0, 1).requires_grad_() for name, tensor in wide.items()}
    loaded = load_artefact(save_artefact(tmp_path / "a", head, views).path)
    for name, view in views.items():
        assert torch.equal(loaded.tensors[name], view)
        assert not loaded.tensors[name].requires_grad


def test_the_header_is_read_without_torch(tmp_path):
    path = written(tmp_path, "kv").path
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors", "numpy"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
from foreword.core.artefact import read_header, file_sha256
header = read_header(sys.argv[1])
print(header.task, header.num_vectors, len(header.tensor_shapes()), file_sha256(sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["triage", "5", "6", file_sha256(path)]


@pytest.mark.parametrize("method", METHODS)
def test_truncation_at_every_length_is_refused(method, tmp_path):
    data = written(tmp_path, method).path.read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(data)
    for count in range(len(data) - 1, -1, -1):
        os.truncate(path, count)
        with pytest.raises(ArtefactCorrupt):
            read_header(path)
    refused(path, data + b"\0", match="bytes where the header needs")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.data())
def test_flipped_bytes_are_refused_or_change_the_identity(where, tmp_path):
    """A flip in the numbers is another file with another sha256; a flip in the header never raises anything else."""
    path = tmp_path / "whole.safetensors"
    if not path.exists():
        shutil.move(written(tmp_path, "kv").path, path)
    data = bytearray(path.read_bytes())
    for _ in range(where.draw(st.integers(1, 3))):
        place = where.draw(st.one_of(st.integers(0, len(data) - 1), st.integers(0, 2000)))
        data[place] ^= where.draw(st.integers(1, 255))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(bytes(data))
    try:
        loaded = load_artefact(broken)
    except ArtefactCorrupt:
        return
    assert loaded.sha256 != file_sha256(path) or bytes(data) == path.read_bytes()
    assert {name: tuple(t.shape) for name, t in loaded.tensors.items()} == loaded.header.tensor_shapes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


def places(value, path=()):
    """Yield the path of every value within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.data())
def test_any_json_in_any_place_of_the_header_is_read_or_refused(where, tmp_path):
    path = tmp_path / where.draw(st.sampled_from(METHODS)) / "a.safetensors"
    if not path.exists():
        written(path.parent, path.parent.name)
    table, body = split(path.read_bytes())
    if where.draw(st.booleans()):
        inner = json.loads(table["__metadata__"][METADATA_KEY])
        inner = replaced(inner, where.draw(st.sampled_from(list(places(inner)))), where.draw(JSON))
        table["__metadata__"][METADATA_KEY] = json.dumps(inner)
    else:
        table = replaced(table, where.draw(st.sampled_from(list(places(table)))), where.draw(JSON))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(joined(table, body))
    try:
        loaded = load_artefact(broken)
    except ArtefactCorrupt:
        return
    assert {name: tuple(t.shape) for name, t in loaded.tensors.items()} == loaded.header.tensor_shapes()
    assert loaded.vectors.method == loaded.header.method
    json.dumps(loaded.header.to_json())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_infinity_are_refused(method, dtype, value, tmp_path):
    head = header(method)
    tensors = tensors_for(head, dtype)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    path = tmp_path / "a"
    path.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(head.to_json())}))
    with pytest.raises(ArtefactCorrupt, match=f"{name!r} holds NaN or Inf"):
        load_artefact(path)
    with pytest.raises(ArtefactCorrupt, match=f"{name!r} holds NaN or Inf"):
        save_artefact(tmp_path / "b", head, tensors)
    assert not (tmp_path / "b").exists()


def file_with(tensors, head, **metadata):
    return save(tensors, metadata={METADATA_KEY: json.dumps(head.to_json())} | metadata)


def test_foreign_missing_and_misshapen_tensors_are_refused(tmp_path):
    path, head = tmp_path / "a", header("kv")
    whole = tensors_for(head)
    refused(path, file_with(whole | {"extra": torch.zeros(2)}, head), "'extra' is foreign for method kv")
    refused(path, file_with({k: v for k, v in whole.items() if k != "key.1"}, head), r"'key\.1' is missing")
    refused(path, file_with({}, head), "is missing")
    wrong = whole | {"key.1": torch.zeros(2, 4, 16)}
    refused(path, file_with(wrong, head), r"'key\.1' has shape \[2, 4, 16\], the header says \[2, 5, 16\]")
    refused(path, file_with(whole | {"key.1": torch.zeros(160)}, head), r"shape \[160\]")
    prompt = header("prompt")
    refused(path, file_with(whole, prompt), "is foreign for method prompt")
    refused(path, save(tensors_for(prompt)), "no foreword header")
    refused(path, save(tensors_for(prompt), metadata={"format": "pt"}), "no foreword header")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype, tmp_path):
    head = header()
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_for(head).items()}
    refused(tmp_path / "a", file_with(tensors, head), "where F32 or BF16 is allowed")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        save_artefact(tmp_path / "b", head, tensors)
    assert not (tmp_path / "b").exists()


def test_mixed_dtypes_are_refused(tmp_path):
    head = header("kv")
    tensors = tensors_for(head)
    tensors["key.0"] = tensors["key.0"].bfloat16()
    refused(tmp_path / "a", file_with(tensors, head), "BF16, F32 where")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        save_artefact(tmp_path / "b", head, tensors)


def test_wrong_shapes_cannot_be_saved(tmp_path):
    head = header()
    with pytest.raises(ValueError, match=r"\(4, 64\).* do not fit"):
        save_artefact(tmp_path / "a", head, {"prompt": torch.zeros(4, 64)})
    with pytest.raises(ValueError, match="do not fit"):
        save_artefact(tmp_path / "a", head, {})
    assert not (tmp_path / "a").exists()


def test_overlapping_and_gapped_tensors_are_refused(tmp_path):
    table, body = split(written(tmp_path, "kv").path.read_bytes())
    for offsets in (
        [0, 640],
        [640, 1280],
        [5, 645],
        [640, 640],
        [1280, 640],
        [-640, 0],
        [0, 640, 1],
        [0],
        ["0", "640"],
    ):
        changed = copy.deepcopy(table)
        changed["value.2"]["data_offsets"] = offsets
        refused(tmp_path / "b", joined(changed, body))


def test_oversized_headers_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(ArtefactCorrupt, match=f"header of {MAX_HEADER_BYTES + 1} bytes"):
        read_header(path)
    refused(path, b"\xff" * 8 + b"{}", "not a safetensors file")


@pytest.mark.parametrize("deep", [b"[" * 200_000, b'{"a":' * 200_000, b"[" * 200_000 + b"]" * 200_000])
def test_deep_nesting_is_refused(deep, tmp_path):
    refused(tmp_path / "a", joined(deep, b""))
    table, body = split(written(tmp_path).path.read_bytes())
    table["__metadata__"][METADATA_KEY] = deep.decode()
    refused(tmp_path / "a", joined(table, body))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"null", b"3", b"[]", b'"a"', b"\xff\xfe", b"1" * 5000, b'{"__metadata__":3}']
)
def test_headers_that_are_no_object_are_refused(text, tmp_path):
    refused(tmp_path / "a", joined(text, b""))


def test_duplicate_keys_are_refused(tmp_path):
    """Two readers may take two different ones of them: what was checked would not be what is used."""
    data = written(tmp_path).path.read_bytes()
    table, body = split(data)
    text = json.dumps(table).encode()
    refused(
        tmp_path / "b", joined(text[:-1] + b', "prompt": ' + json.dumps(table["prompt"]).encode() + b"}", body), "twice"
    )
    inner = table["__metadata__"][METADATA_KEY]
    table["__metadata__"][METADATA_KEY] = inner[:-1] + ', "task": "other"}'
    refused(tmp_path / "b", joined(table, body), "'task' stands twice")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2 is not 1"),
        ({"format": None}, "format None"),
        ({"method": "lora"}, "wrong method: 'lora'"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"block": [[1], -3, 8]}, "block"),
        ({"block": [[1], "abc", 5]}, "block"),
        ({"block": [[1], True, 4]}, "block"),
        ({"block": [[1, -2], 5]}, "block"),
        ({"block": [[1, 97], 5]}, "block"),
        ({"block": [[1, 2.0], 5]}, "block"),
        ({"block": "ab"}, "block"),
        ({"soft_after": -1}, "soft_after"),
        ({"soft_after": "1"}, "soft_after"),
        ({"method": "kv", "soft_after": 1}, "soft_after"),
        ({"task": 3}, "task"),
        ({"labels": "yes"}, "labels"),
        ({"labels": [1]}, "labels"),
        ({"base": {"model_type": "llama"}}, "incomplete"),
        ({"spec": None}, "incomplete"),
        ({"template": 3}, "template"),
        ({"template": {"chat": True, "system": None}}, "template"),
        ({"template": {"text": "{soft:5}", "chat": True, "system": None}}, "template"),
        ({"max_new_tokens": "8"}, "max_new_tokens"),
        ({"training": []}, "training"),
        ({"conformance": [3]}, "conformance"),
    ],
)
def test_header_fields_of_a_wrong_kind_are_refused(changes, message, tmp_path):
    table, body = split(written(tmp_path).path.read_bytes())
    inner = json.loads(table["__metadata__"][METADATA_KEY]) | changes
    table["__metadata__"][METADATA_KEY] = json.dumps(inner)
    refused(tmp_path / "b", joined(table, body), message)


def test_a_missing_field_is_refused(tmp_path):
    table, body = split(written(tmp_path).path.read_bytes())
    inner = json.loads(table["__metadata__"][METADATA_KEY])
    for name in ("method", "task", "block", "base", "spec"):
        table["__metadata__"][METADATA_KEY] = json.dumps({k: v for k, v in inner.items() if k != name})
        refused(tmp_path / "b", joined(table, body), name)


def test_what_cannot_be_opened_is_an_error_of_its_own(tmp_path):
    for function in (read_header, load_artefact):
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(ArtefactError, match="cannot read") as error:
                function(path)
            assert not isinstance(error.value, ArtefactCorrupt)
    refused(tmp_path / "empty", b"")


def test_no_temporary_file_stays_and_the_old_one_survives_a_failure(tmp_path, monkeypatch):
    old = written(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefact_module.os, "fsync", full)
    with pytest.raises(ArtefactError, match="No space left on device"):
        written(tmp_path, "kv")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert load_artefact(old.path).sha256 == old.sha256


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A file size limit in a child process: the kernel refuses the write in the middle, as a full disk does."""
    inside = tmp_path / "inside"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
            write_atomically(inside / "a.safetensors", b"x" * (1 << 20))
        except ArtefactError as error:
            code = 0 if "File too large" in str(error) and str(1 << 20) in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not inside.exists() or not list(inside.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtefactError, match="cannot write"):
        written(tmp_path / "file")


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Fingerprint)])
def test_refusal_names_the_first_field_that_differs(field, tmp_path):
    base = tiny("llama")
    trained = dataclasses.replace(base.fingerprint, **{field: "something-else"})
    loaded = load_artefact(written(tmp_path).path)
    loaded = dataclasses.replace(loaded, header=dataclasses.replace(loaded.header, base=trained))
    if not getattr(base.fingerprint, field):  # a base without a tokenizer: nothing to compare with
        check_base(base, loaded)
        return
    with pytest.raises(
        IncompatibleModel, match=f"{field} something-else there, {getattr(base.fingerprint, field)} here"
    ):
        compile(base, loaded)
    assert compile(base, loaded, allow_mismatch=True).num_positions == BLOCK.num_positions


def test_another_base_is_refused_and_can_be_allowed(tmp_path):
    artefact = written(tmp_path)
    with pytest.raises(IncompatibleModel, match="weights_sha256"):
        compile(tiny("llama", seed=1), artefact)
    assert compile(tiny("llama", seed=1), artefact, allow_mismatch=True).digest == artefact.sha256
    with pytest.raises(IncompatibleModel, match="model_type llama there, qwen3 here"):
        compile(tiny("qwen3"), artefact)
    with pytest.raises(IncompatibleModel, match=r"model_type llama there, gpt2 here"):
        check_base(tiny("gpt2"), artefact)


def changed(change):
    """Return the fingerprint of a changed copy of a tiny Llama."""
    model = copy.deepcopy(tiny("llama").model)
    with torch.no_grad():
        model = change(model) or model
    return FrozenModel(model).fingerprint


def merge_lora(model):
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight += 0.05 * torch.randn(64, 2) @ torch.randn(2, 64)


def rescale_norm(model):
    model.model.layers[2].input_layernorm.weight *= 1.5


def quantise(model):
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def test_a_changed_base_has_another_fingerprint():
    original = tiny("llama").fingerprint
    assert changed(lambda model: None) == original
    for change, field in (
        (merge_lora, "weights_sha256"),
        (rescale_norm, "weights_sha256"),
        (lambda model: model.resize_token_embeddings(105, mean_resizing=False) and None, "shapes_sha256"),
        (quantise, "quantisation"),
    ):
        assert original.first_difference(changed(change))[0] == field


def test_the_dtype_it_is_loaded_in_does_not_change_a_base(tmp_path):
    prints = [load_base(str(BASE), dtype=dtype).fingerprint for dtype in ("float32", "bfloat16", "auto")]
    assert prints[0] == prints[1] == prints[2]
    assert all(dataclasses.asdict(prints[0]).values())
    shutil.copytree(BASE, tmp_path / "base")
    settings_file = tmp_path / "base" / "tokenizer_config.json"
    settings_file.write_text(settings_file.read_text().replace("<|end|>", "<|user|>", 1))
    model = AutoModelForCausalLM.from_pretrained(BASE)
    other = FrozenModel(model, AutoTokenizer.from_pretrained(tmp_path / "base")).fingerprint
    assert prints[0].first_difference(other)[0] in ("tokenizer_sha256", "chat_template_sha256")
    assert FrozenModel(model).fingerprint.first_difference(prints[0]) is None
