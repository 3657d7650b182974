"""One forward over several tasks' blocks and all their rows, packed into one sequence [1, N] without padding.

A token sees its own run's block and the earlier tokens of its own row, nothing else. The mask is made from three
numbers a token (run, row, position), so windows are differences of positions and the order of the rows is free.
FlexAttention takes it as a BlockMask, other kinds of attention as a matrix [N, S].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foreword.core.block import Block
from foreword.core.fronts import fronts_given
from foreword.core.prompt import KVPrefix, SoftKV, SoftPrefix, SoftPrompt, Vectors

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel

IN_FRONT = -1
"""The row number of a block's positions."""
NOWHERE = -1
"""The run number of positions that only fill the sequence up."""
MULTIPLE = 64
"""On CUDA a sequence is filled up to a multiple of this, so that products keep aligned shapes."""


@dataclass(frozen=True, slots=True, eq=False)
class InSequence:
    """A run's block computed in the same forward as its rows."""

    vectors: Vectors
    block: Block

    @property
    def num_positions(self) -> int:
        """N, literal tokens and vectors."""
        return self.block.num_positions


Front = InSequence | KVPrefix | None
"""What stands in front of a run's rows; keys and values computed before, or nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Run, row and position of each of N places, int64 [N] each."""

    run: Tensor
    row: Tensor
    position: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.run)


@dataclass(slots=True)
class _Sequence:
    """Lists that grow while blocks and rows are laid out one after another."""

    ids: list[int]
    run: list[int]
    row: list[int]
    position: list[int]

    def add(self, ids: Sequence[int], run: int, row: int, start: int) -> int:
        """Append tokens; return the place of the first."""
        first = len(self.ids)
        self.ids += ids
        self.run += [run] * len(ids)
        self.row += [row] * len(ids)
        self.position += range(start, start + len(ids))
        return first

    def places(self, device: torch.device) -> Places:
        """Return the three tables."""
        return Places(*(torch.tensor(made, device=device) for made in (self.run, self.row, self.position)))


@dataclass(slots=True)
class _Past:
    """Keys and values in front of the sequence, of one run after another, and the places where they stand."""

    keys: list[Sequence[Tensor]]
    values: list[Sequence[Tensor]]
    places: _Sequence

    def add(self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Sequence[int], run: int) -> None:
        """Append a run's [Hkv, S, Dh] a layer, which stand at `positions`."""
        self.keys.append(keys)
        self.values.append(values)
        for position in positions:
            self.places.add([0], run, IN_FRONT, position)

    def layers(self, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return a layer's keys and values [1, Hkv, S, Dh], runs one after another; empty without any."""

        def joined(kind: list[Sequence[Tensor]]) -> list[Tensor]:
            return [torch.cat(layer, dim=1)[None].to(device, dtype) for layer in zip(*kind, strict=True)]

        return list(zip(joined(self.keys), joined(self.values), strict=True))


def _literals(block: Block) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield each stretch of literal tokens with the position where it begins."""
    start = 0
    for segment in block.segments:
        if not isinstance(segment, int):
            yield start, segment
        start += segment if isinstance(segment, int) else len(segment)


def forward_packed(
    base: FrozenModel,
    rows: Sequence[tuple[int, Sequence[int]]],
    fronts: Sequence[Front],
    select: Sequence[tuple[int, int]],
    splices: Sequence[tuple[int, int, Tensor]] = (),
) -> Tensor:
    """Return logits [len(select), V] of `select`ed (row, offset) places, without repeats.

    `rows` are (run, token ids), `fronts[run]` what stands in front of them. Each of `splices` (row, offset, vectors
    [S, D]) writes vectors over the embeddings at that place. Equals `forward_rows` up to rounding
    (tests/train/test_strategy.py) on the families that `packs` admits.
    """
    _ = base.per_token  # found by trial forwards, which must not meet the hooks set below
    sequence, device = _Sequence([], [], [], []), base.device
    index: dict[type, list[int]] = {SoftPrompt: [], SoftPrefix: []}
    given: dict[type, list[Tensor]] = {SoftPrompt: [], SoftPrefix: []}
    past = _Past([], [], _Sequence([], [], [], []))
    for run in dict.fromkeys(run for run, _ in rows):
        front = fronts[run]
        if isinstance(front, KVPrefix):
            past.add(front.keys, front.values, range(front.num_positions), run)
        elif front is None:
            continue
        elif isinstance(vectors := front.vectors, SoftKV):
            past.add(vectors.keys, vectors.values, front.block.soft_positions(), run)
            for start, literal in _literals(front.block):
                sequence.add(literal, run, IN_FRONT, start)
        else:
            first = sequence.add(front.block.literal_ids(), run, IN_FRONT, 0)
            index[type(vectors)] += [first + place for place in front.block.soft_positions()]
            given[type(vectors)].append(vectors.vectors.to(device, base.dtype))
    starts = []
    for number, (run, ids) in enumerate(rows):
        front = fronts[run]
        starts.append(sequence.add(ids, run, number, 0 if front is None else front.num_positions))
    for number, offset, behind in splices:
        index[SoftPrompt] += [starts[number] + offset + place for place in range(len(behind))]
        given[SoftPrompt].append(behind.to(device, base.dtype))
    if device.type == "cuda":
        sequence.add([0] * (-len(sequence.ids) % MULTIPLE), NOWHERE, 0, 0)
    own = sequence.places(device)
    inputs: dict[str, Tensor] = {"ids": torch.tensor([sequence.ids], device=device)}
    if given[SoftPrompt]:
        from foreword.core.model import put_rows

        at = torch.tensor(index[SoftPrompt], device=device)
        inputs = {"embeds": put_rows(base.embed(inputs["ids"]), at, torch.cat(given[SoftPrompt]))}
    wanted = torch.tensor([starts[row] + offset for row, offset in select], device=device)
    mask = attention_mask(base, own, past.places.places(device))
    with ExitStack() as stack:
        if given[SoftPrefix]:
            at = torch.tensor(index[SoftPrefix], device=device)
            stack.enter_context(base.layer_inputs_replaced(at, torch.cat(given[SoftPrefix], dim=1).unbind()))
        stack.enter_context(fronts_given(base.layers, past.layers(device, base.dtype)))
        stack.enter_context(base.computed_only_at([-1], wanted))
        return base.run(**inputs, positions=own.position[None], cache=None, mask=mask, select=wanted)


def attention_mask(base: FrozenModel, own: Places, past: Places) -> Any:
    """Return the mask of queries `own` [N] over keys `past` and `own` [S], in the form that its attention takes.

    A base whose layers differ in their windows takes a dict by `layer_types`.
    """
    kinds = getattr(base.config, "layer_types", None)
    windows = [layer.window for layer in base.spec.layers]
    keys = Places(*(torch.cat([getattr(past, n), getattr(own, n)]).long() for n in ("run", "row", "position")))
    if len(set(windows)) == 1:
        return _as_mask(base, own, keys, visible(own, keys, windows[0]))
    if kinds is None or len(set(zip(kinds, windows, strict=True))) > len(set(kinds)):
        raise ValueError("layers differ in their windows without saying so in layer_types")
    return {
        kind: _as_mask(base, own, keys, visible(own, keys, window))
        for kind, window in dict(zip(kinds, windows, strict=True)).items()
    }


Visible = Callable[[Any, Any, Tensor, Tensor], Tensor]


def visible(queries: Places, keys: Places, window: int | None) -> Visible:
    """Return FlexAttention's mask function: does query q see key k?"""

    q_run, q_row, q_position = queries.run, queries.row, queries.position
    k_run, k_row, k_position = keys.run, keys.row, keys.position

    def sees(batch: Any, head: Any, q: Tensor, k: Tensor) -> Tensor:
        distance = q_position[q] - k_position[k]
        related = (k_row[k] == IN_FRONT) | (k_row[k] == q_row[q])
        seen = (q_run[q] == k_run[k]) & related & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    return sees


def _as_mask(base: FrozenModel, own: Places, keys: Places, sees: Visible) -> Any:
    implementation = base.config._attn_implementation
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, None, None, len(own), len(keys), device=str(base.device))
    rows, columns = torch.arange(len(own), device=base.device), torch.arange(len(keys), device=base.device)
    matrix = sees(None, None, rows[:, None], columns[None])[None, None]
    if implementation == "sdpa":
        return matrix
    return torch.zeros_like(matrix, dtype=base.dtype).masked_fill(~matrix, torch.finfo(base.dtype).min)


