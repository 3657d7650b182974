"""Checks of what trains: do gradients reach all of the vectors, nothing but them, and do the steps arrive?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foreword.doctor.finding import Finding
from foreword.doctor.probe_training import (
    Gradients,
    ProbeFailed,
    base_parameters,
    check,
    copies,
    current_lr,
    gradients_of,
    loss_of,
    optimizer_ids,
    rows_of,
    skipped,
    take_step,
)
from foreword.doctor.subjects import TrainingRun
from foreword.doctor.training_state import modules_of, put_back

LOST_SHARE = 0.3
"""Share of the vectors' numbers without gradient in training, with one in evaluation, that is more than dropout does:
a dropout of 0.1 on the embeddings of a single row leaves 10 % without."""
UNMOVED_SHARE = 0.5
"""Share of 16-bit numbers that a step leaves as they are; healthy steps of 1 % of a number's size leave a tenth."""
LEAST_DISPLACEMENT = 1e-5
"""Relative displacement below which a step is too small in any dtype, and not the dtype's fault."""
GRADIENT_WITHIN = 0.1
"""Relative difference between a gradient and finite differences of the loss, at the best of several step sizes."""
STEP_SIZES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Of the finite differences, relative to the norm of the vectors; they go down until one agrees with the gradient, or
with the one before it."""
SETTLED = 0.05
"""Relative difference between two of them that have settled."""
SHOWN = 6


@check("base frozen")
def check_base_frozen(run: TrainingRun) -> Finding:
    """Set requires_grad to False on the base, and give the optimizer the vectors only.

    A census of both, then one backward pass (does a gradient reach the base?) and one step (does it move, by any bit?).
    """
    base = base_parameters(run)
    if not base:
        return skipped("base frozen", "the model has no parameters but the vectors; name the base")
    ids = optimizer_ids(run)
    trainable = [name for name, parameter in base.items() if parameter.requires_grad]
    held = [name for name in trainable if id(base[name]) in ids]
    leaked: tuple[str, ...] = ()
    try:
        leaked = gradients_of(run).leaked
    except ProbeFailed:
        pass  # the step below may still be possible, and the census stands by itself
    with put_back(run) as saved:
        try:
            take_step(run)
            stepped = ""
        except ProbeFailed as error:
            stepped = f"; no step was seen, {error}"
        moved = [name for name, parameter in base.items() if saved.is_changed(parameter)]
    ok = not (held or leaked or moved)
    measured = (
        f"of {len(base)} tensors of the base {len(trainable)} require gradients, {len(leaked)} receive one, "
        f"the optimizer holds {len(held)}, a step moves {len(moved)}{stepped}"
    )
    named = list(dict.fromkeys([*moved, *held, *leaked]))[:SHOWN]
    return Finding(
        check="base frozen",
        ok=ok,
        measured=measured + (f": {', '.join(named)}" if named else ""),
        expected="none of them",
        fix="base.requires_grad_(False); build the optimizer from the vectors alone; train again from the first base.",
        fault="" if ok else "base-trainable",
        numbers={
            "base_tensors": len(base),
            "require_gradients": len(trainable),
            "receive_gradients": len(leaked),
            "in_optimizer": len(held),
            "moved": len(moved),
            "names": named,
        },
    )


@check("gradients reach the vectors")
def check_checkpointing(run: TrainingRun) -> Finding:
    """Switch gradient checkpointing off, or use an implementation of it that carries the cache with the prefix.

    The same loss in training, as it runs, and in evaluation mode with checkpointing off: a gradient that is there only
    in the second was dropped on the way through the first. So was one that is in neither, while layers are set to
    checkpointing: the forward that this trainer wrote for them leaves the prefix out.
    """
    training: Gradients | None
    try:
        training, failed = gradients_of(run), ""
    except ProbeFailed as error:
        training, failed = None, str(error)
    lost = 1.0 if training is None else _zero_share(training)
    size = 0.0 if training is None else training.norm
    measured = f"gradient norm {size:.3g} in training, {1 - lost:.0%} of the vectors' numbers have one"
    numbers: dict[str, Any] = {"norm_training": size, "share_without": lost}
    expected = "a gradient on the vectors, the same ones in training and in evaluation"
    if training is not None and lost <= LOST_SHARE:
        return Finding(
            check="gradients reach the vectors", ok=True, measured=measured, expected=expected, numbers=numbers
        )
    flagged = sum(bool(getattr(module, "gradient_checkpointing", False)) for module in modules_of(run))
    with _without_checkpointing(run):
        evaluation = gradients_of(run)
    back = lost - _zero_share(evaluation)
    numbers |= {"norm_evaluation": evaluation.norm, "share_back": back, "checkpointing_modules": flagged}
    how = f"in training {failed}" if failed else measured
    measured = f"{how}; {evaluation.norm:.3g} in evaluation; {flagged} modules have checkpointing on"
    learned = any(tensor.requires_grad for tensor in run.vectors.values())
    dead = learned and evaluation.norm == 0.0
    dropped = back > LOST_SHARE or (dead and flagged > 0)
    fix = "Switch gradient checkpointing off, or carry the prefix through it (use_reentrant=False, the cache kept)."
    if dead and not flagged:
        fix = "The loss does not depend on the vectors at all: examine the forward as an Implementation."
    return Finding(
        check="gradients reach the vectors",
        ok=not (dropped or dead),
        measured=measured,
        expected=expected,
        fix=fix,
        fault="checkpointing-drops-prefix" if dropped else "",
        numbers=numbers,
    )


@check("every row trains")
def check_rows_train(run: TrainingRun) -> Finding:
    """Audit masks and parameter groups: each of the P rows should receive a gradient and move.

    The gradient's norm by row, and each row's way over one step. Rows named in `frozen_rows` may rest.
    """
    ids = optimizer_ids(run)
    left_out = [name for name, tensor in run.vectors.items() if id(tensor) not in ids or not tensor.requires_grad]
    gradients = gradients_of(run)
    norms = _row_sizes(run, gradients.vectors)
    with put_back(run):
        step = take_step(run)
    ways = _row_sizes(run, {name: after.double() - step.before[name].double() for name, after in step.after.items()})
    if left_out:
        named = ", ".join(left_out[:SHOWN])
        measured = f"{len(left_out)} of {len(run.vectors)} tensors are not in the optimizer, or frozen: {named}"
        return _rows_finding(False, measured, {"left_out": left_out})
    if norms is None or ways is None:
        return skipped("every row trains", f"no tensor has {run.num_vectors} rows along dimension {int(run.layered)}")
    watched = [row for row in range(run.num_vectors) if row not in set(run.frozen_rows)]
    coarse = any(tensor.element_size() < 4 for tensor in run.vectors.values())
    still = [row for row in watched if norms[row] == 0.0]
    if not coarse and any(ways[row] > 0.0 for row in watched):
        still = [row for row in watched if norms[row] == 0.0 or ways[row] == 0.0]
    ok = len(still) in (0, len(watched))
    least, most = min(norms[row] for row in watched), max(norms[row] for row in watched)
    measured = f"{len(still)} of {len(watched)} rows get no gradient or do not move"
    measured += f": {', '.join(map(str, still[:SHOWN]))}" if still else ""
    measured += f"; gradient norms by row {least:.3g} to {most:.3g}"
    return _rows_finding(ok, measured, {"still": still, "gradient_norms": norms, "ways": ways})


@check("updates arrive")
def check_updates_arrive(run: TrainingRun) -> Finding:
    """Keep the vectors in float32 while they train, also on a base in bfloat16, and cast them in the forward.

    The share of numbers that a step leaves bit for bit as they were, beside the way that the same optimizer would make
    them go in float32. Only vectors in 16 bits can lose an update so.
    """
    narrow = {name: tensor for name, tensor in run.vectors.items() if tensor.element_size() < 4}
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in run.vectors.values()}))
    expected = f"less than {UNMOVED_SHARE:.0%} of the numbers unchanged by a step"
    if not narrow:
        return Finding(check="updates arrive", ok=True, measured=f"the vectors are {dtypes}", expected="32 bits")
    gradients = gradients_of(run).vectors
    with put_back(run):
        step = take_step(run)
        if step.displacement == 0.0:  # a warm-up may begin at 0
            step = take_step(run)
        lr = current_lr(run)
    wanted = _displacement_in_float32(run, gradients, lr)
    total = sum(tensor.numel() for tensor in narrow.values())
    unmoved = sum(int((step.before[name] == step.after[name]).sum()) for name in narrow)
    share = unmoved / total
    in_float32 = "" if wanted is None else f"; in float32 the step would be {wanted:.2g} of their norm"
    measured = f"{dtypes}: a step leaves {share:.0%} of {total} numbers unchanged{in_float32}"
    meant = lr > 0.0 and (wanted is None or wanted > LEAST_DISPLACEMENT)
    ok = share < UNMOVED_SHARE or not meant
    return Finding(
        check="updates arrive",
        ok=ok,
        measured=measured,
        expected=expected,
        fix="Keep float32 vectors for the optimizer and cast them for the forward.",
        fault="" if ok else "updates-swallowed",
        numbers={"unchanged": share, "displacement": step.displacement, "displacement_float32": wanted},
    )


@check("gradients")
def check_gradients(run: TrainingRun) -> Finding:
    """Look for a detach, a cast or a hand-written backward pass between the vectors and the loss.

    The gradient's slope along itself and along two random directions, beside central differences of the loss.
    """
    if any(p.element_size() < 4 for p in (*run.model.parameters(), *run.vectors.values())):
        return skipped("gradients", "finite differences need a model in float32")
    gradients = gradients_of(run).vectors
    norm = sum(float(tensor.detach().double().square().sum()) for tensor in run.vectors.values()) ** 0.5
    size = sum(float(tensor.double().square().sum()) for tensor in gradients.values()) ** 0.5
    if size == 0.0 or norm == 0.0:
        return skipped("gradients", "vectors or gradients are zero")
    if (first := float(loss_of(run).detach())) != (again := float(loss_of(run).detach())):
        return skipped("gradients", f"the loss of the fixed batch is {first:.6g}, and asked again {again:.6g}")
    pairs = []
    for direction in _directions(gradients):
        slope = sum(float((gradients[name].double() * part.double()).sum()) for name, part in direction.items())
        found = _settled_difference(run, direction, slope, norm, first)
        if found is not None:
            pairs.append((slope, found))
    if not pairs:
        return skipped("gradients", "the loss changes too little to be told from rounding")
    off = max(abs(found - slope) / max(abs(slope), 0.05 * size) for slope, found in pairs)
    ok = off <= 3 * GRADIENT_WITHIN
    shown = ", ".join(f"{slope:.4g} against {found:.4g}" for slope, found in pairs)
    return Finding(
        check="gradients",
        ok=ok,
        measured=f"slopes by gradient against finite differences: {shown}",
        expected=f"equal within {3 * GRADIENT_WITHIN:.0%}",
        fix="Look for a detach, a cast or a hand-written backward pass between the vectors and the loss.",
        numbers={"slopes": [list(pair) for pair in pairs], "off": off},
    )


def _rows_finding(ok: bool, measured: str, numbers: dict[str, Any]) -> Finding:
    return Finding(
        check="every row trains",
        ok=ok,
        measured=measured,
        expected="every row gets a gradient and moves",
        fix="Remove the mask, and give the optimizer all of the vectors.",
        fault="" if ok else "rows-frozen",
        numbers=numbers,
    )


def _zero_share(gradients: Gradients) -> float:
    total = sum(tensor.numel() for tensor in gradients.vectors.values())
    return sum(int((tensor == 0).sum()) for tensor in gradients.vectors.values()) / max(1, total)


def _row_sizes(run: TrainingRun, tensors: dict[str, Tensor]) -> list[float] | None:
    """Return each row's norm over all tensors that have rows, or None where none has."""
    rows = [part for tensor in tensors.values() if (part := rows_of(run, tensor)) is not None]
    if not rows:
        return None
    total = torch.stack([part.double().square().sum(1).cpu() for part in rows]).sum(0)
    norms: list[float] = total.sqrt().tolist()
    return norms


