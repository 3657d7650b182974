"""Faults of the sequence: masks, positions, padding, and where the logits are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from foreword.doctor.subjects import Implementation
from tests.doctor.lab.materials import (
    differs,
    greedy_reference,
    hand,
    private,
    ragged,
    subject,
    vectors_for,
)
from tests.doctor.lab.peft_models import peft_prompt
from tests.doctor.lab.plant import Plant
from tests.tiny import tiny


def planted(
    fault: str,
    architecture: str,
    method: str,
    variant: str,
    *,
    side: str = "left",
    cheap: bool = False,
    also: frozenset[str] = frozenset(),
    black_box: bool = False,
    bare: bool = False,
    **switches: Any,
) -> Plant:
    """A handmade implementation with switches; the proof is its distance from the reference, rows padded at `side`."""

    def make() -> Implementation:
        base, vectors = tiny(architecture), vectors_for(architecture, method)
        return subject(base, vectors, hand(private(base), vectors, **switches), black_box=black_box, bare=bare)

    shape = " black-box" * black_box + " bare" * bare
    return Plant(
        fault=fault,
        architecture=architecture,
        make=make,
        variant=f"{method} {variant}{shape}",
        proof=differs(architecture, method, side),
        cheap=cheap,
        also=also,
    )


def mask_blind() -> Iterator[Plant]:
    """Zeros over the vectors, or a mask of the text alone."""
    for name in ("llama", "qwen3", "gpt2", "bloom", "opt"):
        for method in ("prompt", "prefix", "kv"):
            yield planted("mask-blind", name, method, "zeros", mask="zeros", layout="rows", cheap=name == "llama")
    yield planted("mask-blind", "gpt2", "prompt", "zeros", mask="zeros", layout="rows", black_box=True, cheap=True)
    yield planted("mask-blind", "llama", "kv", "zeros", mask="zeros", layout="rows", black_box=True, bare=True)
    for name in ("gemma3", "gpt-neox"):
        yield planted("mask-blind", name, "kv", "zeros", mask="zeros")
    for name in ("llama", "gpt2"):
        # transformers fills a short mask up with zeros behind: the last P tokens of the text are hidden
        yield planted("mask-blind", name, "kv", "not extended", mask="text-only")


def positions_unshifted() -> Iterator[Plant]:
    """Text that starts at 0, at P - 1, or at 2·P."""
    for name in ("llama", "qwen3", "gpt2", "mistral", "gemma3", "opt", "gpt-neox"):
        yield planted("positions-unshifted", name, "kv", "at 0", positions="unshifted", cheap=name in ("llama", "gpt2"))
    for name in ("llama", "gpt2"):
        for method in ("prompt", "prefix"):
            yield planted("positions-unshifted", name, method, "at 0", positions="unshifted")
        yield planted("positions-unshifted", name, "kv", "at P-1", positions="one-short")
        yield planted("positions-unshifted", name, "kv", "at 2P", positions="twice")
        yield planted("positions-unshifted", name, "kv", "at 0", positions="unshifted", black_box=True)
        yield planted("positions-unshifted", name, "prefix", "at 0", positions="unshifted", bare=True)


def padding_between() -> Iterator[Plant]:
    """Vectors, padding, text, with positions that do not see the padding."""
    for name in ("llama", "qwen3", "gpt2", "opt", "phi3"):
        yield planted("padding-between", name, "kv", "blind positions", positions="blind", cheap=name == "llama")
        yield planted("padding-between", name, "prompt", "blind positions", positions="blind")
    for name in ("llama", "gpt2"):
        yield planted("padding-between", name, "prefix", "blind positions", positions="blind")
        yield planted("padding-between", name, "prompt", "left to the model", positions="default", black_box=True)
    for name in ("llama", "gpt2", "qwen2"):
        yield peft_plant(name)


def peft_plant(name: str) -> Plant:
    """PEFT's prompt tuning, batches padded at the left as for generation."""
    return Plant(
        fault="padding-between",
        architecture=name,
        make=lambda: peft_prompt(name),
        variant="PEFT prompt tuning",
        proof=differs(name, "prompt"),
        cheap=name == "gpt2",
    )


def right_padded() -> Iterator[Plant]:
    """Generation from the last column of rows that are padded behind."""
    for name in ("llama", "gpt2", "qwen3", "bloom"):
        for method in ("kv", "prompt") if name in ("llama", "gpt2") else ("kv",):
            yield generating(
                name, method, "pads behind", "right-padded", "right-padded-generation", cheap=name == "gpt2"
            )
    yield generating("llama", "prefix", "pads behind", "right-padded", "right-padded-generation", black_box=True)
    for name in ("llama", "gpt2"):
        yield generating(name, "kv", "takes what it gets", "as-given", "right-padded-generation", side="right")


def generating(
    name: str,
    method: str,
    variant: str,
    serving: str,
    fault: str,
    *,
    side: str = "left",
    cheap: bool = False,
    black_box: bool = False,
    **switches: Any,
) -> Plant:
    """An implementation that forwards right and generates wrong; the proof counts short rows with other tokens."""

    def make() -> Implementation:
        base, vectors = tiny(name), vectors_for(name, method)
        made = hand(private(base), vectors, serving=serving, **switches)
        return subject(base, vectors, made, black_box=black_box)

    def proof(made: Implementation) -> tuple[float, float]:
        base, vectors = tiny(name), vectors_for(name, method)
        assert made.generate is not None
        ids, mask = ragged(side=side)
        found = made.generate(ids, mask, 8).tolist()
        rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
        wrong = [f != greedy_reference(base, vectors, row, 8) for f, row in zip(found, rows, strict=True)]
        return float(sum(wrong)), 0.5

    shape = " black-box" * black_box
    return Plant(
        fault=fault,
        architecture=name,
        make=make,
        variant=f"{method} {variant}{shape}",
        proof=proof,
        cheap=cheap,
    )


def logits_uncut() -> Iterator[Plant]:
    """Logits of vectors and text, or as many as the text has but from the front."""
    for name in ("llama", "gpt2", "qwen3"):
        yield planted("logits-uncut", name, "prompt", "P + T", cut="none", layout="mask", cheap=name == "llama")
        yield planted("logits-uncut", name, "prefix", "P + T", cut="none", layout="mask")
    yield planted("logits-uncut", "bloom", "prompt", "P + T", cut="none", layout="mask", black_box=True, bare=True)
    for name in ("llama", "gpt2"):
        yield planted("logits-uncut", name, "prompt", "cut behind", cut="behind", layout="mask")
        yield planted("logits-uncut", name, "prefix", "cut behind", cut="behind", layout="mask")
    for name in ("llama", "opt"):
        yield Plant(
            fault="logits-uncut",
            architecture=name,
            make=lambda name=name: peft_prompt(name, cut=False),
            variant="PEFT prompt tuning as it comes",
            proof=differs(name, "prompt", "right"),
        )


PLANTS = [
    *mask_blind(),
    *positions_unshifted(),
    *padding_between(),
    *right_padded(),
    *logits_uncut(),
]
