"""What an optimiser moves: the vectors themselves, or an encoder that produces them while training.

Every kind of vectors is one matrix θ [P, F] here, F the numbers of one position over all layers, divided by the scale
of what the vectors stand beside: a learning rate is a displacement relative to that, whatever the base. An encoder's
output is all that is exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from foreword.core.block import Block
from foreword.core.init import kv_spreads, residual_scale
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt, Vectors

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel

WIDTH = 128
"""Width of an encoder's hidden layer and of the pseudo tokens that it reads."""


def to_parts(vectors: Vectors) -> list[Tensor]:
    """Return the vectors as tensors [P, ...], one per part that shares a scale."""
    if isinstance(vectors, SoftPrompt):
        return [vectors.tensors()["prompt"]]
    if isinstance(vectors, SoftPrefix):
        return list(vectors.vectors)
    pairs = zip(vectors.keys, vectors.values, strict=True)
    return [tensor.transpose(0, 1) for pair in pairs for tensor in pair]


def from_parts(parts: Sequence[Tensor], like: Vectors) -> Vectors:
    """Return vectors of the kind and block of `like`; the inverse of `to_parts`."""
    if isinstance(like, SoftPrompt):
        num = like.num_vectors
        after = None if like.after is None else parts[0][num:]
        return SoftPrompt(parts[0][:num], like.block, after)
    if isinstance(like, SoftPrefix):
        return SoftPrefix(torch.stack(list(parts)), like.block)
    heads = [part.transpose(0, 1) for part in parts]
    return SoftKV(tuple(heads[0::2]), tuple(heads[1::2]), like.block)


def scales_of(base: FrozenModel, method: str) -> list[Tensor] | None:
    """Return what each of a method's parts is divided by, measured in the base; None for their own initial size.

    A prompt's rows by the size of the second layer's input: what the first layer writes is 10 to 60 times longer than
    an embedding, and the rows must stand beside it. Each head's keys and values by how far tokens' lie from their mean:
    it tells no token from another, and of base-3m's keys it is up to 2.4 times as long as the rest.
    """
    if method == "prompt":
        return [residual_scale(base)]
    return kv_spreads(base) if method == "kv" else None


