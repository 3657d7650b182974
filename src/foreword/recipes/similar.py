"""`similar`: which version of the registry to start a new task from.

Three measures, from dear to cheap: the loss of the new task's rows at the very start that training from a version would
have; how far two versions' outputs lie apart on shared probes; the cosine of their vectors. bench/transfer.py measures
which of them tells the gain of a transfer, see docs/transfer.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foreword.config import load_task
from foreword.core.artefact import Artefact, load_artefact
from foreword.core.compile import check_base, compile
from foreword.core.conformance import check_probe
from foreword.core.forward import forward_rows
from foreword.core.init import from_vectors
from foreword.core.prompt import KVPrefix, Vectors, vectors_from_tensors
from foreword.errors import ConfigError, DataError, NotFound
from foreword.eval.tasks import Task
from foreword.recipes.origin import recipe_of, task_of
from foreword.registry.lookup import PROD
from foreword.train.data import Example
from foreword.train.loss import mean_losses
from foreword.train.run import Run
from foreword.train.state import RunState
from foreword.train.tuners import to_parts

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.registry.store import Registry, Version

NUM_ROWS = 64
"""Training rows that the loss is taken on; more change the order of starts little."""
PROBES_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One version as a start for the subject."""

    reference: str
    method: str
    num_vectors: int
    loss: float | None
    """Mean loss of the subject's rows at this start, nats per answer token; None without rows."""
    kl: float | None
    """Divergence of the outputs on both versions' probes, symmetrised, nats per probe; None for a task file."""
    cosine: float | None
    """Of the vectors' means, part by part (layers, keys, values), averaged; None for a task file."""
    aligned_cosine: float | None
    """The same, vector by vector; None where their numbers differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Similar:
    """What starts there are for a task or a version, the best first."""

    subject: str
    method: str
    matches: tuple[Match, ...]
    ranked_by: str
    """loss or kl."""
    own_init: str
    own_loss: float | None
    """The rows' loss at the start that the task has without a version."""
    left_out: tuple[str, ...]
    """Versions that cannot be a start, and why."""

    @property
    def recommended(self) -> str | None:
        """The reference to start from, or None where the task's own start has less loss."""
        if not self.matches:
            return None
        best = self.matches[0]
        worse = best.loss is not None and self.own_loss is not None and best.loss >= self.own_loss
        return None if worse else best.reference

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return dataclasses.asdict(self) | {"recommended": self.recommended}


@dataclass(frozen=True, slots=True)
class _Subject:
    name: str
    method: str
    own_task: str
    run: Run | None
    """Task and settings; None for a version whose rows are not at hand."""
    artefact: Artefact | None


def similar(
    registry: Registry,
    base: FrozenModel | Callable[[], FrozenModel],
    subject: str | Path,
    *,
    method: str | None = None,
    num_rows: int = NUM_ROWS,
    all_versions: bool = False,
) -> Similar:
    """Rank the registry's versions as starts for a task file, or for a version's task.

    Looked at are the versions that tasks serve (prod, else the newest), or `all_versions`: of the same base and method,
    of other tasks. They are ordered by loss where there are rows, else by `kl`. Raises NotFound where the registry
    holds no other task, ConfigError and DataError for a task file as `train` does.
    """
    if num_rows < 1:
        raise ConfigError(f"{num_rows} rows measure nothing", hint="Give 1 or more; 64 is the default.")
    known = _subject(registry, subject, method)
    versions = _versions(registry, known.own_task, all_versions)
    frozen = base() if callable(base) else base
    if known.artefact is not None:
        check_base(frozen, known.artefact)
    chosen: list[tuple[Version, Artefact]] = []
    left_out: list[str] = []
    for version in versions:
        artefact = load_artefact(registry.path(version))
        if version.method != known.method:
            left_out.append(f"{version.reference}: method {version.method}, a start for {known.method} is needed")
        elif odd := artefact.header.base.first_difference(frozen.fingerprint):
            left_out.append(f"{version.reference}: of another base ({odd[0]} {odd[1]:.12} there, {odd[2]:.12} here)")
        else:
            chosen.append((version, artefact))
    losses, own_loss, own_init = _losses(frozen, known, [artefact for _, artefact in chosen], num_rows)
    matches = []
    for (version, artefact), loss in zip(chosen, losses, strict=True):
        kl = cosine = aligned = None
        if known.artefact is not None:
            kl = output_divergence(frozen, known.artefact, artefact)
            cosine, aligned = cosines(known.artefact.vectors, artefact.vectors)
        matches.append(
            Match(
                reference=version.reference,
                method=version.method,
                num_vectors=version.num_vectors,
                loss=loss,
                kl=kl,
                cosine=cosine,
                aligned_cosine=aligned,
            )
        )
    ranked_by = "loss" if known.run is not None else "kl"
    matches.sort(key=lambda match: getattr(match, ranked_by))
    return Similar(
        subject=known.name,
        method=known.method,
        matches=tuple(matches),
        ranked_by=ranked_by,
        own_init=own_init,
        own_loss=own_loss,
        left_out=tuple(left_out),
    )


