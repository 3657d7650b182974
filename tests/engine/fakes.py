"""A runner without tensors: slots hold what should lie there, and every read is checked."""

import zlib

from foreword.engine.kvpool import slot_of
from foreword.engine.sequence import Sampled, Span

END = 0
"""The end token of the fake model."""


def content(row, position):
    """What a slot holds: a prefix's position, or all that a token's keys and values depend on."""
    prefix = row.prefix
    if position < row.num_prefix:
        return ("prefix", prefix.payload, position)
    return ("text", prefix.payload if prefix else None, tuple(row.tokens[: position - row.num_prefix + 1]))


def next_token(payload, tokens):
    """The fake model: a function of prefix and tokens; every 12th answer or so is the end token."""
    return zlib.crc32(repr((payload, list(tokens))).encode()) % 12


def answer(payload, prompt, max_tokens):
    """What the fake model answers when nothing goes wrong."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens and (token := next_token(payload, tokens)) != END:
        tokens.append(token)
    return tokens[len(prompt) :]


class FakeRunner:
    def __init__(self, block_size):
        self.block_size = block_size
        self.slots = {}
        self.poison = None
        """A payload that cannot be loaded, or a prompt's first token whose rows fail."""
        self.batches = []

    def load(self, entry):
        if entry.payload == self.poison:
            raise OSError("cannot load")
        for position in range(entry.num_positions):
            self.slots[slot_of(entry.start.blocks, position, self.block_size)] = ("prefix", entry.payload, position)

    def copy(self, pairs):
        found = [self.slots[source] for source, _ in pairs]
        for (_, target), what in zip(pairs, found, strict=True):
            self.slots[target] = what

    def prefill(self, spans):
        return self._run(spans)

    def decode(self, rows):
        assert all(row.num_uncomputed == 1 for row in rows)
        return self._run([Span(row, 1) for row in rows])

    def _run(self, spans):
        self.batches.append([span.num_new for span in spans])
        for span in spans:
            row, size = span.sequence, self.block_size
            if row.tokens[0] == self.poison:
                raise RuntimeError("poisoned row")
            end = row.num_computed + span.num_new
            for position in range(row.num_computed, end):
                self.slots[slot_of(row.blocks, position, size)] = content(row, position)
        found = []
        for span in spans:
            row, size = span.sequence, self.block_size
            for position in range(row.num_computed + span.num_new):
                assert self.slots[slot_of(row.blocks, position, size)] == content(row, position)
            payload = row.prefix.payload if row.prefix else None
            found.append(Sampled(next_token(payload, row.tokens)) if span.is_last else None)
        return found
