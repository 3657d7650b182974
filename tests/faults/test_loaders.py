"""Files from anywhere: whatever stands in one, both loaders answer with ArtefactError, soon, and in little memory.

`tests/core/test_artefact.py` and `test_compiled.py` flip, cut and replace; here a file is made to hurt: it claims
terabytes, repeats itself, nests, counts to the thousandth digit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foreword.core.artefact import MAX_HEADER_BYTES, Artefact, ArtefactHeader, load_artefact, read_header
from foreword.core.block import Block
from foreword.core.compiled import CompiledHeader, load_compiled, read_compiled_header
from foreword.errors import ArtefactError
from tests.core.test_artefact import joined, places, replaced, split, written
from tests.core.test_compiled import write as write_source
from tests.tiny import tiny

LOADERS: list[Callable[[Path], Any]] = [read_header, load_artefact, read_compiled_header, load_compiled]
METHODS = ["prompt", "prefix", "kv"]
many = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SOON_S = 5.0
"""The worst text of MAX_HEADER_BYTES takes 2 s to parse here; work that grows faster than the text takes minutes."""


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """An artefact of each method, and a compiled file."""
    from foreword.core.compile_file import compile_file

    folder = tmp_path_factory.mktemp("valid")
    paths = [written(folder / method, method).path for method in METHODS]
    compile_file(tiny("llama"), write_source(folder, "kv"), folder / "compiled.safetensors")
    return [path.read_bytes() for path in (*paths, folder / "compiled.safetensors")]


def answer(loader: Callable[[Path], Any], path: Path) -> ArtefactError | None:
    """Return the error of a loader, None where it takes the file; every other exception is a fault."""
    started = time.monotonic()
    try:
        loader(path)
        return None
    except ArtefactError as error:
        shown = str(error)
        shown.encode()  # can be printed, logged and sent
        assert len(shown) < 1000 + len(str(path))
        return error
    finally:
        assert time.monotonic() - started < SOON_S


def refused_by_all(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for loader in LOADERS:
        assert answer(loader, path) is not None, loader.__name__


NUMBERS = st.integers() | st.sampled_from([2**31, 2**63, 2**64, 10**39, 10**41, 10**4000, -1, 0, 1]) | st.floats()
TEXTS = st.text(st.characters(categories=None), max_size=20)  # halves of surrogate pairs too
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=16,
)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_valid_file_with_any_value_anywhere(data: st.DataObject, valid: list[bytes], tmp_path: Path) -> None:
    """Fails without the bounds on numbers (10^4000 cannot be shown) and the check for halves of surrogate pairs."""
    table, body = split(data.draw(st.sampled_from(valid)))
    (key,) = table["__metadata__"]
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            inner = json.loads(table["__metadata__"][key])
            inner = replaced(inner, data.draw(st.sampled_from(list(places(inner)))), data.draw(VALUES))
            table["__metadata__"] = {key: json.dumps(inner)}
        else:
            name = data.draw(st.sampled_from(sorted(set(table) - {"__metadata__"})))
            where = data.draw(st.sampled_from([(name,), *[(name, *path) for path in places(table[name])]]))
            table = replaced(table, where, data.draw(VALUES))
    path = tmp_path / "broken.safetensors"
    path.write_bytes(joined(table, body))
    for loader in LOADERS:
        answer(loader, path)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_bytes_cut_doubled_moved_and_overwritten(data: st.DataObject, valid: list[bytes], tmp_path: Path) -> None:
    whole = data.draw(st.sampled_from(valid))
    for _ in range(data.draw(st.integers(1, 4))):
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, min(len(whole), 4000))] * 2)))
        change = data.draw(st.sampled_from(["cut", "double", "overwrite", "append"]))
        noise = data.draw(st.binary(max_size=16))
        whole = {
            "cut": whole[:start] + whole[stop:],
            "double": whole[:stop] + whole[start:],
            "overwrite": whole[:start] + noise + whole[start + len(noise) :],
            "append": whole + noise,
        }[change]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(whole)
    for loader in LOADERS:
        answer(loader, path)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    head=st.binary(max_size=200), length=st.integers(0, 2**64 - 1) | st.integers(0, 200), body=st.binary(max_size=64)
)
def test_noise(head: bytes, length: int, body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "noise.safetensors"
    refused_by_all(path, length.to_bytes(8, "little") + head + body)
    refused_by_all(path, len(head).to_bytes(8, "little") + head + body)


def test_numbers_of_any_length(valid: list[bytes], tmp_path: Path) -> None:
    """Fails without MAX_DIGITS and MAX_DIMENSIONS: a product of such sizes takes minutes, and cannot be shown."""
    path = tmp_path / "a.safetensors"
    for whole in valid:
        table, body = split(whole)
        name = next(name for name in table if name != "__metadata__")
        for shape in ([10**4000, 10**4000], [10**39] * 100_000, [10**4000] * 1000):
            table[name]["shape"] = shape
            refused_by_all(path, joined(table, body))


@pytest.mark.slow
def test_a_name_that_stands_twice_among_very_many(tmp_path: Path) -> None:
    """Fails where the repeated name is searched pair by pair: 16 MiB of names took hours."""
    names = ",".join(f'"{index:x}":0' for index in range(1_200_000))
    text = f'{{{names},"zz":0,"zz":0}}'.encode()
    assert 0.7 * MAX_HEADER_BYTES < len(text) < MAX_HEADER_BYTES
    refused_by_all(tmp_path / "a.safetensors", joined(text, b""))


@pytest.mark.slow
@pytest.mark.parametrize("piece", [b"[],", b"{},", b'"",', b"[[[[", b'{"":', b"0,", b'"\\ud800",', b"1e9999,"])
def test_the_largest_headers_cost_bounded_memory(piece: bytes, tmp_path: Path) -> None:
    """Read in a process of its own, whose peak is measured.

    Python's objects take at most 40 bytes for a byte of JSON (an empty dict is 64 and its place in a list 8, for the
    three characters `{},`); on top of the text itself, and of the parser's stack.
    """
    path = tmp_path / "a.safetensors"
    text = b"[" + piece * ((MAX_HEADER_BYTES - 16) // len(piece)) + b"0]"
    path.write_bytes(joined(text, b""))
    code = """