def cosines(one: Vectors, other: Vectors) -> tuple[float, float | None]:
    """Return the cosine of the mean vectors, and the mean cosine vector by vector where the numbers are equal.

    Both are taken part by part (of a `kv`: keys and values of each layer) and averaged. Raises ValueError for vectors
    of two methods. Source: SPoT, Vu et al. 2022, arXiv:2110.07904, section 4, whose measures these are for prompts.
    """
    if one.method != other.method:
        raise ValueError(f"vectors of {one.method} and {other.method} lie in other spaces")
    pairs = [(a.float().flatten(1), b.float().flatten(1)) for a, b in zip(to_parts(one), to_parts(other), strict=True)]
    pooled = [F.cosine_similarity(a.mean(0), b.mean(0), dim=0) for a, b in pairs]
    if len(pairs[0][0]) != len(pairs[0][1]):
        return float(torch.stack(pooled).mean()), None
    aligned = [F.cosine_similarity(a, b, dim=1).mean() for a, b in pairs]
    return float(torch.stack(pooled).mean()), float(torch.stack(aligned).mean())


def output_divergence(base: FrozenModel, one: Artefact, other: Artefact) -> float | None:
    """Return (KL(p || q) + KL(q || p)) / 2 of the next token, mean over both artefacts' probes, in nats.

    None where neither has probes.
    """
    probes = [*one.header.conformance, *other.header.conformance]
    rows = [check_probe(probe, base.spec.vocab_size) for probe in probes]
    if not rows:
        return None
    p, q = (_next_logprobs(base, compile(base, artefact), rows) for artefact in (one, other))
    both = (p.exp() - q.exp()) * (p - q)
    return float(both.nan_to_num().sum(-1).mean()) / 2


def start_loss(base: FrozenModel, run: Run, start: Vectors, examples: Sequence[Example]) -> float:
    """Return the mean loss of examples, nats per answer token, where a run starts from `start`."""
    block = run.template.block(base.tokenizer)
    vectors = from_vectors(start, block, after=run.template.num_after)
    return mean_losses(base, [(compile(base, vectors), examples)])[0]


def _next_logprobs(base: FrozenModel, prefix: KVPrefix, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the next token's log-probabilities [rows, V] behind each row, float64."""
    found = []
    with torch.no_grad():
        for first in range(0, len(rows), PROBES_AT_ONCE):
            part = rows[first : first + PROBES_AT_ONCE]
            longest = max(map(len, part))
            last = torch.tensor([i * longest + len(row) - 1 for i, row in enumerate(part)], device=base.device)
            logits = forward_rows(base, part, [prefix] * len(part), select=last)
            found.append(torch.log_softmax(logits.double(), -1).cpu())
    return torch.cat(found)


def _subject(registry: Registry, subject: str | Path, method: str | None) -> _Subject:
    if str(subject).endswith(".toml"):
        config, train = load_task(subject, [f'train.method="{method}"'] if method else ())
        task = Task(config)
        task.rows("train")
        return _Subject(str(subject), train.method, config.name, Run(task, train, config.name), None)
    version = registry.resolve(str(subject))
    artefact = load_artefact(registry.path(version))
    run = None
    try:
        task = task_of(artefact.header, version.reference)
        task.rows("train")
        run = Run(task, recipe_of(artefact.header), version.task)
    except (ConfigError, DataError):  # the version says no rows, or they are gone: its vectors are compared alone
        pass
    return _Subject(version.reference, version.method, version.task, run, artefact)


def _versions(registry: Registry, own_task: str, all_versions: bool) -> list[Version]:
    """Return the versions to look at, of other tasks than `own_task`."""
    tasks = [task for task in registry.tasks() if task.name != own_task and task.newest is not None]
    if not tasks:
        raise NotFound(
            f"the registry {registry.home} holds no version of another task than {own_task!r}",
            hint="Publish some; a first task starts from text.",
        )
    if all_versions:
        return [version for task in tasks for version in registry.versions(task.name)]
    return [registry.resolve(f"{task.name}@{task.aliases.get(PROD, task.newest)}") for task in tasks]


def _losses(
    base: FrozenModel, subject: _Subject, artefacts: Sequence[Artefact], num_rows: int
) -> tuple[Sequence[float | None], float | None, str]:
    """Return each artefact's start loss, that of the task's own start, and what that start is."""
    run = subject.run
    if run is None:
        return [None] * len(artefacts), None, ""
    init = None if str(run.config.init).startswith("from:") else run.config.init
    config = dataclasses.replace(run.config, init=init, max_train_rows=num_rows, eval_rows=1)
    state = RunState(base, dataclasses.replace(run, config=config))
    own = vectors_from_tensors(state.snapshot(), state.block)
    own_loss, *losses = (
        start_loss(base, run, start, state.train) for start in (own, *(artefact.vectors for artefact in artefacts))
    )
    return losses, own_loss, str(state.run.resolved()["train"]["init"])
