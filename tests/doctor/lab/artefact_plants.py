"""Faults of files: unsafe, broken, of other shapes, for another base, tokenizer or template."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreword.core.artefact import ArtefactHeader, save_artefact
from foreword.core.compile import compile
from foreword.core.conformance import make_probes, replay
from foreword.core.init import initial_vectors
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt, Vectors
from foreword.core.template import TaskTemplate
from foreword.doctor.checks.artefact import check_artefact
from foreword.doctor.finding import Finding
from tests.bundled import bundled
from tests.doctor.lab.cache_plants import force, turned
from tests.doctor.lab.number_plants import revised
from tests.doctor.lab.plant import Plant
from tests.tiny import tiny

TEMPLATE = TaskTemplate("Route the mail. {soft:6}{input}", chat=True)


@dataclass(frozen=True, kw_only=True)
class Filed:
    """A file, and the base that it is to be served on."""

    path: Path
    base: FrozenModel | None
    first: FrozenModel
    """The base that it was trained for."""


def check_filed(filed: Filed) -> Sequence[Finding]:
    """Return doctor's findings on the file."""
    return check_artefact(filed.path, filed.base)


@cache
def folder() -> Path:
    """Return a folder that lives as long as the process."""
    return Path(tempfile.mkdtemp(prefix="foreword-lab-"))


@cache
def spoken(name: str) -> FrozenModel:
    """Return a tiny base with the bundled tokenizer."""
    tokenizer = bundled().tokenizer
    return tiny(name, vocab_size=len(tokenizer), tokenizer=tokenizer)


@cache
def made(name: str, method: str) -> tuple[ArtefactHeader, Vectors]:
    """Return header and vectors of a sound version."""
    base = spoken(name)
    block = TEMPLATE.block(base.tokenizer)
    vectors = initial_vectors(base, method, block, "random", seed=2)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 200, (5 + index,), generator=generator).tolist() for index in range(8)]
    header = ArtefactHeader(
        method=method,  # type: ignore[arg-type]
        task="routing",
        block=block,
        base=base.fingerprint,
        spec=base.spec,
        template={**TEMPLATE.to_json(), "sha256": TEMPLATE.sha256(base.tokenizer)},
        conformance=make_probes(base, compile(base, vectors), rows),
    )
    return header, vectors


def written(name: str, method: str, tag: str, *, tensors: Any = None, header: Any = None) -> Path:
    """Write the version, or a spoilt one, and return its path."""
    path = folder() / f"{name}-{method}-{tag}.safetensors"
    sound, vectors = made(name, method)
    save_artefact(path, header or sound, tensors or vectors.tensors())
    return path


def plant(
    fault: str,
    name: str,
    variant: str,
    make: Callable[[], Filed],
    proof: Callable[[Filed], tuple[float, float]],
    *,
    cheap: bool = False,
    also: frozenset[str] = frozenset(),
) -> Plant:
    """A file with a fault."""
    return Plant(
        fault=fault,
        architecture=name,
        make=make,
        variant=f"file: {variant}",
        proof=proof,
        cheap=cheap,
        also=also,
        examine=check_filed,
    )


# Unsafe and broken


class Runs:
    """What a pickle would call."""

    def __reduce__(self) -> Any:
        return print, ("this ran",)


def pickled(name: str) -> bytes:
    """Return vectors with a passenger, as `torch.save` writes them."""
    buffer = io.BytesIO()
    torch.save({"prompt": torch.zeros(4, 64), "note": Runs()}, buffer)
    return buffer.getvalue()


