"""LoRA through the PEFT library, under the same budget: same rows, order, batches, loss, schedule and choice on dev.

The adapted model is a second tree of modules over the base's own tensors, which it reads and never writes; PEFT's
layers are put into that tree alone. It is a frozen base like any other to the embedded engine, which serves it with
the same scheduler and cache as every other method.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from foreword.compare.plan import Lora, check_peft
from foreword.core.model import FrozenModel
from foreword.core.template import TaskTemplate
from foreword.engine.engine import Engine
from foreword.engine.request import Output, Request
from foreword.errors import ArtefactError, TrainingDiverged
from foreword.eval.run import evaluate
from foreword.eval.tasks import sample_rows
from foreword.train.curves import write_history
from foreword.train.data import BatchOrder, Example, encode_rows
from foreword.train.loss import MICRO_TOKENS, mean_losses, micro_batches, target_losses
from foreword.train.run import Run, RunResult, Status
from foreword.train.state import lr_factor

ADAPTER = "adapter_model.safetensors"
"""File name that PEFT gives an adapter."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """A base with low-rank updates."""

    base: FrozenModel
    """Over the original's tensors; its layers hold PEFT's."""
    peft_model: Any
    """PEFT's own view of the same modules."""
    parameters: tuple[Tensor, ...]
    """What trains, float32 also over a bfloat16 base."""

    def snapshot(self) -> list[Tensor]:
        """Return copies of the parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Put a snapshot back."""
        with torch.no_grad():
            for parameter, tensor in zip(self.parameters, tensors, strict=True):
                parameter.copy_(tensor)

    def save(self, folder: Path) -> Path:
        """Write the adapter as PEFT does; return the file of its weights. Raises ArtefactError when it cannot."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        except OSError as error:
            raise ArtefactError(
                f"cannot write the adapter to {folder}: {error.strerror}", hint="Free space or choose another folder."
            ) from error
        return folder / ADAPTER


def add_lora(base: FrozenModel, lora: Lora, seed: int) -> Adapted:
    """Return `base` with fresh updates: A random by `seed`, B zero, so that it starts as the base itself."""
    from peft import LoraConfig, get_peft_model

    names = lora.targets if lora.targets == "all-linear" else lora.targets.split(",")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.scale_alpha, lora_dropout=0.0, target_modules=names
    )
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []), _peft_warnings_muted():
        torch.manual_seed(seed)
        return _adapted(base, get_peft_model(shared_copy(base.model), config))


def load_lora(base: FrozenModel, folder: Path) -> Adapted:
    """Return `base` with the updates that `Adapted.save` wrote into `folder`."""
    check_peft()
    from peft import PeftModel

    with _peft_warnings_muted():
        return _adapted(base, PeftModel.from_pretrained(shared_copy(base.model), str(folder)))


def shared_copy(model: Any) -> Any:
    """Return a copy of a model's modules over the same parameters and buffers: no weight is held twice."""
    known: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, known)


class LoraEngine:
    """The embedded engine over an adapted base, with one name: requests of `prefix` are rendered by the hard template.

    All its rows pass the updated layers, so no plain request can share a batch with them.
    """

    def __init__(self, adapted: Adapted, name: str, template: TaskTemplate) -> None:
        self.base = adapted.base
        self.engine = Engine(adapted.base)
        self._template = template.hard()
        self.prefixes: Mapping[str, Any] = {name: SimpleNamespace(template=self._template)}
        self._left = self._template.block(adapted.base.tokenizer).literal_ids()

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        """Answer requests, in their order."""
        return self.engine.generate([self.rendered(request) for request in requests])

    def rendered(self, request: Request) -> Request:
        """Return the request as token ids, with the constant tokens that a soft method would have in its block."""
        if request.prompt_ids is not None:
            ids = list(request.prompt_ids)
        elif request.messages is not None:
            ids = self._template.render_messages(self.base.tokenizer, request.messages).ids
        else:
            ids = self._template.render(self.base.tokenizer, request.prompt or "").ids
        return dataclasses.replace(request, prompt=None, messages=None, prefix=None, prompt_ids=[*self._left, *ids])


def train_lora(
    base: FrozenModel,
    run: Run,
    lora: Lora,
    folder: Path,
    on_step: Callable[[int, float], None] | None = None,
) -> RunResult:
    """Train the updates for a run's rows, steps, batches and schedule; write the kept adapter into `folder`.

    AdamW with its usual averages (0.9, 0.999), as LoRA's peers use. History and curves lie beside the adapter, as those
    of vectors do; `on_step` gets each finished step and its loss.
    A loss that is not finite ends it with status "diverged" and no file. Raises RuntimeError if a base tensor changed.
    """
    before = base.checksum()
    adapted = add_lora(base, lora, run.config.seed)
    state = _State(base, adapted, run)
    while state.status == "running":
        loss = state.take_step()
        state.evaluate_if_due()
        if on_step is not None:
            on_step(state.step, loss)
    result = RunResult(run.name, state.status, None, state.best, state.history, state.error)
    if state.error is None:
        adapted.restore(state.kept)
        result.artefact = adapted.save(folder)
        write_history(folder, run.name, state.history)
    if base.checksum() != before:
        raise RuntimeError("a tensor of the base changed while LoRA trained; do not use its adapter")
    return result