@contextmanager
def _without_checkpointing(run: TrainingRun) -> Iterator[None]:
    """While active all modules are in evaluation mode, and those that know gradient checkpointing have it off."""
    modes = [(module, module.training) for module in modules_of(run)]
    on: list[Any] = [module for module in modules_of(run) if getattr(module, "gradient_checkpointing", False) is True]
    try:
        for module, _ in modes:
            module.training = False
        for module in on:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True
        for module, mode in modes:
            module.training = mode


def _displacement_in_float32(run: TrainingRun, gradients: dict[str, Tensor], lr: float) -> float | None:
    """Return ‖ΔP‖ / ‖P‖ of one step of the same optimizer on float32 copies, or None where it cannot be built."""
    names = {id(tensor): name for name, tensor in run.vectors.items()}
    groups: list[dict[str, Any]] = []
    twins: dict[str, nn.Parameter] = {}
    for group in run.optimizer.param_groups:
        here = [names[id(tensor)] for tensor in group["params"] if id(tensor) in names]
        for name in here:
            twins[name] = nn.Parameter(run.vectors[name].detach().float().clone())
            twins[name].grad = gradients[name].float()
        options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        if here:
            groups.append(options | {"params": [twins[name] for name in here], "lr": lr})
    try:
        kind: Any = type(run.optimizer)
        optimizer = kind(groups, lr=lr)
        optimizer.step()
    except Exception:  # an optimizer of somebody else's, with arguments of its own
        return None
    before = {name: run.vectors[name].detach().float() for name in twins}
    moved = sum(float((twin.detach() - before[name]).square().sum()) for name, twin in twins.items())
    norm = sum(float(tensor.square().sum()) for tensor in before.values())
    return (moved / norm) ** 0.5 if norm else None


