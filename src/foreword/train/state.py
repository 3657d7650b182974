"""The moving parts of one run: tuner, optimizer, data order, history, best-so-far; one step of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foreword.config import TrainConfig
from foreword.core.artefact import load_artefact
from foreword.core.init import from_vectors, initial_vectors
from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix, Vectors
from foreword.errors import ConfigError, DataError, IncompatibleModel, TrainingDiverged
from foreword.eval.tasks import Split, sample_rows
from foreword.train.data import BatchOrder, Example, encode_rows
from foreword.train.loss import Batch
from foreword.train.muon import Muon
from foreword.train.run import DEFAULTS, Run, Status
from foreword.train.tuners import Tuner, scales_of

if TYPE_CHECKING:
    from foreword.eval.report import EvalRow

GENERIC_TEXT = "Read the message and answer with the right text for it."
GENERIC_LABELS = "Read the message and answer with the right label for it: "
BETAS = (0.7, 0.9)
"""AdamW's averages over about 3 and 10 steps: runs are short, gradients of few vectors turn quickly; measured by
bench/defaults.py."""
NUM_ANSWERS = 8
"""Dev rows of an evaluation that are kept with their answers for the run's report."""


class RunState:
    """One run while it trains. `step` counts finished optimizer steps.

    `leader` is the first member of the run's group, at whose start it begins (train/sharing.py). `encoded` keeps rows
    as tokens, so that runs of one task over one template read them once.
    """

    def __init__(
        self,
        base: FrozenModel,
        run: Run,
        leader: RunState | None = None,
        encoded: dict[Any, list[Example]] | None = None,
    ) -> None:
        config = run.config
        self.run = run
        self.template = run.template
        self.block = self.template.block(base.tokenizer)
        self._check_slots(base)
        if run.material is None:
            self.train, self.dev = self._encode(base, {} if encoded is None else encoded)
        else:
            self.train, self.dev = run.material.examples(base, self.template)
        self.parent = run.parent
        initial = self._initial(base) if leader is None else self._start_of(leader)
        tuner = Tuner(
            initial,
            self.block,
            config.encoder,
            config.seed,
            config.frozen_vectors,
            rank=config.rank,
            is_shared=config.share is not None,
            scales=scales_of(base, config.method),
        )
        self.tuner = tuner.to(base.device)
        self.optimizer = make_optimizer(self.tuner.own_parameters(), run, self.tuner.widths)
        self.order = BatchOrder([len(row.ids) for row in self.train], config.batch_size, config.seed)
        self.step = 0
        self.status: Status = "running"
        self.error: TrainingDiverged | None = None
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.best_tensors: dict[str, Tensor] = {}
        self.good_tensors = self.start_tensors = self.snapshot()
        self.answers: dict[int, tuple[EvalRow, ...]] = {}
        """Some dev rows with their answers, by the step of their evaluation; for reading, not kept over a resume."""

    @functools.cached_property
    def rows_sha256(self) -> str:
        """Hash of what is learned: token ids, learned places, a teacher's probabilities."""
        taught = [
            (row.ids, row.learned, [] if row.teacher is None else row.teacher.log_probs.tolist()) for row in self.train
        ]
        return hashlib.sha256(repr(taught).encode()).hexdigest()

    @property
    def is_running(self) -> bool:
        """Whether the run has steps to go."""
        return self.status == "running"

    def snapshot(self) -> dict[str, Tensor]:
        """Return the vectors as they are now, float32 on the CPU, encoder folded away."""
        with torch.no_grad():
            tensors = self.tuner.vectors().tensors()
        return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}

    def batch(self, part: int) -> Batch:
        """Return the rows of the step to come; `part` counts the accumulated forward passes."""
        index = self.step * self.run.config.accumulate + part
        return Batch(self.tuner, [self.train[row] for row in self.order.batch(index)])

    def step_batch(self) -> Batch:
        """Return all rows of the step to come, those of accumulated passes together."""
        parts = [self.batch(part) for part in range(self.run.config.accumulate)]
        return Batch(self.tuner, [row for part in parts for row in part.rows])

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.run.lr * lr_factor(self.run.config, step)

    def update(self, loss: float, num_tokens: int) -> None:
        """Take an optimizer step with the gradients at hand; a loss or gradient that is not finite ends the run."""
        parameters = [parameter for parameter in self.tuner.parameters() if parameter.grad is not None]
        norms = torch.stack([parameter.grad.norm() for parameter in parameters if parameter.grad is not None])
        norm, rate = float(norms.norm()), self.lr_at(self.step)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._diverge(loss, rate)
            return
        self.good_tensors = self.snapshot()
        moved = distance(self.good_tensors, self.start_tensors)
        clip = self.run.config.clip
        if clip and norm > clip:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        row = {"step": self.step, "loss": loss, "lr": rate, "grad_norm": norm, "displacement": moved}
        self.history.append({**row, "tokens": num_tokens})

    def note(self, measures: dict[str, float]) -> None:
        """Take up an evaluation: add it to the history, keep the vectors if they are the best, stop if none came."""
        self.history[-1].update(measures)
        config = self.run.config
        by = "dev_metric" if config.best_by == "metric" else "dev_loss"
        value = measures.get(by)
        if value is None or not math.isfinite(value):
            return
        better = not self.best or (value > self.best["value"] if by == "dev_metric" else value < self.best["value"])
        if better:
            self.best = {"step": self.step, "by": by, "value": value, "waited": 0}
            self.best_tensors = self.snapshot()
        else:
            self.best["waited"] += 1
            if config.patience is not None and self.best["waited"] >= config.patience and self.is_running:
                self.status = "early_stopped"

    def finish(self) -> None:
        """Settle which vectors are kept: the best on dev, else the last good ones."""
        if self.status == "running":
            self.status = "done"
        if not self.best_tensors:
            self.best = {"step": self.step, "by": "last", "value": None}
            self.best_tensors = self.good_tensors if self.status == "diverged" else self.snapshot()

    def dev_metric(self, base: FrozenModel, prefix: KVPrefix) -> float:
        """Return the task's metric on the dev sample, by generation through the embedded engine."""
        from foreword.engine.engine import Engine
        from foreword.eval.run import evaluate

        engine = Engine(base)
        prefix = dataclasses.replace(prefix, template=self.template, max_new_tokens=self.run.task.config.max_new_tokens)
        engine.add_prefix(self.run.name, prefix)
        limit = self.run.config.eval_rows
        report = evaluate(engine, self.run.task, prefix=self.run.name, split="dev", limit=limit)
        self.answers[self.step] = report.rows[:NUM_ANSWERS]
        return report.score

    def to_json(self) -> dict[str, Any]:
        """Return the plain part of the state; `from_json` puts it back."""
        error = {"message": self.error.message, "hint": self.error.hint} if self.error else None
        plain = {"step": self.step, "status": self.status, "history": self.history, "best": self.best}
        return {**plain, "parent": self.parent, "error": error}

    def from_json(self, data: dict[str, Any]) -> None:
        """Take up what `to_json` returned."""
        self.step, self.status, self.history, self.best = (data[key] for key in ("step", "status", "history", "best"))
        self.parent, error = data["parent"], data["error"]
        self.error = TrainingDiverged(error["message"], hint=error["hint"]) if error else None

    def _diverge(self, loss: float, rate: float) -> None:
        self.status = "diverged"
        kept = self.best.get("step", max(self.step - 1, 0))
        self.error = TrainingDiverged(
            f"run {self.run.name}: loss {loss} at step {self.step + 1} with learning rate {rate:.3g}; "
            f"the vectors of step {kept} are kept",
            hint='Lower train.lr, or train with train.encoder = "residual".',
        )
        self.optimizer.zero_grad(set_to_none=True)

    def _check_slots(self, base: FrozenModel) -> None:
        template, method = self.template, self.run.config.method
        if template.num_left + template.num_after == 0:
            raise ConfigError(
                f"template {template.text!r} has no soft slot", hint="Add one, such as {soft:20}, or set num_vectors."
            )
        if method != "prompt" and template.num_after:
            raise ConfigError(
                f"template {template.text!r} has soft slots behind the input, which method {method!r} cannot fill",
                hint='Move them in front of {input}, or use method = "prompt".',
            )
        if self.run.config.frozen_vectors >= template.num_left + template.num_after:
            raise ConfigError(
                f"train.frozen_vectors = {self.run.config.frozen_vectors} leaves none of the "
                f"{template.num_left + template.num_after} vectors to train",
                hint="Freeze fewer, or use more vectors.",
            )
        base.check_holds(self.block.num_positions)

    def _encode(self, base: FrozenModel, encoded: dict[Any, list[Example]]) -> tuple[list[Example], list[Example]]:
        """Return training and dev rows as tokens; `encoded` holds those that another run needed before."""
        task, config = self.run.task, self.run.config
        if task.config.dev is None and (config.best_by == "metric" or config.patience is not None):
            raise ConfigError('best_by = "metric" and patience need task.dev', hint="Give a dev file.")
        found = []
        parts: list[tuple[Split, int | None, int]] = [("train", config.max_train_rows, config.seed)]
        parts += [("dev", config.eval_rows, 0)] if task.config.dev is not None else []
        for split, limit, seed in parts:
            key = task.config, json.dumps(self.template.to_json()), split, limit, seed if limit else None
            if key not in encoded:
                encoded[key] = encode_rows(base, task, self.template, sample_rows(task.rows(split), limit, seed))
            found.append(encoded[key])
        return found[0], found[1] if len(found) > 1 else []

    def _initial(self, base: FrozenModel) -> Vectors:
        config, task, start = self.run.config, self.run.task, self.run.start
        if start is not None:
            self._check_method("the given start", start.method)
            return from_vectors(start, self.block, after=self.template.num_after)
        spec = config.init or DEFAULTS[config.method].init
        if spec.startswith("from:"):
            return self._from_version(spec.removeprefix("from:"))
        labels = task.labels()
        if spec == "text":
            known = GENERIC_LABELS + ", ".join(labels) if labels else GENERIC_TEXT
            spec = f"text:{task.config.hard_text or known}"
        if spec == "labels" and not labels:
            raise DataError(f"task {task.config.name} has no closed set of labels", hint='Use init = "text".')
        return initial_vectors(
            base, config.method, self.block, spec, labels=labels, seed=config.seed, after=self.template.num_after
        )

    def _start_of(self, leader: RunState) -> Vectors:
        mine, theirs = ((t.num_left, t.num_after) for t in (self.template, leader.template))
        if mine != theirs:
            raise ConfigError(
                f"runs {leader.run.name} and {self.run.name} share a source, and differ in shape: "
                f"{_shape(leader.tuner, *theirs)} and {_shape(leader.tuner, *mine)}",
                hint="Give both the same number of vectors, for example by train.num_vectors.",
            )
        self.parent = leader.parent
        return dataclasses.replace(leader.tuner.initial, block=self.block)

    def _from_version(self, reference: str) -> Vectors:
        from pathlib import Path

        from foreword.registry.store import Registry

        path = Path(reference)
        if not path.is_file():
            registry = Registry.open()
            path = registry.path(registry.resolve(reference))
        artefact = load_artefact(path)
        self._check_method(reference, artefact.header.method)
        self.parent = artefact.sha256
        return from_vectors(artefact.vectors, self.block, after=self.template.num_after)

    def _check_method(self, source: str, method: str) -> None:
        if method != self.run.config.method:
            raise IncompatibleModel(
                f"{source} holds vectors of method {method!r}, the run trains {self.run.config.method!r}",
                hint="Start from vectors of the same method.",
            )


def distance(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Return how far vectors are from their start, as a share of its norm: ||P - P0|| / ||P0||."""
    moved = math.sqrt(sum(float((tensor - start[name]).square().sum()) for name, tensor in tensors.items()))
    return moved / max(math.sqrt(sum(float(tensor.square().sum()) for tensor in start.values())), 1e-30)


def lr_factor(config: TrainConfig, step: int) -> float:
    """Return the part of the peak learning rate that a step, counted from 0, has: warm-up, then the schedule."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    done = step / config.steps
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return warm * shape[config.schedule]


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], run: Run, widths: Sequence[int] = ()
) -> torch.optim.Optimizer:
    """Return the optimizer that a run asks for, over `parameters`; `widths` are those of the vectors' parts."""
    decay = run.config.weight_decay
    if run.optimizer == "muon":
        return Muon(parameters, lr=run.lr, weight_decay=decay, widths=widths)
    if run.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=run.lr, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=run.lr, betas=BETAS, weight_decay=decay)


def _shape(tuner: Tuner, num_left: int, num_after: int) -> list[int]:
    return [num_left + num_after, tuner.width]