import resource, sys
from foreword.core.artefact import read_header
from foreword.errors import ArtefactError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_header(sys.argv[1])
except ArtefactError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 * MAX_HEADER_BYTES


def limited(loader: str, path: Path, memory: int) -> str:
    """Return what a loader says in a process that may take `memory` bytes more than it has."""
    code = """
import resource, sys
from pathlib import Path
import torch, safetensors.torch
from foreword.core import artefact, compiled
from foreword.errors import ArtefactError
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    (getattr(artefact, sys.argv[1], None) or getattr(compiled, sys.argv[1]))(sys.argv[2])
except ArtefactError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, loader, path, str(memory)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def claiming(header: ArtefactHeader | CompiledHeader, key: str) -> tuple[bytes, int]:
    """Return a file's head that is right for a header, and the bytes of the whole file."""
    table: dict[str, Any] = {"__metadata__": {key: json.dumps(header.to_json())}}
    end = 0
    for name, shape in header.tensor_shapes().items():
        start, end = end, end + 4 * math.prod(shape)
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    head = joined(table, b"")
    return head, len(head) + end


@pytest.mark.slow
def test_a_claim_of_terabytes(valid: list[bytes], tmp_path: Path) -> None:
    """Fails where the file is read before its header is: a sparse file of terabytes costs its maker nothing.

    First one whose header does not fit its size, then one that is all that it says.
    """
    path = tmp_path / "huge.safetensors"
    path.write_bytes(valid[0])
    artefact = dataclasses.replace(read_header(path), block=Block.of([2**34]))
    path.write_bytes(valid[-1])
    compiled = dataclasses.replace(read_compiled_header(path), num_positions=2**33)
    for small, loader, (head, size) in (
        (valid[0], "load_artefact", claiming(artefact, "foreword")),
        (valid[-1], "load_compiled", claiming(compiled, "foreword_compiled")),
    ):
        for data, answer in ((small, "bytes where the header needs"), (head, "more than there is memory for")):
            path.write_bytes(data)
            os.truncate(path, size)
            assert size > 2**40 and answer in limited(loader, path, 64 * 2**20)


def test_a_file_that_changes_while_it_is_read(
    valid: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used is what was checked: the header is read again from the very bytes that are loaded."""
    from foreword.core import artefact

    path = tmp_path / "a.safetensors"
    path.write_bytes(valid[0])
    read_whole = artefact.read_whole

    def swapped(path: Path) -> bytes:
        path.write_bytes(valid[2][:-1])
        return read_whole(path)

    monkeypatch.setattr(artefact, "read_whole", swapped)
    with pytest.raises(ArtefactError, match="bytes where the header needs"):
        load_artefact(path)


def test_the_valid_ones_are_taken(valid: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for data in valid[:-1]:
        path.write_bytes(data)
        assert isinstance(load_artefact(path), Artefact)
    path.write_bytes(valid[-1])
    assert load_compiled(path)[0].num_positions