def _directions(gradients: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return unit directions: the gradient's own, and two random ones."""
    generator = torch.Generator().manual_seed(0)
    found = [gradients]
    found += [
        {name: torch.randn(tensor.shape, generator=generator).to(tensor) for name, tensor in gradients.items()}
        for _ in range(2)
    ]
    sizes = [sum(float(part.double().square().sum()) for part in parts.values()) ** 0.5 for parts in found]
    return [{name: part / size for name, part in parts.items()} for parts, size in zip(found, sizes, strict=True)]


def _settled_difference(
    run: TrainingRun, direction: dict[str, Tensor], slope: float, norm: float, loss: float
) -> float | None:
    """Return the slope by central differences, at the first step size where it agrees with `slope` or has settled.

    None where it does neither before the difference drowns in rounding.
    """
    last: float | None = None
    before = copies(run.vectors)
    rounding = 1e-6 * max(1.0, abs(loss))
    try:
        for relative in STEP_SIZES:
            size = relative * norm
            values = []
            for sign in (1.0, -1.0):
                for name, tensor in run.vectors.items():
                    tensor.data.copy_(before[name] + sign * size * direction[name])
                values.append(float(loss_of(run).detach()))
            if max(abs(values[0] - values[1]), abs(slope) * 2 * size) < 20 * rounding:
                return None
            found = (values[0] - values[1]) / (2 * size)
            if abs(found - slope) <= GRADIENT_WITHIN * abs(slope):
                return found
            if last is not None and abs(found - last) <= SETTLED * abs(found):
                return found
            last = found
    finally:
        for name, tensor in run.vectors.items():
            tensor.data.copy_(before[name])
    return None
