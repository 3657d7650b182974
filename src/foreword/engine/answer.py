"""How an answer grows: tokens are taken in, the end is seen, chunks are cut. Imports no torch."""

from __future__ import annotations

from foreword.engine.request import Chunk, FinishReason, TokenLogprob
from foreword.engine.sequence import Sampled, Sequence
from foreword.engine.trie import forced_tokens


def accept(sequence: Sequence, sampled: Sampled, stop_ids: frozenset[int]) -> None:
    """Take a sampled token into the answer; set `finish_reason` where it ends."""
    if sequence.node is not None:
        sequence.node = sequence.node.children[sampled.token]
        if sequence.node.answer is None:
            _append(sequence, sampled)
        accept_forced(sequence)
        return
    if sampled.token in stop_ids and not sequence.request.ignore_eos:
        finish(sequence, "stop")
        return
    _append(sequence, sampled)
    if sequence.stream is not None and (sequence.is_streaming or sequence.request.stop):
        sequence.text += sequence.stream.push([sampled.token])
        if sequence.stream.is_stopped:
            finish(sequence, "stop")
    if sequence.finish_reason is None and sequence.num_answer >= sequence.max_tokens:
        finish(sequence, "length")


def accept_forced(sequence: Sequence) -> None:
    """Take in what the trie of `choices` leaves no choice about; the row then catches up in one span."""
    if sequence.node is None:
        return
    tokens, sequence.node = forced_tokens(sequence.node)
    certain = sequence.request.logprobs is not None
    is_complete = sequence.node.answer is not None
    for token in tokens[:-1] if is_complete else tokens:  # the last token of a complete answer is the end token
        top = {token: 0.0} if sequence.request.logprobs else {}
        _append(sequence, Sampled(token, TokenLogprob(token_id=token, logprob=0.0, top=top) if certain else None))
    if is_complete:
        finish(sequence, "stop")


def finish(sequence: Sequence, reason: FinishReason) -> None:
    """End the answer: what was held back is text now."""
    sequence.finish_reason = reason
    if sequence.stream is not None:
        if not sequence.is_streaming and not sequence.request.stop:
            sequence.text += sequence.stream.push(sequence.tokens[sequence.num_prompt :])
        sequence.text += sequence.stream.flush()
    elif sequence.node is not None and sequence.node.answer is not None:
        sequence.text = sequence.node.answer


def take_chunk(sequence: Sequence) -> Chunk:
    """Return what the answer has gained since the last chunk."""
    sent = sequence.num_prompt + sequence.num_sent
    chunk = Chunk(
        index=sequence.index,
        text=sequence.text,
        token_ids=tuple(sequence.tokens[sent:]),
        logprobs=tuple(sequence.logprobs),
        finish_reason=sequence.finish_reason,
    )
    sequence.num_sent = sequence.num_answer
    sequence.text, sequence.logprobs = "", []
    return chunk


def _append(sequence: Sequence, sampled: Sampled) -> None:
    sequence.tokens.append(sampled.token)
    sequence.counts[sampled.token] = sequence.counts.get(sampled.token, 0) + 1
    sequence.seen.add(sampled.token)
    if sampled.logprob is not None:
        sequence.logprobs.append(sampled.logprob)
