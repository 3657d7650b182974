"""Checks of a PEFT directory: what its configuration declares, beside the numbers that are stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.core.interop.imported import read_json, read_safetensors
from foreword.core.interop.peft import CONFIG, PICKLE, PREFIXES, PROMPTS, ROWS, TENSORS
from foreword.doctor.checks.artefact_file import pickle_finding, read_safetensors_table
from foreword.doctor.checks.artefact_vectors import Parts, check_layers_differ, check_sizes
from foreword.doctor.finding import Finding
from foreword.errors import ForewordError

if TYPE_CHECKING:
    import torch

    from foreword.core.model import FrozenModel


def check_peft_directory(path: Path, base: FrozenModel | None = None) -> list[Finding]:
    """Check a directory of `adapter_config.json` and vectors, also on a base where one is given."""
    try:
        config = read_json(path / CONFIG)
    except ForewordError as error:
        return [Finding(check="file", ok=False, measured=error.message, fix=error.hint)]
    file = path / TENSORS
    if not file.is_file() and (path / PICKLE).is_file():
        found = pickle_finding(path / PICKLE)
        return [found] if found else []
    kind = config.get("peft_type")
    if kind not in (*PROMPTS, *PREFIXES):
        measured = f"peft_type {kind!r} is no soft prompt or prefix"
        return [Finding(check="file", ok=True, skipped=True, measured=measured)]
    try:
        shapes = {name: info["shape"] for name, info in read_safetensors_table(file).items() if name != "__metadata__"}
    except ForewordError as error:
        return [_file(False, error.message, error.hint)]
    rows = shapes.get(ROWS, [])
    declared = config.get("num_virtual_tokens")
    if len(rows) != 2 or not all(rows):
        return [_file(False, f"{ROWS!r} has shape {rows or 'none'}, not [P, width]; tensors: {', '.join(shapes)}")]
    if declared not in (None, rows[0]):
        return [_file(False, f"{rows[0]} vectors where {CONFIG} says {declared}")]
    findings = [_file(True, f"{kind}, P={rows[0]}, {rows[0] * rows[1]} numbers")]
    findings.append(check_declared(config, rows, base))
    if not findings[-1].ok:
        return findings
    parts = _parts(read_safetensors(file)[ROWS].float(), config, base)
    fits = base if base is None or _fits(parts, base) else None
    return [*findings, check_sizes(parts, fits), check_layers_differ(parts)]


def check_declared(config: Mapping[str, Any], rows: list[int], base: FrozenModel | None) -> Finding:
    """Call it prompt tuning, or give every layer keys and values: a prefix has 2·L·Hkv·Dh numbers per vector.

    The stored width beside what the declared type needs, from the base where it is given, else from the configuration.
    """
    kind, width = str(config.get("peft_type")), rows[1]
    embed = base.spec.embed_size if base is not None else config.get("token_dim")
    layers = config.get("num_layers")
    if kind in PROMPTS:
        needed, formula = embed, "D"
    elif base is not None:
        needed, formula = base.spec.kv_bytes(1, 1), "2·L·Hkv·Dh"
        layers = layers if layers is not None else base.spec.num_layers
    else:
        needed = 2 * layers * embed if isinstance(layers, int) and isinstance(embed, int) else None
        formula = "2·num_layers·token_dim"
    numbers = {"declared": kind, "width": width, "needed": needed, "num_vectors": rows[0]}
    expected = f"{needed} numbers per vector ({formula}) for {kind}"
    if needed is None or width == needed:
        measured = f"{width} numbers per vector, as {kind} has"
        return Finding(check="declared", ok=True, measured=measured, expected=expected, numbers=numbers)
    measured = f"{kind} with {width} numbers per vector, where {formula} = {needed}"
    if kind in PREFIXES and width == embed:
        fault, fix = "embeddings-only", "Call it PROMPT_TUNING, or train keys and values for every layer."
        measured += f": {rows[0]} rows of the embeddings' width, one site"
    elif base is not None and isinstance(layers, int) and layers != base.spec.num_layers:
        fault, fix = "other-base", "Give the base it was trained for."
        measured += f"; it was made for {layers} layers, this base has {base.spec.num_layers}"
    else:
        fault, fix = "wrong-shape", "Read the key/value heads and the head size from the base's configuration."
    return Finding(
        check="declared", ok=False, measured=measured, expected=expected, fix=fix, fault=fault, numbers=numbers
    )


def _file(ok: bool, measured: str, fix: str = "") -> Finding:
    return Finding(
        check="file",
        ok=ok,
        measured=measured,
        expected=f"{CONFIG} beside {TENSORS} with rows [P, width] that agree with it",
        fix=fix or "Save the adapter again with PEFT's save_pretrained.",
        fault="" if ok else "unsafe-file",
    )


def _parts(rows: torch.Tensor, config: Mapping[str, Any], base: FrozenModel | None) -> Parts:
    """Return the rows by kind and layer: [P, 2·L·Hkv·Dh] holds key and value of each layer in turn."""
    if config.get("peft_type") in PROMPTS:
        return {"prompt": [rows]}
    layers = base.spec.num_layers if base is not None else config.get("num_layers")
    if not isinstance(layers, int) or layers < 1 or rows.shape[1] % (2 * layers):
        return {"rows": [rows]}
    pieces = list(rows.chunk(2 * layers, dim=1))
    return {"keys": pieces[0::2], "values": pieces[1::2]}


def _fits(parts: Parts, base: FrozenModel) -> bool:
    """Whether every part has the width of the base's own rows."""
    if "prompt" in parts:
        return parts["prompt"][0].shape[1] == base.spec.embed_size
    widths = [layer.num_kv_heads * layer.head_dim for layer in base.spec.layers]
    return "keys" in parts and [part.shape[1] for part in parts["keys"]] == widths
