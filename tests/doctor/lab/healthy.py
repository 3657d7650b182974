"""Systems without a fault: handmade, foreword's own and PEFT's; every architecture, both dtypes, all methods."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreword.core.compile import compile, uncompiled_logits
from foreword.core.forward import forward_rows
from foreword.core.prompt import SoftPrefix, SoftPrompt
from foreword.doctor.subjects import Evaluation, Implementation, TrainingRun
from foreword.doctor.training_subjects import from_fit, from_peft_training
from tests.bundled import bundled
from tests.doctor.lab.artefact_plants import Filed, check_filed, spoken, written
from tests.doctor.lab.distillation_plants import Distilled, distilled
from tests.doctor.lab.evaluation_plants import resampled
from tests.doctor.lab.evaluations import Speaker, make_rows, said, trained
from tests.doctor.lab.materials import (
    ROUNDING,
    P,
    hand,
    private,
    probes_for,
    reference,
    subject,
    vectors_for,
    worst,
)
from tests.doctor.lab.peft_models import peft_by_row, wrapped
from tests.doctor.lab.plant import Healthy
from tests.doctor.lab.stacked import HandStacked
from tests.doctor.lab.trainers import Trainer, batch_of, histories
from tests.tiny import NAMES, tiny

WINDOWS = ("mistral-window", "gemma2", "gemma3")
"""With padding between vectors and text a window would be shorter for the text: rows are put left here."""
JOINED = ("llama", "gpt2", "qwen3", "bloom", "opt", "olmo2", "qwen2", "phi3", "mistral")
METHODS = ("prompt", "prefix", "kv")


def agrees(name: str, method: str) -> Callable[[Implementation], tuple[float, float]]:
    """Proof: float32 logits agree with foreword's compiled prefix, padding at either side."""

    def proof(made: Implementation) -> tuple[float, float]:
        base, vectors = tiny(name), vectors_for(name, method)
        return max(worst(made, base, vectors, side) for side in ("left", "right")), ROUNDING

    return proof


def ours(name: str, method: str, dtype: str, *, black_box: bool = False) -> Implementation:
    """Foreword's own way: compile, then a forward over rows behind the prefix."""
    base, vectors = tiny(name, dtype), vectors_for(name, method, dtype=dtype)
    prefix = compile(base, vectors)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return reference(base, vectors, ids, mask)

    def generate(ids: Tensor, mask: Tensor, num_new: int) -> Tensor:
        rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
        first = [len(row) for row in rows]
        for _ in range(num_new):
            with torch.no_grad():
                logits = forward_rows(base, rows, [prefix] * len(rows))
            rows = [[*row, int(logits[place, len(row) - 1].argmax())] for place, row in enumerate(rows)]
        return torch.tensor([row[start:] for row, start in zip(rows, first, strict=True)])

    return Implementation(
        declared=vectors.method,
        num_vectors=P,
        base=base,
        forward=forward,
        model=None if black_box else base.model,
        vectors=vectors,
        generate=generate,
        probes=probes_for(base, vectors),
    )


def uncompiled(name: str, method: str) -> Implementation:
    """Foreword's reference form, vectors written into the sequence, row by row."""
    base, vectors = tiny(name), vectors_for(name, method)
    assert isinstance(vectors, SoftPrompt | SoftPrefix)

    @torch.no_grad()
    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        found = torch.zeros(*ids.shape, base.spec.vocab_size)
        for place, (row, real) in enumerate(zip(ids, mask, strict=True)):
            found[place][real.bool()] = uncompiled_logits(base, row[real.bool()][None], vectors)[0]
        return found

    return Implementation(
        declared=vectors.method, num_vectors=P, base=base, forward=forward, model=base.model, vectors=vectors
    )


def handmade(name: str, method: str, dtype: str = "float32", **how: Any) -> Implementation:
    """A right implementation by hand."""
    base, vectors = tiny(name, dtype), vectors_for(name, method, dtype=dtype)
    shown = {key: how.pop(key) for key in ("black_box", "bare", "shared", "probed") if key in how}
    layout = how.pop("layout", "rows" if name in WINDOWS else "mask")
    model = base.model if shown.pop("shared", False) else private(base)
    probes = probes_for(base, vectors) if shown.pop("probed", False) else ()
    made = hand(model, vectors, layout=layout, **how)
    return subject(base, vectors, made, **shown, training_forward=made.forward, probes=probes)


def stacked(name: str) -> Implementation:
    """A right hidden-state prefix by joining and cutting in each layer."""
    base, vectors = tiny(name), vectors_for(name, "prefix")
    assert isinstance(vectors, SoftPrefix)
    return subject(base, vectors, HandStacked(private(base), vectors.vectors))