class _State:
    """LoRA while it trains: optimizer, order of rows, best so far."""

    def __init__(self, base: FrozenModel, adapted: Adapted, run: Run) -> None:
        config, task = run.config, run.task
        self.run, self.adapted = run, adapted
        rows = sample_rows(task.rows("train"), config.max_train_rows, config.seed)
        self.train = encode_whole(base, run, rows)
        # The soft methods' order: rows are bucketed by length, which slots in front change for all rows alike, and
        # slots behind the input may change row by row, as the text around them is tokenised in pieces.
        as_soft = encode_rows(base, task, run.template, rows) if run.template.num_after else self.train
        self.order = BatchOrder([len(row.ids) for row in as_soft], config.batch_size, config.seed)
        dev = sample_rows(task.rows("dev"), config.eval_rows, seed=0) if task.config.dev is not None else []
        self.dev = encode_whole(base, run, dev)
        self.optimizer = torch.optim.AdamW(adapted.parameters, lr=run.lr, weight_decay=config.weight_decay)
        self.step = 0
        self.status: Status = "running"
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.kept: list[Tensor] = []
        self.error: TrainingDiverged | None = None

    def take_step(self) -> float:
        """Take one optimizer step; return its loss in nats per target token."""
        config = self.run.config
        parts = range(self.step * config.accumulate, (self.step + 1) * config.accumulate)
        batch = [self.train[row] for part in parts for row in self.order.batch(part)]
        loss = gradients(self.adapted.base, batch)
        norm = float(torch.nn.utils.clip_grad_norm_(self.adapted.parameters, config.clip or math.inf))
        rate = self.run.lr * lr_factor(config, self.step)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.status = "diverged"
            self.error = TrainingDiverged(
                f"lora: loss {loss} at step {self.step + 1} with learning rate {rate:.3g}", hint="Lower its lr."
            )
            return loss
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.history.append({"step": self.step, "loss": loss, "lr": rate, "grad_norm": norm, "rows": len(batch)})
        if self.step >= config.steps:
            self.status = "done"
        return loss

    def evaluate_if_due(self) -> None:
        """Measure on dev as often as the other methods do, and keep the best by the same measure."""
        config = self.run.config
        if self.error is not None:
            return
        if self.dev and (self.step % self.run.eval_every == 0 or self.status == "done"):
            measures = {"dev_loss": mean_losses(self.adapted.base, [(None, self.dev)])[0]}
            by = "dev_metric" if config.best_by == "metric" else "dev_loss"
            if by == "dev_metric":
                measures[by] = self._dev_metric()
            self.history[-1].update(measures)
            self._note(by, measures[by])
        if self.status != "running" and not self.kept:
            self.best = {"step": self.step, "by": "last", "value": None}
            self.kept = self.adapted.snapshot()

    def _note(self, by: str, value: float) -> None:
        if not math.isfinite(value):
            return
        sign = 1 if by == "dev_metric" else -1
        if not self.best or sign * value > sign * self.best["value"]:
            self.best = {"step": self.step, "by": by, "value": value, "waited": 0}
            self.kept = self.adapted.snapshot()
            return
        self.best["waited"] += 1
        patience = self.run.config.patience
        if patience is not None and self.best["waited"] >= patience and self.status == "running":
            self.status = "early_stopped"

    def _dev_metric(self) -> float:
        engine = LoraEngine(self.adapted, self.run.name, self.run.template)
        limit = self.run.config.eval_rows
        return evaluate(engine, self.run.task, prefix=self.run.name, split="dev", limit=limit).score


def encode_whole(base: FrozenModel, run: Run, rows: Sequence[Any]) -> list[Example]:
    """Return rows as the hard template renders them, its constant tokens in front; the task's answers are learned."""
    template = run.template.hard()
    left = template.block(base.tokenizer).literal_ids()
    examples = encode_rows(base, run.task, template, rows)
    return [
        dataclasses.replace(
            example,
            ids=[*left, *example.ids],
            spans=tuple((first + len(left), end + len(left)) for first, end in example.spans),
        )
        for example in examples
    ]


def gradients(base: FrozenModel, rows: Sequence[Example], micro_tokens: int = MICRO_TOKENS) -> float:
    """Add the gradient of the mean loss over target tokens to the updates; return that loss in nats."""
    weight, total = 1.0 / sum(len(row.learned) for row in rows), 0.0
    for part in micro_batches([(0, row) for row in rows], micro_tokens):
        _, losses = target_losses(base, part, [None])
        weighted = losses.sum() * weight
        torch.autograd.backward(weighted)
        total += float(weighted.detach())
    return total


def _adapted(base: FrozenModel, peft_model: Any) -> Adapted:
    """Freeze PEFT's model as a base of its own and let only the updates train."""
    frozen = FrozenModel(peft_model.get_base_model(), base.tokenizer)
    named = [(name, parameter) for name, parameter in peft_model.named_parameters() if "lora_" in name]
    for _, parameter in named:
        parameter.requires_grad_(True)
    return Adapted(frozen, peft_model, tuple(parameter for _, parameter in named))


@contextmanager
def _peft_warnings_muted() -> Iterator[None]:
    """Mute what PEFT says of its own doings: an attribute asked for under its old name, GPT-2's transposed layers that
    it recognises by itself, and ranks for fused experts that no target reaches."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        for message in ("fan_in_fan_out is set to", "The following (rank|alpha)_pattern keys"):
            warnings.filterwarnings("ignore", message=message)
        yield
