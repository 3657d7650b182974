"""Who owns which block of the key/value pool. Plain bookkeeping: imports no torch.

The pool is cut into blocks of `block_size` slots; a slot holds one position's keys and values in every layer.

    block    0      1      2      3      4      5   ...
           zeros   [ prefix "triage" ]  [row a] [row b]
    count    -      3      3      1      1      1        owners: the resident prefix itself, and each row behind it

Full blocks of a prefix are shared by all rows behind it; the rest of its last block is copied to each row, which then
writes on in its own copy. Block 0 holds zeros for ever: padding is read from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from foreword.errors import ConfigError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(amount: str | int) -> int:
    """Return bytes from a number or a text such as "512MiB", "1 GiB" or "2G" (binary units).

    Raises ConfigError where it is neither.
    """
    if isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        return amount
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(amount), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ConfigError(f"{amount!r} is not an amount of memory", hint='Write it as "1GiB", "512MiB" or in bytes.')
    return int(float(match[1]) * UNITS[match[2].upper()])


def count_blocks(num_positions: int, block_size: int) -> int:
    """Return the blocks that `num_positions` need."""
    return -(-num_positions // block_size)


def slot_of(blocks: Sequence[int], position: int, block_size: int) -> int:
    """Return the slot where `position` of a row with these blocks lies."""
    return blocks[position // block_size] * block_size + position % block_size


class BlockPool:
    """Blocks 1..num_blocks with a count of owners each; a block without owners is free.

    The last freed block is the first one handed out again, so memory that was never needed is never touched.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"a pool of {num_blocks} blocks of {block_size} positions holds nothing")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._owners = [0] * (num_blocks + 1)
        self._free = list(range(num_blocks, 0, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Return `count` free blocks, now with one owner each. The caller has looked at `num_free`."""
        assert 0 <= count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each block."""
        for block in blocks:
            assert self._owners[block] > 0, f"block {block} is free and cannot be shared"
            self._owners[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Take an owner from each block; a block that loses its last one is free again."""
        for block in blocks:
            assert self._owners[block] > 0, f"block {block} is released more often than it was taken"
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)

    def num_owners(self, block: int) -> int:
        """Return how many own this block."""
        return self._owners[block]

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless `holders`, the blocks of every owner, are exactly what is not free."""
        expected = [0] * (self.num_blocks + 1)
        for blocks in holders:
            for block in blocks:
                expected[block] += 1
        held = sum(1 for count in self._owners if count)
        assert self._owners == expected, "the counts of owners differ from the blocks that owners hold"
        assert len(self._free) + held == self.num_blocks, f"{len(self._free)} free + {held} held != {self.num_blocks}"
        assert len(set(self._free)) == len(self._free), "a block is twice in the free list"