def spoil(name: str, how: str) -> Filed:
    """Return a file that must not be opened, or cannot be."""
    base, path = spoken(name), written(name, "prompt", how)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    if how == "pickle":
        data = pickled(name)
    elif how == "truncated":
        data = data[:-100]
    elif how == "appended":
        data += b"\0" * 64
    elif how == "shape":
        rows, width = table["prompt"]["shape"]
        table["prompt"]["shape"] = [rows * 2, width // 2]
        head = json.dumps(table).encode()
        data = len(head).to_bytes(8, "little") + head + data[8 + length :]
    elif how == "foreign":
        table["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [table["prompt"]["data_offsets"][1]] * 2}
        head = json.dumps(table).encode()
        data = len(head).to_bytes(8, "little") + head + data[8 + length :]
    path.write_bytes(data)
    return Filed(path=path, base=base, first=base)


def is_spoilt(filed: Filed) -> tuple[float, float]:
    """Proof, with the safetensors library and the header alone: the file is not what it says."""
    data = filed.path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return 1.0, 0.5
    table = json.loads(data[8 : 8 + length])
    header = json.loads(table.pop("__metadata__")["foreword"])
    end = max(entry["data_offsets"][1] for entry in table.values())
    whole = 8 + length + end == len(data) and list(table) == [header["method"]]
    soft = sum(segment for segment in header["block"] if isinstance(segment, int))
    whole = whole and table["prompt"]["shape"] == [soft, header["spec"]["embed_size"]]
    return float(not whole), 0.5


def unsafe() -> Iterator[Plant]:
    """Pickles under a good name, files cut short or with more than they say."""
    for name in ("llama", "gpt2"):
        for how in ("pickle", "truncated", "appended", "shape", "foreign"):
            yield plant(
                "unsafe-file",
                name,
                how,
                lambda name=name, how=how: spoil(name, how),
                is_spoilt,
                cheap=name == "llama" and how in ("pickle", "truncated"),
                also=frozenset({"wrong-shape"}) if how == "shape" else frozenset(),
            )


# Numbers


def with_nan(name: str, method: str) -> Filed:
    """Return a file with one NaN among its numbers, written past our own writer."""
    path = written(name, method, "nan")
    data = bytearray(path.read_bytes())
    data[-8:-4] = b"\x00\x00\xc0\x7f"
    path.write_bytes(bytes(data))
    return Filed(path=path, base=spoken(name), first=spoken(name))


def enormous(name: str, method: str) -> Filed:
    """Return a file whose vectors are a million times as long as anything the base knows."""
    _, vectors = made(name, method)
    path = written(name, method, "huge", tensors={k: t * 1e6 for k, t in vectors.tensors().items()})
    return Filed(path=path, base=spoken(name), first=spoken(name))


def acts_otherwise(filed: Filed) -> tuple[float, float]:
    """Proof: what the probes of training say does not hold, or the file's numbers cannot be read."""
    from safetensors.torch import load_file

    tensors = load_file(filed.path)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        return 1.0, 0.5
    with filed.path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = json.loads(json.loads(file.read(length))["__metadata__"]["foreword"])
    header = ArtefactHeader.from_json(head)
    base = filed.base or filed.first
    vectors: Vectors
    if header.method == "prompt":
        vectors = SoftPrompt(tensors["prompt"], header.block)
    elif header.method == "prefix":
        vectors = SoftPrefix(tensors["prefix"], header.block)
    else:
        layers = range(len(tensors) // 2)
        vectors = SoftKV(
            tuple(tensors[f"key.{i}"] for i in layers), tuple(tensors[f"value.{i}"] for i in layers), header.block
        )
    return replay(base, compile(base, vectors), header.conformance).max_kl, 1e-4


def numbers() -> Iterator[Plant]:
    """NaN, enormous norms, one layer's vectors in all, keys turned wrong."""
    for name in ("llama", "gpt2", "qwen3"):
        for method in ("prompt", "kv"):
            yield plant(
                "not-finite",
                name,
                f"{method} with a NaN",
                lambda name=name, method=method: with_nan(name, method),
                acts_otherwise,
                cheap=name == "llama" and method == "kv",
            )
        yield plant(
            "not-finite",
            name,
            "kv enormous",
            lambda name=name: enormous(name, "kv"),
            acts_otherwise,
        )
        yield plant(
            "layers-tied",
            name,
            "one layer in all",
            lambda name=name: tied(name),
            are_equal,
            cheap=name == "llama",
        )
        yield plant("wrong-shape", name, "kv axes swapped", lambda name=name: swapped(name), acts_otherwise)
        if name != "gpt2":
            for times in (1, -1):
                yield plant(
                    "keys-misrotated",
                    name,
                    "kv twice" if times > 0 else "kv not at all",
                    lambda name=name, times=times: misrotated(name, times),
                    acts_otherwise,
                    cheap=name == "llama",
                )


def tied(name: str) -> Filed:
    """Return a prefix whose layers all hold the first one's vectors; its probes are its own."""
    base, (header, vectors) = spoken(name), made(name, "prefix")
    assert isinstance(vectors, SoftPrefix)
    same = SoftPrefix(vectors.vectors[:1].expand_as(vectors.vectors).contiguous(), header.block)
    rows = [list(probe["ids"]) for probe in header.conformance]
    header = dataclasses.replace(header, conformance=make_probes(base, compile(base, same), rows))
    return Filed(path=written(name, "prefix", "tied", tensors=same.tensors(), header=header), base=base, first=base)


def are_equal(filed: Filed) -> tuple[float, float]:
    """Proof: all layers hold the same numbers."""
    from safetensors.torch import load_file

    rows = load_file(filed.path)["prefix"]
    return float((rows == rows[:1]).all()), 0.5


def swapped(name: str) -> Filed:
    """Return keys and values written through a reshape that forgot to permute."""
    _, vectors = made(name, "kv")
    moved = {key: force(tensor, "viewed") for key, tensor in vectors.tensors().items()}
    return Filed(path=written(name, "kv", "viewed", tensors=moved), base=spoken(name), first=spoken(name))


def misrotated(name: str, times: int) -> Filed:
    """Return keys written before rotation, or after a second one."""
    base, (header, vectors) = spoken(name), made(name, "kv")
    places = header.block.soft_positions()

    def turn(key: Tensor) -> Tensor:
        whole = key.new_zeros(key.shape[0], max(places) + 1, key.shape[2])
        whole[:, places] = key
        return turned(base, whole, times)[:, places]

    tensors = {key: turn(t) if key.startswith("key") else t for key, t in vectors.tensors().items()}
    return Filed(path=written(name, "kv", f"turned{times}", tensors=tensors), base=base, first=base)


# Where it is served


def another(name: str, how: str) -> FrozenModel:
    """Return the base as it is served: another revision, tokenizer or template."""
    base = spoken(name)
    if how in ("revision", "merged LoRA"):
        return FrozenModel(revised(base, how), base.tokenizer)
    if how == "model":
        return spoken("opt")
    tokenizer = copy.deepcopy(base.tokenizer)
    if how == "tokens added":
        tokenizer.add_tokens(["<ticket>", "<mail>"])
    if how == "template":
        tokenizer.chat_template = tokenizer.chat_template + "Answer:"
    if how == "system":
        tokenizer.chat_template = "You are helpful.\n" + tokenizer.chat_template
    return FrozenModel(base.model, tokenizer)


def served_on(name: str, method: str, how: str) -> Filed:
    """Return a sound file on a base that is another one."""
    return Filed(path=written(name, method, how.replace(" ", "-")), base=another(name, how), first=spoken(name))


def hash_unknown(name: str) -> Filed:
    """Return a file that does not know the chat template's hash, only what it rendered, on a base with another."""
    header, _ = made(name, "prompt")
    header = dataclasses.replace(header, base=dataclasses.replace(header.base, chat_template_sha256=""))
    path = written(name, "prompt", "no-template-hash", header=header)
    return Filed(path=path, base=another(name, "system"), first=spoken(name))


def renders_apart(filed: Filed) -> tuple[float, float]:
    """Proof: the served base's hash, ids or template of the same text differ from those of training."""
    assert filed.base is not None
    mine, other = filed.first.tokenizer, filed.base.tokenizer
    text = "Please look at <ticket> and <mail>."
    chat = [{"role": "user", "content": text}]
    apart = mine(text).input_ids != other(text).input_ids
    apart |= mine.apply_chat_template(chat, tokenize=False) != other.apply_chat_template(chat, tokenize=False)
    return float(apart), 0.5


def weights_apart(filed: Filed) -> tuple[float, float]:
    """Proof: the served base answers otherwise without vectors."""
    assert filed.base is not None
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        pair = [base.model(input_ids=ids).logits for base in (filed.first, filed.base)]
    return float((pair[0] - pair[1]).abs().max()), 0.05


def moved() -> Iterator[Plant]:
    """Sound files on another base, tokenizer or template."""
    for name in ("llama", "gpt2", "qwen3"):
        for method in ("prompt", "prefix", "kv"):
            for how in ("revision", "merged LoRA"):
                yield plant(
                    "other-base",
                    name,
                    f"{method} on a {how}",
                    lambda name=name, method=method, how=how: served_on(name, method, how),
                    weights_apart,
                    cheap=name == "llama" and method == "prefix" and how == "revision",
                )
        yield plant(
            "other-base",
            name,
            "on another model",
            lambda name=name: served_on(name, "kv", "model"),
            weights_apart,
        )
        for fault, how in (
            ("tokenizer-changed", "tokens added"),
            ("template-drift", "template"),
            ("template-drift", "system"),
        ):
            yield plant(
                fault,
                name,
                how,
                lambda name=name, how=how: served_on(name, "prompt", how),
                renders_apart,
                cheap=name == "gpt2" and how != "template",
            )
        yield plant("template-drift", name, "its hash unknown", lambda name=name: hash_unknown(name), renders_apart)


PLANTS = [*unsafe(), *numbers(), *moved()]
