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
    numbers = [[uniform(row.seed, row.index, row.num_answer)] for row in rows]
    number = torch.tensor(numbers, dtype=torch.float64, device=device)
    cut = [place for place, request in enumerate(requests) if request.top_k or request.top_p < 1.0]
    if not cut:
        return _pick(torch.softmax(logits, dim=-1), number)
    tokens = _draw_among_best(logits[cut], number[cut], [requests[place] for place in cut])
    if len(cut) == len(rows):
        return tokens
    found = _pick(torch.softmax(logits, dim=-1), number)
    found[cut] = tokens
    return found


def _draw_among_best(logits: Tensor, number: Tensor, requests: Rows[Request]) -> Tensor:
    """Return one token per row from the `top_k` best, and of those from the fewest that hold `top_p`."""
    device, vocab_size = logits.device, logits.shape[-1]
    top_k = torch.tensor([[request.top_k or vocab_size] for request in requests], device=device)
    top_p = torch.tensor([[request.top_p] for request in requests], dtype=torch.float64, device=device)
    count = min(vocab_size, max(request.top_k or HEAD_SIZE for request in requests))
    best, ids = logits.topk(count)
    is_kept = torch.arange(count, device=device) < top_k
    # among top-k alone those are the whole; without it, what lies behind the head counts as well
    whole = torch.where(
        top_k[:, 0] < vocab_size,
        best.masked_fill(~is_kept, -torch.inf).logsumexp(-1),
        logits.logsumexp(-1),
    )
    shares = (best - whole[:, None]).double().exp() * is_kept
    before = shares.cumsum(-1) - shares
    tokens = ids.gather(1, _pick(shares * (before < top_p), number)[:, None])[:, 0]
    reached = before[:, -1] + shares[:, -1] >= top_p[:, 0]
    missed = [] if count == vocab_size else (~reached & (top_k[:, 0] == vocab_size)).nonzero()[:, 0].tolist()
    if missed:  # a flat distribution: the head does not hold top_p, so look at all
        shares, order = torch.softmax(logits[missed].double(), dim=-1).sort(descending=True)
        shares *= shares.cumsum(-1) - shares < top_p[missed]
        tokens[missed] = order.gather(1, _pick(shares, number[missed])[:, None])[:, 0]
    return tokens


def _pick(shares: Tensor, number: Tensor) -> Tensor:
    """Return the place [B] where the cumulated `shares` [B, n] pass `number` [B, 1] of their sum."""
    cumulated = shares.cumsum(-1, dtype=torch.float64)
    places = torch.searchsorted(cumulated, number * cumulated[:, -1:], right=True)
    return places[:, 0].clamp(max=shares.shape[-1] - 1)


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