class Tuner(nn.Module):
    """Trainable form of one run's vectors, in float32; `vectors()` is what it stands for now.

    The first `num_frozen` vectors stay as they begin: a frozen first token keeps the attention that models rest there.
    Each part is divided by its own of `scales`, which broadcast to [...] of `to_parts`; without any by the root mean
    square of its initial values. `scales_of` has what training uses.
    `rank` and `is_shared` are those of `LowRank`, and of no other encoder.
    """

    def __init__(
        self,
        initial: Vectors,
        block: Block,
        encoder: str = "none",
        seed: int = 0,
        num_frozen: int = 0,
        *,
        rank: int = 1,
        is_shared: bool = False,
        scales: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        parts = [part.detach().float() for part in to_parts(initial)]
        self.block = block
        self.initial = initial
        """The vectors that training starts from."""
        self._shapes = [part.shape[1:] for part in parts]
        if scales is None:
            scales = [part.square().mean().sqrt().clamp_min(1e-6) for part in parts]
        whole = [scale.expand(shape).flatten() for scale, shape in zip(scales, self._shapes, strict=True)]
        self.register_buffer("scale", torch.cat(whole))
        self._num_frozen = num_frozen
        start = torch.cat([part.reshape(part.shape[0], -1) for part in parts], dim=1) / self._buffer("scale")
        self.register_buffer("frozen", start[:num_frozen].clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = LowRank(start, rank, is_shared) if encoder == "low_rank" else ENCODERS[encoder](start)

    def _buffer(self, name: str) -> Tensor:
        buffer: Tensor = getattr(self, name)
        return buffer

    def vectors(self) -> Vectors:
        """Return the vectors [float32], with gradients into the parameters."""
        return self.to_vectors(self.theta())

    def theta(self) -> Tensor:
        """Return θ [P, F]: the vectors with every part divided by its scale."""
        encoded: Tensor = self.encoder()
        if self._num_frozen:
            encoded = torch.cat([self._buffer("frozen"), encoded[self._num_frozen :]])
        return encoded

    @property
    def source(self) -> nn.Parameter | None:
        """The source [P, F] under the factors where a group shares it: stepped by the group (train/sharing.py)."""
        source = getattr(self.encoder, "source", None)
        return source if isinstance(source, nn.Parameter) else None

    def own_parameters(self) -> list[nn.Parameter]:
        """Return what the run's own optimizer moves: all parameters but a shared source."""
        return [parameter for parameter in self.parameters() if parameter is not self.source]

    @property
    def widths(self) -> list[int]:
        """The numbers of one position that belong together: a layer's hidden state, a head's key, a head's value."""
        return [shape[-1] for shape in self._shapes for _ in range(shape.numel() // shape[-1])]

    @property
    def width(self) -> int:
        """F, the numbers of one position over all layers."""
        return sum(self.widths)

    def to_vectors(self, theta: Tensor) -> Vectors:
        """Return what θ [P, F] stands for: the inverse of flattening and scaling."""
        flat = theta * self._buffer("scale")
        columns = torch.split(flat, [shape.numel() for shape in self._shapes], dim=1)
        shaped = [column.reshape(-1, *shape) for column, shape in zip(columns, self._shapes, strict=True)]
        return from_parts(shaped, self.initial)


class Plain(nn.Module):
    """No encoder: θ is trained as it is."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        """Return θ [P, F]."""
        return self.theta


class Residual(nn.Module):
    """θ + MLP(θ), the MLP starting at zero. Source: Razdaibiedina et al. 2023, arXiv:2305.03937."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())
        self.layers = nn.Sequential(
            nn.Linear(start.shape[1], WIDTH), nn.ReLU(), _zero(nn.Linear(WIDTH, start.shape[1]))
        )

    def forward(self) -> Tensor:
        """Return θ + MLP(θ) [P, F]."""
        encoded: Tensor = self.theta + self.layers(self.theta)
        return encoded


class MLP(nn.Module):
    """Initial vectors + MLP of P trained pseudo tokens, the MLP starting at zero.

    Source: Li and Liang 2021, arXiv:2101.00190, section 4.3; the offset keeps the initialisation.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.clone())
        self.tokens = nn.Parameter(torch.randn(start.shape[0], WIDTH))
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), _zero(nn.Linear(WIDTH, start.shape[1])))

    def forward(self) -> Tensor:
        """Return the encoded vectors [P, F]."""
        encoded: Tensor = self.start + self.layers(self.tokens)
        return encoded


class LSTM(nn.Module):
    """Initial vectors + MLP of a two-way LSTM over P trained pseudo tokens.

    Source: P-tuning, Liu et al. 2021, arXiv:2103.10385; the offset keeps the initialisation.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.clone())
        self.tokens = nn.Parameter(torch.randn(start.shape[0], WIDTH))
        self.lstm = nn.LSTM(WIDTH, WIDTH // 2, bidirectional=True)
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), _zero(nn.Linear(WIDTH, start.shape[1])))

    def forward(self) -> Tensor:
        """Return the encoded vectors [P, F]."""
        encoded: Tensor = self.start + self.layers(self.lstm(self.tokens)[0])
        return encoded


class LowRank(nn.Module):
    """θ* ∘ (U Vᵀ), element by element: a source θ* [P, F], factors U [P, r] and V [F, r] whose product begins at one.

    The source stays as it begins, or `is_shared` by a group of runs that trains it; the factors are a run's own.
    Source: multitask prompt tuning, Wang et al. 2023, arXiv:2303.02861, with r = 1; θ in place of prompt rows alone.
    """

    source: Tensor

    def __init__(self, start: Tensor, rank: int = 1, is_shared: bool = False) -> None:
        super().__init__()
        if is_shared:
            self.source = nn.Parameter(start.clone())
        else:
            self.register_buffer("source", start.clone())
        num, width = start.shape
        self.rows = nn.Parameter(torch.cat([torch.ones(num, 1), torch.randn(num, rank - 1)], dim=1))
        self.columns = nn.Parameter(torch.cat([torch.ones(width, 1), torch.zeros(width, rank - 1)], dim=1))

    def forward(self) -> Tensor:
        """Return θ* ∘ (U Vᵀ) [P, F]."""
        return self.source * (self.rows @ self.columns.T)


ENCODERS: dict[str, type[nn.Module]] = {
    "none": Plain,
    "residual": Residual,
    "mlp": MLP,
    "lstm": LSTM,
    "low_rank": LowRank,
}


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
