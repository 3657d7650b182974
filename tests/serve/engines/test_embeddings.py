"""The embeddings-only form: rows that equal the base's own, and what cannot go this way."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from foreword.core.artefact import ArtefactHeader, file_sha256, load_artefact, save_artefact
from foreword.core.compile import uncompiled_logits
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftPrompt
from foreword.core.template import TaskTemplate
from foreword.engine.render import Prepared, prepare
from foreword.engine.request import Request
from foreword.errors import BackendFailed, BadRequest, ConfigError, IncompatibleModel
from foreword.serve.backend import Caller
from foreword.serve.engines.base_info import BaseInfo
from foreword.serve.engines.embeddings import PLAIN, SCALED, EmbeddingsBackend, EmbeddingTable, open_table
from foreword.serve.vllm.wire import cache_salt, scope_of
from tests.serve.artefacts import demo_base, write_artefact
from tests.serve.http_cases import answer, demo_info, in_loop, load, text
from tests.serve.stub_vllm import StubVLLM, stubs
from tests.tiny import CONFIGS, tiny

NAMES = sorted(CONFIGS)
IDS = [0, 5, 96, 5]


def info_of(base: FrozenModel, folder: Path) -> BaseInfo:
    dtype = str(base.dtype).removeprefix("torch.")
    return BaseInfo(folder=str(folder), fingerprint=base.fingerprint, spec=base.spec, stop_ids=frozenset(), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_base(tmp_path: Path, name: str, dtype: str) -> None:
    base = tiny(name, dtype)
    base.model.save_pretrained(tmp_path)
    info = info_of(base, tmp_path)
    assert info.spec.model_type in PLAIN | SCALED
    assert torch.equal(open_table(info).rows(IDS), base.embed(torch.tensor(IDS)))


def test_families_that_are_not_known_are_refused(tmp_path: Path) -> None:
    base = tiny("llama")
    base.model.save_pretrained(tmp_path)
    data = info_of(base, tmp_path).to_json()
    for change in ({"model_type": "minicpm"}, {"embed_size": 32}):
        odd = BaseInfo.from_json(data | {"spec": data["spec"] | change})
        with pytest.raises(IncompatibleModel, match=rf"'{odd.spec.model_type}'") as caught:
            open_table(odd)
        assert "plugin" in caught.value.hint


def test_tables_in_shards_tied_or_missing(tmp_path: Path) -> None:
    base = tiny("llama")
    base.model.save_pretrained(tmp_path)
    info, whole = info_of(base, tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(whole)
    table = tensors.pop("model.embed_tokens.weight")
    whole.unlink()
    save_file({"model.embed_tokens.weight": table}, tmp_path / "b.safetensors")
    save_file(tensors, tmp_path / "a.safetensors")
    names = {name: "a.safetensors" for name in tensors} | {"model.embed_tokens.weight": "b.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert torch.equal(open_table(info).rows(IDS), base.embed(torch.tensor(IDS)))
    index.unlink()
    (tmp_path / "b.safetensors").unlink()
    save_file({"lm_head.weight": table}, tmp_path / "a.safetensors")  # tied, saved under the head's name
    assert torch.equal(open_table(info).rows(IDS), base.embed(torch.tensor(IDS)))
    for wrong in (table[:-1], table.to(torch.int8)):
        save_file({"lm_head.weight": wrong}, tmp_path / "a.safetensors")
        with pytest.raises(ConfigError, match=r"no input embedding of shape \[97, 64\]"):
            open_table(info)


def test_the_table_is_mapped_not_read(tmp_path: Path) -> None:
    base = tiny("llama")
    base.model.save_pretrained(tmp_path)
    table = open_table(info_of(base, tmp_path))
    mapped = Path("/proc/self/maps")
    if mapped.is_file():
        assert str(tmp_path / "model.safetensors") in mapped.read_text()
    assert table.weight.shape == (97, 64)


Scenario = Callable[[EmbeddingsBackend, Sequence[StubVLLM]], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def backend_over(engines: Sequence[StubVLLM]) -> AsyncIterator[EmbeddingsBackend]:
    urls = [engine.url for engine in engines]
    backend = EmbeddingsBackend(demo_info(), demo_base().tokenizer, urls, probe_every_s=0.02)
    try:
        yield backend
    finally:
        await backend.aclose()


def run(scenario: Scenario, **fields: Any) -> None:
    async def main() -> None:
        given = {"has_plugin": False, "takes_embeddings": True} | fields
        async with stubs(1, **given) as engines, backend_over(engines) as backend:
            await scenario(backend, engines)

    in_loop(main)


def rows_of(body: dict[str, Any]) -> torch.Tensor:
    """What vLLM reads: never pickled code."""
    data = io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True))
    rows: torch.Tensor = torch.load(data, weights_only=True)
    return rows


def with_slots(folder: Path) -> Path:
    """An artefact with two soft slots behind the text."""
    base = demo_base()
    template = TaskTemplate("{soft:4}{input}{soft:3} so {soft:2}", chat=False)
    header = ArtefactHeader(
        method="prompt",
        task="slots",
        block=template.block(base.tokenizer),
        soft_after=5,
        base=base.fingerprint,
        spec=base.spec,
        template=template.to_json(),
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in header.tensor_shapes().items()}
    save_artefact(folder / "slots.safetensors", header, tensors)
    return folder / "slots.safetensors"


def test_the_whole_sequence_is_embedded_as_the_model_reads_it(tmp_path: Path) -> None:
    """Logits over what is sent equal those with the vectors written into the sequence."""
    path = write_artefact(tmp_path, "triage")

    async def scenario(backend: EmbeddingsBackend, engines: Sequence[StubVLLM]) -> None:
        sha256 = await load(backend, path)
        caller = Caller(scope="acme")
        found = await answer(backend, Request(prompt="hello", prefix=sha256), caller=caller)
        assert text(found[0]) == "w0 w1 w2 "
        body = engines[0].bodies[-1]
        assert "prompt" not in body and "kv_transfer_params" not in body
        assert body["cache_salt"] == cache_salt(scope_of("acme"), sha256)
        rows, base = rows_of(body), demo_base()
        assert rows.dtype == torch.float32
        ids = prepare(Request(prompt="hello"), base, backend.loaded[sha256]).ids
        assert rows.shape == (backend.loaded[sha256].num_positions + len(ids), base.spec.hidden_size)
        vectors = load_artefact(path).vectors
        assert isinstance(vectors, SoftPrompt)
        with torch.no_grad():
            expected = uncompiled_logits(base, torch.tensor([ids]), vectors)[0]
            logits = base.model(inputs_embeds=rows[None]).logits[0, -len(ids) :]
        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)

    run(scenario)


def test_soft_slots_behind_the_text_are_in_their_places(tmp_path: Path) -> None:
    path = with_slots(tmp_path)

    async def scenario(backend: EmbeddingsBackend, engines: Sequence[StubVLLM]) -> None:
        sha256 = await load(backend, path)
        await answer(backend, Request(prompt="hello", prefix=sha256))
        rows, base, vectors = rows_of(engines[0].bodies[-1]), demo_base(), load_artefact(path).vectors
        assert isinstance(vectors, SoftPrompt) and vectors.after is not None
        prepared = prepare(Request(prompt="hello", prefix=sha256), base, backend.loaded[sha256])
        count = backend.loaded[sha256].num_positions
        placed = {count + offset + k: first + k for offset, first, length in prepared.slots for k in range(length)}
        assert len(placed) == 5
        for place, row in placed.items():
            assert torch.equal(rows[place], vectors.after[row])
        for place, token in enumerate(prepared.ids, count):
            if place not in placed:
                assert torch.equal(rows[place], base.embed(torch.tensor(token)))
        with pytest.raises(BadRequest, match="5 soft slots behind the text"):
            await backend.submit([Request(prompt_ids=[5], prefix=sha256)])

    run(scenario)


def test_the_plain_base_goes_as_ids() -> None:
    async def scenario(backend: EmbeddingsBackend, engines: Sequence[StubVLLM]) -> None:
        await answer(backend, Request(prompt="hello"))
        assert "prompt_embeds" not in engines[0].bodies[0] and engines[0].bodies[0]["prompt"]
        assert backend._table is None  # nothing is mapped before a task needs it

    run(scenario)


@pytest.mark.parametrize("method", ["prefix", "kv"])
def test_prefixes_are_refused_and_the_cure_named(tmp_path: Path, method: Any) -> None:
    path = write_artefact(tmp_path, "triage", method)

    async def scenario(backend: EmbeddingsBackend, engines: Sequence[StubVLLM]) -> None:
        with pytest.raises(IncompatibleModel, match=f"is a {method}, which no embeddings can carry") as caught:
            await load(backend, path)
        assert "plugin" in caught.value.hint and not engines[0].bodies

    run(scenario)


def test_a_server_that_takes_no_embeddings_is_found_at_load(tmp_path: Path) -> None:
    path = write_artefact(tmp_path, "triage")

    async def scenario(backend: EmbeddingsBackend, engines: Sequence[StubVLLM]) -> None:
        with pytest.raises(BackendFailed, match="takes no embeddings") as caught:
            await load(backend, path)
        assert "--enable-prompt-embeds" in caught.value.hint

    run(scenario, takes_embeddings=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_that_is_no_number_leaves(tmp_path: Path, value: float) -> None:
    path = write_artefact(tmp_path, "triage")

    async def scenario(backend: EmbeddingsBackend, engines: Sequence[StubVLLM]) -> None:
        sha256 = await load(backend, path)
        table = backend._table
        assert table is not None
        weight = table.weight.clone()
        weight[5, 3] = value
        backend._table = EmbeddingTable(weight, table.dtype)
        sent = len(engines[0].bodies)
        with pytest.raises(BackendFailed, match="not all finite"):
            await backend.submit([Request(prompt_ids=[4, 5], prefix=sha256)])
        backend._table = EmbeddingTable(table.weight[:, :-1], table.dtype)
        with pytest.raises((BackendFailed, RuntimeError)):
            await backend.submit([Request(prompt_ids=[4], prefix=sha256)])
        assert len(engines[0].bodies) == sent

    run(scenario)


def test_bodies_are_made_in_a_thread(tmp_path: Path) -> None:
    path = write_artefact(tmp_path, "triage")

    async def scenario(backend: EmbeddingsBackend, engines: Sequence[StubVLLM]) -> None:
        sha256 = await load(backend, path)
        made, original = [], backend.encoded

        def encoded(own: Any, prepared: Prepared) -> str:
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
            made.append(prepared)
            return original(own, prepared)

        backend.encoded = encoded  # type: ignore[method-assign]
        await answer(backend, Request(prompt="x", prefix=sha256))
        assert len(made) == 1

    run(scenario)


def test_bytes_are_those_of_the_rows(tmp_path: Path) -> None:
    path = with_slots(tmp_path)

    async def scenario(backend: EmbeddingsBackend, engines: Sequence[StubVLLM]) -> None:
        sha256 = file_sha256(path)
        num_bytes = await backend.load(sha256, path)
        count = backend.loaded[sha256].num_positions + 5
        assert num_bytes == count * demo_base().spec.hidden_size * 4

    run(scenario)
