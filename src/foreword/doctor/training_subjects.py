"""From a trainer at hand to a `TrainingRun`: foreword's own, and a PEFT model with an optimizer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foreword.doctor.subjects import TrainingRun
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel

StepGradients = Callable[["FrozenModel", Sequence[Any]], Sequence[float]]


def from_fit(base: FrozenModel, state: Any, step_gradients: StepGradients) -> TrainingRun:
    """Return foreword's own training of one run as a subject, held where `state` stands.

    `state` is a `foreword.train.state.RunState`, `step_gradients` that of foreword.train.loss: doctor knows no trainer,
    and examines the very function that trains. The vectors are the tuner's parameters: θ [P, F] in units of their
    initial root mean square (as is the vocabulary), and where there is one, the encoder's.
    """
    tuner, optimizer = state.tuner, state.optimizer
    vectors = dict(tuner.named_parameters())
    num_vectors = state.template.num_left + state.template.num_after
    batch = state.step_batch()

    def loss() -> Tensor:
        return _loss_with_gradients(base, batch, step_gradients)

    def step() -> float:
        rows = state.step_batch()
        (value,) = step_gradients(base, [rows])
        state.update(value, sum(len(row.ids) for row in rows.rows))
        return value

    plain = {name: copy.copy(value) for name, value in vars(state).items() if _is_plain(value)}

    def rewind() -> None:
        for name, value in plain.items():
            setattr(state, name, copy.copy(value))

    vocabulary = None
    if state.run.config.method == "prompt":
        vocabulary = base.embedding.weight.detach().float() / tuner.scale[0]
    return TrainingRun(
        model=nn.ModuleList([base.model, tuner]),
        base=base.model,
        vectors=vectors,
        num_vectors=num_vectors,
        optimizer=optimizer,
        loss=loss,
        step=step,
        vocabulary=vocabulary,
        history=tuple(state.history),
        rewind=rewind,
    )


def from_peft_training(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    *,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    schedule: Any = None,
    history: Sequence[Mapping[str, float]] = (),
    initial: Mapping[str, Tensor] | None = None,
) -> TrainingRun:
    """Return a training of a PEFT model with a prompt or prefix as a subject.

    `batch` has input_ids, attention_mask and labels as the model takes them; a step takes the next of `batches`, or
    `batch` again. `schedule` is a learning-rate scheduler that steps with the optimizer. What labels and logits the
    loss sees is read from a forward. Raises ConfigError where the model has no prompt encoder, or the batch no labels.
    """
    name = model.active_adapter
    encoder = getattr(model, "prompt_encoder", {})
    if name not in encoder or not hasattr(encoder[name], "embedding"):
        raise ConfigError(f"adapter {name!r} has no prompt encoder with vectors", hint="Give a prompt or a prefix.")
    if "labels" not in batch:
        raise ConfigError(f"the batch has {', '.join(batch)}, and no labels", hint="Give it as the trainer gets it.")
    vectors = {"prompt_embeddings": encoder[name].embedding.weight}
    base = model.get_base_model()
    seen = _seen_labels(model, base, batch)
    source = itertools.cycle([batch]) if batches is None else iter(batches)

    def step() -> float:
        optimizer.zero_grad()
        loss: Tensor = model(**next(source)).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if schedule is not None:
            schedule.step()
        return float(loss.detach())

    rewinds = None if schedule is None else copy.deepcopy(schedule.state_dict())

    def rewind() -> None:
        if schedule is not None:
            schedule.load_state_dict(copy.deepcopy(rewinds))

    return TrainingRun(
        model=model,
        base=base,
        vectors=vectors,
        num_vectors=model.peft_config[name].num_virtual_tokens,
        optimizer=optimizer,
        loss=lambda: model(**batch).loss,
        step=step,
        labels=seen,
        input_ids=batch["input_ids"],
        logits=lambda: model(**batch).logits,
        vocabulary=base.get_input_embeddings().weight.detach(),
        reference=_real_rows(base, batch, vectors["prompt_embeddings"].shape[1]),
        history=history,
        initial=initial,
        rewind=rewind,
    )


def _loss_with_gradients(base: FrozenModel, batch: Any, step_gradients: StepGradients) -> Tensor:
    """Return the loss of a batch as a tensor whose backward pass gives what `step_gradients` gives."""
    parameters = list(batch.tuner.parameters())
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            (value,) = step_gradients(base, [batch])
        gradients = [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    linear = sum(((parameter * gradient).sum() for parameter, gradient in pairs), start=torch.zeros(()))
    return linear - linear.detach() + torch.tensor(value, dtype=torch.float64)


def _is_plain(value: Any) -> bool:
    """Whether an attribute of a run's state is data that a step moves, other than modules and optimizers."""
    return value is None or isinstance(value, int | str | list | dict | Exception)


def _seen_labels(model: Any, base: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return the labels that the base's own loss gets, or None where PEFT computes no loss in it."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(labels := kwargs.get("labels"), Tensor):
            found.append(labels.detach().clone())

    handle = base.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        handle.remove()
    return found[0] if found else None


def _real_rows(base: Any, batch: Mapping[str, Tensor], width: int) -> dict[str, Tensor] | None:
    """Return keys and values of real tokens in PEFT's layout [N, 2·L·Hkv·Dh], or None where `width` is another."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    modes = [(module, module.training) for module in base.modules()]
    try:
        with torch.no_grad():
            base.eval()
            cache = base(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    finally:
        for module, training in modes:
            module.training = training
    if cache is None or getattr(cache, "layers", None) is None:
        return None
    pairs = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]  # each [B, Hkv, T, Dh]
    if len({pair.shape for pair in pairs}) != 1:
        return None
    rows = torch.stack(pairs).permute(1, 3, 0, 2, 4).flatten(2)  # [B, T, 2·L·Hkv·Dh]
    if rows.shape[-1] != width:
        return None
    kept = rows.flatten(0, 1) if mask is None else rows[mask.bool()]
    return {"prompt_embeddings": kept.float()}
