"""What doctor examines, as plain data: an implementation, a training run, an evaluation.

An artefact is a path, a server a URL; those have rooms of their own. A check asks only for what it needs, and says
what was missing where a subject does not bring it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from foreword.core.spec import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from foreword.core.model import FrozenModel
    from foreword.core.prompt import Vectors
    from foreword.eval.report import EvalReport
    from foreword.eval.tasks import Row

Forward = Callable[["Tensor", "Tensor"], "Tensor"]
"""(ids [B, T], mask [B, T] with 1 at real tokens; padding at either side) -> logits [B, T, V].

P + T rows of logits are the fault `logits-uncut`."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A model with vectors in it, whoever wrote it; nothing of it is changed by being examined."""

    declared: Method
    """What its maker says it is: prompt, prefix (hidden states in every layer) or kv."""
    num_vectors: int
    """P, as declared."""
    base: FrozenModel
    """The base without vectors, to compare with; it may share its modules with `model`."""
    forward: Forward
    """One forward with the vectors, as in production, text only given."""
    model: nn.Module | None = None
    """The module that runs inside `forward`, so that its layers can be watched; None: `forward` is a black box."""
    vectors: Vectors | Mapping[str, Tensor] | None = None
    """What was trained; with `Vectors`, the exact reference is computed from them and `base`."""
    training_forward: Forward | None = None
    """The same forward as it runs while training (training mode, gradient checkpointing as set)."""
    generate: Callable[[Tensor, Tensor, int], Tensor] | None = None
    """(ids [B, T], mask [B, T], n) -> the n new token ids [B, n], greedy, without stopping at an end token."""
    turns: Callable[[Sequence[Sequence[int]]], Tensor] | None = None
    """Token ids of successive turns, given one after the other with the cache kept between them -> the logits [V]
    behind the last token of the last turn."""
    probes: Sequence[Mapping[str, Any]] = ()
    """Conformance probes made where the vectors were trained; see foreword.core.conformance."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRun:
    """A trainer held between two steps. Checks that take steps put every tensor and the optimizer back afterwards."""

    model: nn.Module
    """Everything that has parameters: the base, and the vectors or the modules that make them."""
    vectors: Mapping[str, Tensor]
    """The tensors that should train, by name, with their P rows along dimension 0 (or 1 where `layered`)."""
    num_vectors: int
    """P, as declared."""
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    """The training loss of one fixed batch, with gradients, without a step; a scalar."""
    step: Callable[[], float]
    """One whole optimizer step on the next batch, gradients cleared as the trainer does; returns its loss."""
    base: nn.Module | None = None
    """What should stay frozen. None: every parameter of `model` that is not among `vectors`; so name the base where an
    encoder inside `model` makes the vectors and trains with them."""
    layered: bool = False
    """Whether `vectors` are [L, P, ...]."""
    frozen_rows: Sequence[int] = ()
    """Rows that are kept still on purpose, such as an attention sink."""
    labels: Tensor | None = None
    """Labels [B, W] of the fixed batch, as the loss gets them, -100 where none; W is T or P + T."""
    input_ids: Tensor | None = None
    """Text ids [B, T] of the same batch, without a place for the vectors."""
    logits: Callable[[], Tensor] | None = None
    """Logits [B, W, V] of the fixed batch, as the loss gets them (before any shift inside the loss)."""
    vocabulary: Tensor | None = None
    """Embedding rows [V, D] of the base, for norms."""
    initial: Mapping[str, Tensor] | None = None
    """`vectors` as they were at step 0. None: as they are now, where `history` is empty."""
    reference: Mapping[str, Tensor] | None = None
    """Real values in the place of `vectors`, such as keys and values that the base computes for text: by the same names
    and with the same layout, with any number of rows. None: `vocabulary`, where its width is that of the vectors."""
    history: Sequence[Mapping[str, float]] = ()
    """The run's records so far: step, train_loss (or loss), and where there are any dev_loss, dev_metric, lr."""
    seeds: Mapping[int, Sequence[Mapping[str, float]]] | None = None
    """Histories of the same run under other seeds, by seed."""
    teacher_logprobs: Tensor | None = None
    """Of a distillation: the teacher's log-probabilities [N, V] at the batch's N target positions, -inf where they were
    not kept."""
    student_logprobs: Callable[[], Tensor] | None = None
    """The student's log-probabilities [N, V] at the same positions, as trained so far."""
    rewind: Callable[[], None] | None = None
    """Puts back what `step` moves besides tensors, optimizer, random generators and module modes: the place in the
    data, a schedule, a counter. Called after a check's steps. None: the batches that checks see are passed over."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What was measured of a version's quality, and how; every part is optional, and a check skips what is missing.

    Reports are `foreword.eval.report.EvalReport` with their rows; two that a check compares must be of the same rows.
    """

    metric: str = "exact_match"
    """Name of the metric of `claimed_score` and of answers that are judged here."""
    claimed_score: float | None = None
    """The score that is claimed for the version on `test`, 0 to 1."""
    test: Sequence[Row] = ()
    """The rows of that score."""
    train: Sequence[Row] = ()
    """The rows that the version was trained on."""
    generate: Callable[[Sequence[str]], Sequence[str]] | None = None
    """Inputs -> the version's own greedy answers, as served."""
    old: EvalReport | None = None
    """The version before, on the rows of `new`."""
    new: EvalReport | None = None
    """The version whose change is claimed."""
    claimed_change: Literal["better", "worse"] | None = None
    """What is said of `new` against `old`."""
    promotions: Sequence[str] = ()
    """Versions that the alias pointed at, oldest first."""
    skills: Mapping[str, tuple[EvalReport, EvalReport]] = field(default_factory=dict)
    """Other skills by name, for which the vectors were not trained: (base with the vectors, base without)."""
    alone: Mapping[str, EvalReport] = field(default_factory=dict)
    """Prefixes of a composition by task: each served alone, on that task's rows."""
    joined: Mapping[str, EvalReport] = field(default_factory=dict)
    """The same tasks and rows with all prefixes joined in one sequence."""
    traffic: Mapping[tuple[Literal["base", "old", "new"], Literal["then", "now"]], EvalReport] = field(
        default_factory=dict
    )
    """Base (with its hard text), old and new version, each on requests of then and of now."""
    decoding_then: Mapping[str, Any] | None = None
    """Effective sampling parameters when quality was good: temperature, top_p, stop, logit_bias, max_tokens, ..."""
    decoding_now: Mapping[str, Any] | None = None
    """The same now, as the engine applies them."""
    greedy_then: Sequence[str] = ()
    """Greedy answers of then to some inputs."""
    greedy_now: Sequence[str] = ()
    """Greedy answers of now to the same inputs, under the parameters of then."""
    sweep: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Of a sweep over P: (score on the training rows, score on dev) by number of vectors."""
    teacher_logprobs: Tensor | None = None
    """Of a distillation: the teacher's log-probabilities [N, V] at N held-out positions, -inf where not kept."""
    student_logprobs: Tensor | None = None
    """The trained student's log-probabilities [N, V] at the same positions."""
