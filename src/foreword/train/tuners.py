"""What an optimiser moves: the vectors themselves, or an encoder that produces them while training.

Every kind of vectors is one matrix θ [P, F] here, F the numbers of one position over all layers; each part (a layer's
hidden states, a layer's keys, a layer's values) is divided by the root mean square of its initial values. So a
learning rate is a relative displacement per step, whatever the scale of a base's embeddings, keys and values.
An encoder's output is all that is exported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foreword.core.block import Block
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt, Vectors

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


class Tuner(nn.Module):
    """Trainable form of one run's vectors, in float32; `vectors()` is what it stands for now.

    The first `num_frozen` vectors stay as they begin: a frozen first token keeps the attention that models rest there.
    """

    def __init__(
        self, initial: Vectors, block: Block, encoder: str = "none", seed: int = 0, num_frozen: int = 0
    ) -> None:
        super().__init__()
        parts = [part.detach().float() for part in to_parts(initial)]
        self.block = block
        self._like = initial
        self._shapes = [part.shape[1:] for part in parts]
        scales = [part.square().mean().sqrt().clamp_min(1e-6).expand(part[0].numel()) for part in parts]
        self.register_buffer("scale", torch.cat(scales))
        self._num_frozen = num_frozen
        start = torch.cat([part.reshape(part.shape[0], -1) for part in parts], dim=1) / self._buffer("scale")
        self.register_buffer("frozen", start[:num_frozen].clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = ENCODERS[encoder](start)

    def _buffer(self, name: str) -> Tensor:
        buffer: Tensor = getattr(self, name)
        return buffer

    def vectors(self) -> Vectors:
        """Return the vectors [float32], with gradients into the parameters."""
        encoded: Tensor = self.encoder()
        if self._num_frozen:
            encoded = torch.cat([self._buffer("frozen"), encoded[self._num_frozen :]])
        flat = encoded * self._buffer("scale")
        columns = torch.split(flat, [shape.numel() for shape in self._shapes], dim=1)
        shaped = [column.reshape(-1, *shape) for column, shape in zip(columns, self._shapes, strict=True)]
        return from_parts(shaped, self._like)


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


ENCODERS: dict[str, type[nn.Module]] = {"none": Plain, "residual": Residual, "mlp": MLP, "lstm": LSTM}


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
