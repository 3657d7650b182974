"""The constant block in front of a task's text: literal tokens and soft slots, in order. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Segment = tuple[int, ...] | int
"""Literal token ids, or the number of soft vectors that stand here."""


@dataclass(frozen=True, slots=True)
class Block:
    """What stands left of the text of every row: for example `((1,), 20, (3, 517))` is BOS, 20 vectors, two tokens."""

    segments: tuple[Segment, ...]

    @property
    def num_soft(self) -> int:
        """P, the vectors in the block."""
        return sum(segment for segment in self.segments if isinstance(segment, int))

    @property
    def num_positions(self) -> int:
        """Positions that the block takes: literal tokens and vectors."""
        return sum(segment if isinstance(segment, int) else len(segment) for segment in self.segments)

    @property
    def left_ids(self) -> tuple[int, ...]:
        """The literal tokens left of the first vector."""
        first = self.segments[0] if self.segments else ()
        return first if isinstance(first, tuple) else ()

    def soft_positions(self) -> list[int]:
        """Return the position of each vector within the block, in the order of the vectors."""
        positions: list[int] = []
        start = 0
        for segment in self.segments:
            length = segment if isinstance(segment, int) else len(segment)
            if isinstance(segment, int):
                positions.extend(range(start, start + length))
            start += length
        return positions

    def literal_ids(self, fill: int = 0) -> list[int]:
        """Return one token id per position, `fill` where a vector stands."""
        ids: list[int] = []
        for segment in self.segments:
            ids.extend([fill] * segment if isinstance(segment, int) else segment)
        return ids

    def to_json(self) -> list[list[int] | int]:
        """Return a JSON-ready list; `from_json` is its inverse."""
        return [segment if isinstance(segment, int) else list(segment) for segment in self.segments]

    @classmethod
    def from_json(cls, data: Sequence[Sequence[int] | int]) -> Block:
        """Build the block from `to_json`'s list."""
        return cls(tuple(segment if isinstance(segment, int) else tuple(segment) for segment in data))

    @classmethod
    def of(cls, segments: Sequence[Sequence[int] | int]) -> Block:
        """Build a block, dropping empty segments and joining neighbouring literals."""
        joined: list[Segment] = []
        for segment in segments:
            if isinstance(segment, int):
                if segment:
                    joined.append(segment)
            elif segment:
                last = joined[-1] if joined else 0
                if isinstance(last, tuple):
                    joined[-1] = (*last, *segment)
                else:
                    joined.append(tuple(segment))
        return cls(tuple(joined))