def implementations() -> Iterator[Healthy]:
    """Right implementations."""
    for name in NAMES:
        for method in METHODS:
            for dtype in ("float32", "bfloat16"):
                exact = agrees(name, method) if dtype == "float32" else None
                yield Healthy(
                    name=f"foreword {name} {method} {dtype}",
                    make=lambda name=name, method=method, dtype=dtype: ours(name, method, dtype),
                    proof=exact,
                    cheap=(name, method) in (("llama", "prefix"), ("bloom", "kv")) and dtype == "float32",
                )
                yield Healthy(
                    name=f"handmade {name} {method} {dtype}",
                    make=lambda name=name, method=method, dtype=dtype: handmade(name, method, dtype),
                    proof=exact,
                    cheap=(name, method) in (("gpt2", "prompt"), ("mistral-window", "kv"))
                    or ((name, method, dtype) == ("llama", "kv", "bfloat16")),
                )
            yield Healthy(
                name=f"handmade {name} {method} rows, shared, probed",
                make=lambda name=name, method=method: handmade(name, method, layout="rows", shared=True, probed=True),
                proof=agrees(name, method),
                cheap=(name, method) == ("qwen3", "prompt"),
            )
            yield Healthy(
                name=f"handmade {name} {method} black box",
                make=lambda name=name, method=method: handmade(name, method, black_box=True),
                proof=agrees(name, method),
            )
            yield Healthy(
                name=f"handmade {name} {method} bare",
                make=lambda name=name, method=method: handmade(name, method, bare=True),
                proof=agrees(name, method),
                cheap=(name, method) == ("gemma3", "prefix"),
            )
        yield Healthy(
            name=f"handmade {name} prefix, hooks installed",
            make=lambda name=name: handmade(name, "prefix", installed=True),
            proof=agrees(name, "prefix"),
        )
        for method in ("prompt", "prefix"):
            yield Healthy(
                name=f"foreword uncompiled {name} {method}",
                make=lambda name=name, method=method: uncompiled(name, method),
                proof=agrees(name, method),
            )
    for name in JOINED:
        yield Healthy(
            name=f"joined and cut {name} prefix",
            make=lambda name=name: stacked(name),
            proof=agrees(name, "prefix"),
            cheap=name == "llama",
        )
    for name in ("llama", "gpt2", "qwen2", "qwen3", "opt", "mistral", "olmo2", "phi3", "gpt-neox", "bloom"):
        for kind in ("prompt", "kv"):
            if name == "bloom" and kind == "kv":
                continue  # PEFT has a layout of its own for it
            yield Healthy(
                name=f"PEFT {name} {kind}, row by row",
                make=lambda name=name, kind=kind: peft_by_row(name, kind),
                proof=agrees(name, kind),
                cheap=name == "gpt2" and kind == "prompt",
            )


# Training


def trainer_after(steps: int, *arguments: Any, **named: Any) -> TrainingRun:
    """A sane handmade trainer, held after some steps."""
    trainer = Trainer(*arguments, **named)
    trainer.run(steps)
    return trainer.subject()


@cache
def task_file() -> Path:
    """Write a small task for foreword's own trainer."""
    from tests.bundled import write_task

    return write_task(Path(tempfile.mkdtemp(prefix="foreword-lab-task-")))


def own_fit(method: str, steps: int, **settings: Any) -> TrainingRun:
    """Foreword's own trainer on the bundled base."""
    from foreword.train.loss import step_gradients
    from foreword.train.run import Run
    from foreword.train.state import RunState

    base = bundled()
    state = RunState(base, Run.from_toml(task_file(), method=method, steps=20, batch_size=4, **settings))
    for _ in range(steps):
        batch = state.step_batch()
        (value,) = step_gradients(base, [batch])
        state.update(value, 1)
    return from_fit(base, state, step_gradients)


def peft_training(name: str, kind: str) -> TrainingRun:
    """PEFT with AdamW, vectors at the base's own scale."""
    model, _, _ = wrapped(name, kind)
    model.train()
    for parameter in model.get_base_model().modules():
        if isinstance(parameter, torch.nn.Dropout):
            parameter.p = 0.0
    weight = model.prompt_encoder["default"].embedding.weight
    rate = 0.01 * float(weight.detach().square().mean().sqrt())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    ids, _ = batch_of(0)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return from_peft_training(model, optimizer, batch)