@contextmanager
def flexible_attention(base: FrozenModel) -> Iterator[None]:
    """While active, attention on CUDA is FlexAttention, which skips what a packed sequence hides."""
    config = base.config
    before = config._attn_implementation
    if base.device.type == "cuda":
        config._attn_implementation = "flex_attention"
    try:
        yield
    finally:
        config._attn_implementation = before


def packs(base: FrozenModel) -> bool:
    """Return whether this base computes a packed sequence right: tried on three runs, compared with padded rows.

    Models that place tokens by counting the mask (ALiBi) or build their own masks do not.
    """
    from foreword.core.compile import compute_block
    from foreword.core.forward import forward_rows
    from foreword.core.pertoken import WITHIN

    generator = torch.Generator().manual_seed(0)
    vocab, width = base.spec.vocab_size, base.spec.embed_size
    ids = torch.randint(vocab, (4, 5), generator=generator).tolist()
    scale = float(base.embedding.weight[:64].float().std())
    soft = (torch.randn(2, 3, width, generator=generator) * scale).to(base.device)
    first, second = (SoftPrompt(one, Block((3,))) for one in soft)
    rows = [(0, ids[0]), (1, ids[1][:3]), (0, ids[2]), (2, ids[3])]
    try:
        with torch.no_grad(), flexible_attention(base):
            known = [KVPrefix(*_unbatched(compute_block(base, v, Block((3,)))), "") for v in (first, second)]
            places = [(row, len(ids) - 1) for row, (_, ids) in enumerate(rows)]
            found = forward_packed(base, rows, [InSequence(first, Block((3,))), known[1], None], places)
        flat = torch.tensor([row * 5 + offset for row, offset in places], device=base.device)
        with torch.no_grad():
            expected = forward_rows(base, [r for _, r in rows], [(*known, None)[run] for run, _ in rows], select=flat)
    except (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError):
        return False
    apart = (found.float() - expected.float()).abs().max()
    return bool(apart <= WITHIN.get(base.dtype, 0.1) * expected.float().std())


def _unbatched(layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return tuple(key[0] for key, _ in layers), tuple(value[0] for _, value in layers)
