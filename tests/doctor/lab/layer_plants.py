"""Faults inside the stack: what each layer gets, and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt
from foreword.doctor.subjects import Implementation
from tests.doctor.lab.handmade import HandKV, HandPrefix, HandPrompt
from tests.doctor.lab.materials import differs, private, subject, vectors_for, worst
from tests.doctor.lab.plant import Plant
from tests.doctor.lab.stacked import HandStacked
from tests.tiny import tiny


def prefix_of(name: str) -> SoftPrefix:
    """Return hidden-state vectors for a base."""
    vectors = vectors_for(name, "prefix")
    assert isinstance(vectors, SoftPrefix)
    return vectors


def kv_of(name: str, num: int = 5) -> SoftKV:
    """Return keys and values for a base."""
    vectors = vectors_for(name, "kv", num)
    assert isinstance(vectors, SoftKV)
    return vectors


def tied_prefix(name: str) -> SoftPrefix:
    """Return the first layer's vectors for all layers, one tensor expanded."""
    vectors = prefix_of(name).vectors
    return SoftPrefix(vectors[:1].expand_as(vectors))


def keeping(name: str, *, tied: bool = False, **handed: Any) -> Implementation:
    """Each layer joins its vectors to all that the layer before it left."""
    vectors = tied_prefix(name) if tied else prefix_of(name)
    return subject(tiny(name), vectors, HandStacked(private(tiny(name)), vectors.vectors, keep_outputs=True), **handed)


def outputs_kept() -> Iterator[Plant]:
    """No output selection; alone, and with one set of vectors for all layers: latency grows while quality falls."""
    for name in ("llama", "gpt2", "qwen3", "bloom", "opt", "olmo2"):
        for bare in (False, True) if name in ("llama", "bloom") else (False,):
            yield Plant(
                fault="outputs-kept",
                architecture=name,
                make=partial(keeping, name, bare=bare),
                variant="joined, never cut" + ", bare" * bare,
                proof=differs(name, "prefix"),
                cheap=name in ("llama", "gpt2"),
            )
    for name in ("llama", "gpt2"):
        yield Plant(
            fault="outputs-kept",
            architecture=name,
            make=partial(keeping, name, tied=True),
            variant="and tied",
            proof=lambda made, name=name: (worst(made, tiny(name), tied_prefix(name), "left"), 0.05),
            also=frozenset({"layers-tied"}),
        )


def one_tensor(name: str) -> Implementation:
    """A module with one parameter [P, D] for all layers."""
    vectors = tied_prefix(name)
    return subject(tiny(name), vectors, HandPrefix(private(tiny(name)), vectors.vectors, layout="rows"))


def late_binding(name: str, **handed: Any) -> Implementation:
    """Hooks made in a loop whose closures all see its last value."""
    base, vectors = tiny(name), prefix_of(name)
    made = HandPrefix(private(base), vectors.vectors, late_binding=True, installed=True, layout="rows")
    return subject(base, vectors, made, **handed)


def one_pair(name: str) -> Implementation:
    """The first layer's keys and values in all layers."""
    free = kv_of(name)
    count = len(free.keys)
    same = SoftKV((free.keys[0],) * count, (free.values[0],) * count)
    return subject(tiny(name), same, HandKV(private(tiny(name)), same.keys, same.values, layout="rows"))


def layers_tied() -> Iterator[Plant]:
    """One tensor for all layers: in the file, in the module, or by a closure."""
    made = [
        (one_tensor, {}, "prefix, one tensor expanded", "llama"),
        (late_binding, {}, "prefix, late binding", "gpt2"),
        (late_binding, {"bare": True}, "prefix, late binding, bare", ""),
    ]
    for name in ("llama", "gpt2", "qwen3", "bloom", "gemma3"):
        for build, handed, variant, cheap in made:
            yield Plant(
                fault="layers-tied",
                architecture=name,
                make=partial(build, name, **handed),  # type: ignore[operator]
                variant=variant,
                proof=differs(name, "prefix"),
                cheap=name == cheap,
            )
    for name in ("llama", "gpt2", "qwen3"):
        yield Plant(
            fault="layers-tied",
            architecture=name,
            make=partial(one_pair, name),
            variant="kv, one pair in all layers",
            proof=differs(name, "kv"),
        )


def called_prefix(name: str, *, declared: str = "prefix", told: bool = True) -> Implementation:
    """Prompt tuning under another name."""
    rows = vectors_for(name, "prompt")
    assert isinstance(rows, SoftPrompt)
    made = HandPrompt(private(tiny(name)), rows.vectors, layout="rows")
    vectors = {"prefix": rows.vectors} if told else None
    return subject(tiny(name), rows, made, declared=declared, vectors=vectors)


def first_alone(name: str) -> Implementation:
    """A hook on the first layer, none on the others."""
    states = prefix_of(name)
    return subject(tiny(name), states, HandPrefix(private(tiny(name)), states.vectors, sites=[0], layout="rows"))


def embeddings_only() -> Iterator[Plant]:
    """Declared prefix tuning; the vectors enter once, in front of the first layer."""
    for name in ("llama", "gpt2", "qwen3", "opt", "bloom", "gemma3"):
        cheap, both = name in ("llama", "gpt2"), frozenset({"layers-dropped"})
        made: list[tuple[Any, str, frozenset[str]]] = [
            (partial(called_prefix, name), "prompt tuning called prefix", frozenset()),
            (partial(called_prefix, name, told=False), "prompt tuning called prefix, bare", frozenset()),
            (partial(first_alone, name), "a hook on the first layer alone", both),
        ]
        if cheap:
            made.append((partial(called_prefix, name, declared="kv"), "prompt tuning called kv", frozenset()))
        for place, (make, variant, also) in enumerate(made):
            yield Plant(
                fault="embeddings-only",
                architecture=name,
                make=make,
                variant=variant,
                proof=differs(name, "prefix"),
                cheap=cheap and place == 0,
                also=also,
            )


def last_unhooked(name: str) -> Implementation:
    """Hooks on all layers but the last."""
    states = prefix_of(name)
    made = HandPrefix(private(tiny(name)), states.vectors, sites=[0, 1], installed=True, layout="rows")
    return subject(tiny(name), states, made)


def zeroed(name: str, layer: int, **handed: Any) -> Implementation:
    """Zeros in the cache of one layer, where its part of the file was not found."""
    free = kv_of(name)
    keys, values = (
        [torch.zeros_like(part) if index == layer else part for index, part in enumerate(kind)]
        for kind in (free.keys, free.values)
    )
    return subject(tiny(name), free, HandKV(private(tiny(name)), keys, values, layout="rows"), **handed)


def layers_dropped() -> Iterator[Plant]:
    """Some layers go without their vectors."""
    for name in ("llama", "gpt2", "qwen3", "gemma3", "bloom"):
        made = [
            (partial(last_unhooked, name), "prefix, last layer without hook", "prefix", name == "gpt2"),
            (partial(zeroed, name, 2), "kv, zeros in the last layer", "kv", name == "llama"),
            (partial(zeroed, name, 1, bare=True), "kv, zeros in the middle, bare", "kv", False),
        ]
        for make, variant, method, cheap in made:
            yield Plant(
                fault="layers-dropped",
                architecture=name,
                make=make,
                variant=variant,
                proof=differs(name, method),
                cheap=cheap,
            )


PLANTS = [*outputs_kept(), *layers_tied(), *embeddings_only(), *layers_dropped()]
