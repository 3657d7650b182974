"""Small tasks in words that are token ids, tiny models trained for them, and real reports of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foreword.core.model import FrozenModel
from foreword.eval.metrics import bootstrap, get_metric, percentile_interval
from foreword.eval.report import EvalReport, EvalRow
from foreword.eval.tasks import Row, rows_sha256
from tests.doctor.lab.handmade import HandKV
from tests.doctor.lab.trainers import text_kv_start
from tests.tiny import tiny

WIDTH = 6
"""Words of an input; the last is the one that decides."""
MARKS = (30, 31, 32, 33)


def words(ids: Sequence[int]) -> str:
    """Return token ids as a text."""
    return " ".join(f"w{token}" for token in ids)


def ids_of(text: str) -> list[int]:
    """Return the token ids of a text."""
    return [int(word[1:]) for word in text.split()]


def make_rows(task: int, seed: int, count: int, length: int = 1, width: int = WIDTH) -> tuple[Row, ...]:
    """Return rows of task number `task`: the last word of an input decides `length` words of the answer, the first one
    names the task."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(40, 97, (width,), generator=generator).tolist()
        mark = int(torch.randint(0, len(MARKS), (1,), generator=generator))
        ids[0], ids[-1] = 20 + task, MARKS[mark]
        target = words([3 + (mark + 3 * task + 5 * place) % 17 for place in range(length)])
        rows.append(Row(input=words(ids), target=target, references=(target,), messages=None, index=index))
    return tuple(rows)


class Speaker:
    """A base, with or without keys and values trained for a task, that answers greedily."""

    def __init__(self, base: FrozenModel, flat: Tensor | None, length: int = 1) -> None:
        self.base, self.flat, self.length = base, flat, length

    def pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return keys and values [Hkv, P, Dh] by layer."""
        assert self.flat is not None
        layer = self.base.spec.layers[0]
        parts = self.flat.view(len(self.flat), self.base.spec.num_layers, 2, layer.num_kv_heads, layer.head_dim)
        both = parts.permute(1, 2, 3, 0, 4)
        return [pair[0] for pair in both], [pair[1] for pair in both]

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits [B, T, V] of rows of one length."""
        if self.flat is None:
            return self.base.model(input_ids=ids).logits  # type: ignore[no-any-return]
        made = HandKV(self.base.model, *self.pairs())
        return made.begin(ids, torch.ones_like(ids))[0]

    @torch.no_grad()
    def __call__(self, inputs: Sequence[str]) -> list[str]:
        """Return answers."""
        answers = []
        for text in inputs:
            ids = torch.tensor([ids_of(text)])
            for _ in range(self.length):
                ids = torch.cat([ids, self.logits(ids)[:, -1:].argmax(-1)], dim=1)
            answers.append(words(ids[0, -self.length :].tolist()))
        return answers

    def answer_at(self, inputs: Sequence[str], temperature: float, seed: int) -> list[str]:
        """Return sampled answers."""
        generator, answers = torch.Generator().manual_seed(seed), []
        with torch.no_grad():
            for text in inputs:
                shares = torch.softmax(self.logits(torch.tensor([ids_of(text)]))[0, -1] / temperature, -1)
                answers.append(words([int(torch.multinomial(shares, 1, generator=generator))]))
        return answers

    @torch.no_grad()
    def forced(self, rows: Sequence[Row]) -> float:
        """Return the share of target words that are best behind the right words before them: teacher forcing."""
        hits = total = 0
        for row in rows:
            target, text = ids_of(row.target), ids_of(row.input)
            best = self.logits(torch.tensor([text + target[:-1]]))[0, len(text) - 1 :].argmax(-1).tolist()
            hits += sum(a == b for a, b in zip(best, target, strict=True))
            total += len(target)
        return hits / total


def train(base: FrozenModel, rows: Sequence[Row], steps: int, num: int = 8, lr: float = 0.05, seed: int = 0) -> Tensor:
    """Train keys and values for rows of one length; return them flat."""
    start = text_kv_start(base, seed, num)
    flat = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([flat], lr=lr)
    inputs = torch.tensor([ids_of(row.input) + ids_of(row.target) for row in rows])
    length = len(ids_of(rows[0].target))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = inputs[torch.randint(0, len(inputs), (min(16, len(inputs)),), generator=generator)]
        logits = Speaker(base, flat).logits(batch[:, :-1])[:, -length:]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, -length:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return flat.detach()


@cache
def trained(name: str, task: int = 0, length: int = 1, steps: int = 30, rows: int = 64, num: int = 8) -> Speaker:
    """Return a speaker trained for a task."""
    base = tiny(name)
    return Speaker(base, train(base, make_rows(task, 100 + task, rows, length), steps, num), length)


def report(rows: Sequence[Row], answers: Sequence[str], prefix: str | None = "v", name: str = "task") -> EvalReport:
    """Return the report of answers to rows."""
    metric = get_metric("exact_match")
    references = [row.references for row in rows]
    counts = metric.count(answers, references)
    scores = metric.row(counts).tolist()
    judged = tuple(
        EvalRow(
            index=row.index,
            input=row.input,
            target=row.target,
            references=row.references,
            output=answer,
            score=score,
            finish_reason="stop",
        )
        for row, answer, score in zip(rows, answers, scores, strict=True)
    )
    return EvalReport(
        task=name,
        split="test",
        metric="exact_match",
        score=float(metric.total(counts.sum(axis=0, keepdims=True))[0]),
        interval=percentile_interval(bootstrap(metric, counts, 500, 0)),
        num_rows=len(rows),
        kind="hard_text" if prefix is None else "prefix",
        prefix=prefix,
        decoding="free",
        data_sha256=rows_sha256(rows),
        seed=0,
        date="2026-11-21T00:00:00+00:00",
        versions={},
        seconds=1.0,
        rows=judged,
    )


def said(rows: Sequence[Row], speaker: Any, **named: Any) -> EvalReport:
    """Return the report of what a speaker answers to rows."""
    return report(rows, speaker([row.input for row in rows]), **named)
