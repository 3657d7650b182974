"""From logits to tokens, for all rows of a batch at once.

Order: repetition, presence and frequency penalties; constraints (`allowed_ids`, `choices`); log-probabilities are read
here; then temperature, top-k, top-p; then one draw. A draw depends on the seed, the completion and the place in the
answer alone, so neither the batch nor a repeated step changes it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from foreword.engine.request import Request, TokenLogprob
from foreword.engine.sequence import Sampled, Sequence

GREEDY_BELOW = 1e-5
"""A temperature below it is greedy: logits divided by less overflow."""
HEAD_SIZE = 1024
"""top-p looks at this many best tokens first and sorts the whole vocabulary only where they are not enough."""


def uniform(seed: int, index: int, place: int) -> float:
    """Return a number in (0, 1) for a place in the answer of completion `index`, by a counter-based generator."""
    key = struct.pack("<QQQ", seed % 2**64, index, place)
    bits = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")
    return (bits + 0.5) / 2**32


def is_sampled(request: Request) -> bool:
    """Return whether the request draws at random."""
    return request.temperature >= GREEDY_BELOW and request.top_k != 1


def has_penalty(request: Request) -> bool:
    """Return whether the request changes logits by what was said before."""
    return bool(request.repetition_penalty != 1.0 or request.presence_penalty or request.frequency_penalty)


def is_plain(sequence: Sequence) -> bool:
    """Return whether the row's next token is the argmax of its logits and nothing else is asked."""
    request = sequence.request
    return (
        sequence.node is None
        and request.logprobs is None
        and request.allowed_ids is None
        and not is_sampled(request)
        and not has_penalty(request)
    )


def choose(logits: Tensor, rows: Rows[Sequence]) -> list[Sampled]:
    """Return the next token of each row from its `logits` [B, V]."""
    special = [place for place, row in enumerate(rows) if not is_plain(row)]
    if not special:
        return [Sampled(token) for token in logits.argmax(-1).tolist()]
    if len(special) == len(rows):
        return _choose_special(logits.float(), rows)
    found = [Sampled(token) for token in logits.argmax(-1).tolist()]
    picked = logits[torch.tensor(special, device=logits.device)].float()
    for place, sampled in zip(special, _choose_special(picked, [rows[place] for place in special]), strict=True):
        found[place] = sampled
    return found


def _choose_special(logits: Tensor, rows: Rows[Sequence]) -> list[Sampled]:
    logits = _constrain(_penalise(logits, rows), rows)
    tokens = logits.argmax(-1)
    drawn = [place for place, row in enumerate(rows) if is_sampled(row.request)]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        tokens[index] = draw(logits[index], [rows[place] for place in drawn])
    chosen = tokens.tolist()
    asked = [place for place, row in enumerate(rows) if row.request.logprobs is not None]
    logprobs: dict[int, TokenLogprob] = {}
    if asked:
        index = torch.tensor(asked, device=logits.device)
        counts = [rows[place].request.logprobs or 0 for place in asked]
        found = _logprobs(logits[index], tokens[index], counts)
        logprobs = dict(zip(asked, found, strict=True))
    return [Sampled(token, logprobs.get(place)) for place, token in enumerate(chosen)]


def _penalise(logits: Tensor, rows: Rows[Sequence]) -> Tensor:
    """Return logits after repetition, presence and frequency penalties; rows and tokens as flat index pairs."""
    at: list[int] = []
    ids: list[int] = []
    factors: list[float] = []
    said_at: list[int] = []
    said_ids: list[int] = []
    amounts: list[float] = []
    for place, row in enumerate(rows):
        request = row.request
        if request.repetition_penalty != 1.0:
            at += [place] * len(row.seen)
            ids += row.seen
            factors += [request.repetition_penalty] * len(row.seen)
        if request.presence_penalty or request.frequency_penalty:
            said_at += [place] * len(row.counts)
            said_ids += list(row.counts)
            amounts += [request.presence_penalty + request.frequency_penalty * n for n in row.counts.values()]
    device = logits.device
    if ids:
        where = torch.tensor(at, device=device), torch.tensor(ids, device=device)
        factor, old = torch.tensor(factors, device=device), logits[where]
        logits = logits.index_put(where, torch.where(old > 0, old / factor, old * factor))
    if said_ids:
        where = torch.tensor(said_at, device=device), torch.tensor(said_ids, device=device)
        logits = logits.index_put(where, -torch.tensor(amounts, device=device), accumulate=True)
    return logits


def _constrain(logits: Tensor, rows: Rows[Sequence]) -> Tensor:
    """Return logits that are -inf outside each row's allowed tokens."""
    at: list[int] = []
    ids: list[int] = []
    bound: list[int] = []
    for place, row in enumerate(rows):
        allowed = list(row.node.children) if row.node is not None else row.request.allowed_ids
        if allowed is not None:
            bound.append(place)
            at += [place] * len(allowed)
            ids += allowed
    if not bound:
        return logits
    where = torch.tensor(at, device=logits.device), torch.tensor(ids, device=logits.device)
    kept = logits[where]
    return logits.index_fill(0, torch.tensor(bound, device=logits.device), -torch.inf).index_put(where, kept)


def draw(logits: Tensor, rows: Rows[Sequence]) -> Tensor:
    """Return one token per row, drawn from its `logits` [B, V] after temperature, top-k and top-p."""
    device = logits.device
    requests = [row.request for row in rows]
    logits = logits / torch.tensor([[request.temperature] for request in requests], device=device)
    for place, request in enumerate(requests):
        if request.top_k or request.top_p < 1.0:
            logits[place] = _keep_best(logits[place], request.top_k, request.top_p)
    cumulated = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    numbers = [[uniform(row.seed, row.index, row.num_answer)] for row in rows]
    target = torch.tensor(numbers, dtype=torch.float64, device=device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _keep_best(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return a row's logits [V], -inf outside the `top_k` best and outside the fewest that hold `top_p` of the rest."""
    vocab_size = logits.shape[-1]
    count = min(top_k or HEAD_SIZE, vocab_size)
    best, ids = logits.topk(count)
    if top_p < 1.0:
        total = best.double().logsumexp(0) if top_k else logits.double().logsumexp(0)
        before = (best.double() - total).exp().cumsum(0).roll(1)
        before[0] = 0.0
        if not top_k and count < vocab_size and bool(before[-1] < top_p):
            best, ids = logits.sort(descending=True)
            before = (best.double() - total).exp().cumsum(0).roll(1)
            before[0] = 0.0
        kept = before < top_p
        best, ids = best[kept], ids[kept]
    return torch.full_like(logits, -torch.inf).index_copy(0, ids, best)


def _logprobs(logits: Tensor, tokens: Tensor, counts: Rows[int]) -> list[TokenLogprob]:
    """Return log-probabilities of the chosen tokens and of each row's `counts` best, impossible ones left out."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(max(counts), logits.shape[-1]))
    found = []
    for token, own, row_values, row_ids, count in zip(
        tokens.tolist(), chosen, values.tolist(), ids.tolist(), counts, strict=True
    ):
        pairs = zip(row_ids[:count], row_values[:count], strict=True)
        top = {best: value for best, value in pairs if value > -torch.inf}
        found.append(TokenLogprob(token_id=token, logprob=own, top=top))
    return found
