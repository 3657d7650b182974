"""Faults of running it: training mode, checkpointing, decoding and turns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foreword.core.prompt import SoftPrompt
from foreword.doctor.subjects import Implementation
from tests.doctor.lab.handmade import Handmade, HandPrompt
from tests.doctor.lab.layer_plants import kv_of
from tests.doctor.lab.materials import CLEAR, hand, private, ragged, reference, subject, vectors_for, worst
from tests.doctor.lab.plant import Plant
from tests.doctor.lab.sequence_plants import generating
from tests.tiny import tiny


class Checkpointed:
    """A training forward with gradient checkpointing, which transformers runs without a cache."""

    def __init__(self, made: Handmade, *, silent: bool) -> None:
        self.made, self.silent = made, silent

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits of the text, in training mode."""
        made, model = self.made, self.made.model
        was = model.training
        model.requires_grad_(True)  # PyTorch recomputes only what has gradients
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable()
        model.train()
        try:
            if self.silent:  # a trainer that sets use_cache=False and passes no cache on
                logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            else:
                logits = made.begin(ids, mask)[0]
        finally:
            model.gradient_checkpointing_disable()
            model.requires_grad_(False)
            model.train(was)
        return logits[:, logits.shape[1] - ids.shape[1] :]


def checkpointed(name: str, silent: bool) -> Implementation:
    """Right while serving; its training forward loses the prefix."""
    free = kv_of(name)
    made = hand(private(tiny(name)), free, layout="rows")
    return subject(tiny(name), free, made, training_forward=Checkpointed(made, silent=silent))


def trains_apart(name: str, made: Implementation) -> tuple[float, float]:
    """Proof: the training forward is not the reference, or raises, while the forward is right."""
    assert made.training_forward is not None
    base, vectors = tiny(name), kv_of(name)
    ids, mask = ragged(base.spec.vocab_size)
    right = worst(made, base, vectors, "right") < 1e-4
    try:
        found = made.training_forward(ids, mask)
    except RuntimeError:
        return float(right), 0.5
    apart = (found.detach() - reference(base, vectors, ids, mask))[mask.bool()].abs().max()
    return float(apart) * right, CLEAR


def checkpointing() -> Iterator[Plant]:
    """Keys and values in a cache that a checkpointed forward throws away."""
    for name in ("llama", "gpt2", "qwen3", "opt", "mistral"):
        for silent in (True, False):
            yield Plant(
                fault="checkpointing-drops-prefix",
                architecture=name,
                make=partial(checkpointed, name, silent),
                variant="kv, silently" if silent else "kv, sizes collide",
                proof=partial(trains_apart, name),
                cheap=name in ("llama", "gpt2") and silent,
            )


def at_turns(name: str, serving: str) -> Implementation:
    """Wrong from the second turn on."""
    free = kv_of(name)
    made = hand(private(tiny(name)), free, layout="rows", serving=serving)
    return subject(tiny(name), free, made, generate=None)


def turns_apart(name: str, made: Implementation) -> tuple[float, float]:
    """Proof: logits behind the last of three turns differ from those of one long turn."""
    assert made.turns is not None
    turns = [[5, 6, 7, 8], [9, 10, 11], [12, 13]]
    ids = torch.tensor([[token for turn in turns for token in turn]])
    expected = reference(tiny(name), kv_of(name), ids, torch.ones_like(ids))[0, -1]
    return float((made.turns(turns) - expected).abs().max()), CLEAR


def injected_again() -> Iterator[Plant]:
    """Vectors at each step or turn, or gone after the first."""
    for name in ("llama", "gpt2", "qwen3", "opt"):
        for method in ("prompt", "prefix", "kv"):
            cheap = name == "llama" and method == "prompt"
            yield generating(name, method, "at each step", "again", "injected-again", side="none", cheap=cheap)
            if method == "kv" or name == "llama":
                cheap = name == "gpt2"
                variant = "lost after the prompt"
                yield generating(name, method, variant, "lost", "injected-again", side="none", cheap=cheap)
    for name in ("llama", "gpt2"):
        for serving in ("again", "lost"):
            yield Plant(
                fault="injected-again",
                architecture=name,
                make=partial(at_turns, name, serving),
                variant=f"kv at the second turn, {serving}",
                proof=partial(turns_apart, name),
            )


def rows_of(name: str) -> SoftPrompt:
    """Return prompt rows for a base."""
    rows = vectors_for(name, "prompt")
    assert isinstance(rows, SoftPrompt)
    return rows


def training(name: str) -> Implementation:
    """A model left in training mode; its attention drops a tenth."""
    model = private(tiny(name))
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    made = hand(model, rows_of(name), layout="rows")
    model.train()
    return subject(tiny(name), rows_of(name), made)


class Noisy(HandPrompt):
    """A prompt encoder whose dropout was never switched off."""

    def embed(self, ids: Tensor) -> Tensor:
        """Return [vectors with dropout ; embeddings]."""
        text = self.model.get_input_embeddings()(ids)
        rows = F.dropout(self.rows, 0.2, training=True).to(text.dtype)
        return torch.cat([rows.expand(len(ids), -1, -1), text], dim=1)


def noisy(name: str, **handed: Any) -> Implementation:
    """Vectors with dropout."""
    rows = rows_of(name)
    return subject(tiny(name), rows, Noisy(private(tiny(name)), rows.vectors, layout="rows"), **handed)


def repeats_apart(made: Implementation) -> tuple[float, float]:
    """Proof: two equal calls differ."""
    ids, mask = ragged(made.base.spec.vocab_size)
    first, second = (made.forward(ids, mask)[mask.bool()] for _ in range(2))
    return float((first - second).abs().max()), CLEAR


def nondeterminism() -> Iterator[Plant]:
    """Dropout left on, in the base or over the vectors."""
    for name in ("gpt2", "llama", "qwen3", "opt"):
        made = [
            (partial(training, name), "prompt, training mode"),
            (partial(noisy, name), "prompt, its dropout on"),
            (partial(noisy, name, black_box=True, bare=True), "prompt, its dropout on, black box and bare"),
        ]
        for place, (make, variant) in enumerate(made):
            yield Plant(
                fault="nondeterminism",
                architecture=name,
                make=make,
                variant=variant,
                proof=repeats_apart,
                cheap=name in ("gpt2", "llama") and place == 0,
            )


PLANTS = [*checkpointing(), *injected_again(), *nondeterminism()]