def trainers() -> Iterator[Healthy]:
    """Sane trainers."""
    for name in ("llama", "gpt2", "qwen3", "bloom", "gemma3", "opt", "mistral", "olmo2", "phi3", "qwen2"):
        for method in ("prompt", "kv"):
            for steps in (0, 15):
                yield Healthy(
                    name=f"trainer {name} {method} after {steps} steps",
                    make=lambda n=name, m=method, s=steps: trainer_after(s, n, m),
                    cheap=name == "llama" and steps == 0,
                )
            for rate in (0.005, 0.2):
                yield Healthy(
                    name=f"trainer {name} {method} at {rate} of the root mean square",
                    make=lambda n=name, m=method, r=rate: trainer_after(5, n, m, relative_lr=r),
                )
        yield Healthy(
            name=f"trainer {name} kv in bfloat16 with fair steps",
            make=lambda n=name: trainer_after(0, n, "kv", dtype=torch.bfloat16, relative_lr=0.03),
        )
    for name in ("llama", "gpt2"):
        yield Healthy(
            name=f"trainer {name} prompt with seeds",
            make=lambda n=name: with_seeds(n),
        )
        for method in ("prompt", "kv"):
            yield Healthy(
                name=f"distillation {name} {method} with a tail",
                make=lambda n=name, m=method: distilled(n, m, True).subject(),
            )
            yield Healthy(
                name=f"distillation {name} {method} with a tail, at its start",
                make=lambda n=name, m=method: Distilled(n, m, tail=True).subject(),
            )
    for method in METHODS:
        for steps in (0, 6):
            yield Healthy(
                name=f"foreword fit {method} after {steps} steps",
                make=lambda m=method, s=steps: own_fit(m, s),
            )
    for name in ("llama", "gpt2", "qwen2", "opt"):
        for kind in ("prompt", "kv"):
            yield Healthy(
                name=f"PEFT training {name} {kind}",
                make=lambda n=name, k=kind: peft_training(n, k),
                cheap=name == "llama" and kind == "prompt",
            )


def with_seeds(name: str) -> TrainingRun:
    """A sane run with its histories under other seeds."""
    trainer = Trainer(name)
    trainer.run(20)
    return trainer.subject(seeds=histories(lambda seed: Trainer(name, seed=seed), 20))


# Evaluations


def whole_evaluation(name: str) -> Evaluation:
    """A version that is better than the one before, and was said to be so; nothing else moved."""
    test, train = make_rows(0, 8, 40), make_rows(0, 100, 64)
    speaker, before = trained(name), trained(name, steps=12)
    base = Speaker(tiny(name), None)
    kept = said(make_rows(6, 41, 40), base, prefix=None)
    old, new = said(test, before), said(test, speaker)
    told = "better" if new.score - old.score > 0.2 else None
    traffic = {
        ("old", "then"): said(make_rows(0, 12, 40), speaker),
        ("old", "now"): said(make_rows(0, 13, 40), speaker),
        ("base", "then"): said(make_rows(0, 12, 40), base, prefix=None),
        ("base", "now"): said(make_rows(0, 13, 40), base, prefix=None),
    }
    greedy = speaker([row.input for row in test[:8]])
    return Evaluation(
        claimed_score=new.score,
        test=test,
        train=train,
        generate=speaker,
        old=old,
        new=new,
        claimed_change=told,  # type: ignore[arg-type]
        promotions=("v1", "v2", "v3"),
        skills={"kept": (kept, kept)},
        alone={"task": new},
        joined={"task": new},
        traffic=traffic,  # type: ignore[arg-type]
        decoding_then={"temperature": 0.0, "max_tokens": 1},
        decoding_now={"max_tokens": 1, "top_p": 1.0},
        greedy_then=greedy,
        greedy_now=list(greedy),
        sweep={2: (0.9, 0.85), 8: (0.97, 0.93), 32: (0.98, 0.94)},
    )


def evaluations() -> Iterator[Healthy]:
    """Sound evaluations."""
    for name in ("llama", "gpt2", "qwen3"):
        yield Healthy(name=f"evaluation {name}", make=lambda n=name: whole_evaluation(n))
        yield Healthy(
            name=f"evaluation {name}, a loss that is one",
            make=lambda n=name: Evaluation(
                old=said(make_rows(0, 8, 60), trained(n)),
                new=said(make_rows(0, 8, 60), Speaker(tiny(n), None)),
                claimed_change="worse",
            ),
        )
        yield Healthy(
            name=f"evaluation {name}, noise of which nothing is said",
            make=lambda n=name: Evaluation(old=resampled(n, 1), new=resampled(n, 2)),
        )


# Files


def files() -> Iterator[Healthy]:
    """Sound files, alone and on their base in both dtypes."""
    for name in ("llama", "gpt2", "qwen3", "bloom", "opt", "mistral"):
        for method in METHODS:
            for where in ("its base", "no base", "bfloat16"):
                yield Healthy(
                    name=f"file {name} {method} on {where}",
                    make=lambda n=name, m=method, w=where: filed(n, m, w),
                    cheap=name == "gpt2" and where == "its base",
                    examine=check_filed,
                )


def filed(name: str, method: str, where: str) -> Filed:
    """Return a sound file, and where it is served."""
    path, base = written(name, method, "sound"), spoken(name)
    if where == "no base":
        return Filed(path=path, base=None, first=base)
    if where == "bfloat16":
        vocab = base.spec.vocab_size
        coarse = tiny(name, "bfloat16", vocab_size=vocab, tokenizer=base.tokenizer)
        return Filed(path=path, base=coarse, first=base)
    return Filed(path=path, base=base, first=base)


HEALTHY = [*implementations(), *trainers(), *evaluations(), *files()]
