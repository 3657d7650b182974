"""A base model as advice sees it: the shapes that its costs follow from. No weights, no torch.

Letters: P vectors, D hidden size, L layers, H query heads, Hkv key/value heads, Dh head dimension, F feed-forward
width, V vocabulary, N parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["kv", "latent", "state", "shared"]
"""What a layer keeps of a token: keys and values; one latent and one rotary key (MLA); a state of fixed size that
tokens do not add to (Mamba, linear attention); nothing of its own (it reads another layer's keys and values)."""

LinearPart = Literal["attention", "mlp", "expert", "shared_expert", "router", "state", "projection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What one layer keeps of the tokens before."""

    kind: LayerKind = "kv"
    num_kv_heads: int = 0
    """Hkv; for a latent layer the heads that its keys and values unfold to."""
    head_dim: int = 0
    """Dh of the keys; for a latent layer as unfolded."""
    value_dim: int = 0
    """Dh of the values; equal to `head_dim` in most models."""
    window: int | None = None
    """W of a sliding-window layer in tokens, None for full attention."""
    latent_dim: int = 0
    """Width of the latent that keys and values share; 0 unless the kind is latent."""
    rope_dim: int = 0
    """Width of the rotary key beside the latent."""
    state_elements: int = 0
    """Numbers in the state of one sequence; 0 unless the kind is state."""

    @property
    def elements_per_token(self) -> int:
        """Numbers that one token adds to this layer's cache."""
        if self.kind == "kv":
            return self.num_kv_heads * (self.head_dim + self.value_dim)
        return self.latent_dim + self.rope_dim if self.kind == "latent" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Equal linear maps of the whole model, `out = W x`, as a low-rank change may be put on."""

    name: str
    """Their name within a layer, as the transformers library calls them."""
    in_size: int
    out_size: int
    count: int
    """Copies over all layers and experts."""
    part: LinearPart
    bias: bool = False
    active: int | None = None
    """Copies that work on one token; None is all of them. Less for the experts that a router picks."""

    @property
    def num_parameters(self) -> int:
        """Weights and biases of all copies."""
        return self.count * self._size

    @property
    def num_active_parameters(self) -> int:
        """Weights and biases of the copies that work on one token."""
        return (self.count if self.active is None else self.active) * self._size

    @property
    def _size(self) -> int:
        return self.out_size * (self.in_size + int(self.bias))


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShape:
    """A decoder-only base in numbers."""

    name: str
    model_type: str
    num_layers: int
    """L."""
    hidden_size: int
    """D."""
    num_heads: int
    """H, query heads; 0 where no layer attends."""
    ffn_size: int
    """F; of one expert where every feed-forward layer is a mixture of experts."""
    vocab_size: int
    """V."""
    num_parameters: int
    """N, embeddings and output head included, tied ones once."""
    num_active_parameters: int
    """The part of N that works on one token: a mixture of experts counts those picked and the shared ones."""
    context_tokens: int | None
    """Longest sequence in tokens; None where the configuration names none."""
    embed_size: int
    """Width of one input embedding, D but for models that project embeddings; a soft prompt's rows are as wide."""
    weight_bits: float = 16
    """Bits per stored weight of the quantised parts. Fewer bits make the base smaller and decoding read less; they save
    no FLOP here, since weights are expanded before the product."""
    quantised_parts: tuple[LinearPart, ...] = ()
    """The linear maps that are stored in `weight_bits`; everything else is stored in 16."""
    is_decoder: bool = True
    layers: tuple[LayerShape, ...]
    linears: tuple[Linear, ...]
    assumed: tuple[str, ...] = ()
    """What was not given and was filled in: the value and why."""

    @property
    def kv_layers(self) -> tuple[LayerShape, ...]:
        """The layers that hold keys and values of their own."""
        return tuple(layer for layer in self.layers if layer.kind == "kv")

    @property
    def num_kv_heads(self) -> int | None:
        """Hkv where all layers that attend agree, else None."""
        return self._uniform(lambda layer: layer.num_kv_heads)

    @property
    def head_dim(self) -> int | None:
        """Dh where all layers that attend agree, else None."""
        return self._uniform(lambda layer: layer.head_dim)

    @property
    def window(self) -> int | None:
        """The smallest sliding window in tokens; None where every layer attends to all."""
        return min((layer.window for layer in self.layers if layer.window is not None), default=None)

    @property
    def num_full_layers(self) -> int:
        """Layers that attend without a window."""
        return sum(layer.kind != "state" and layer.window is None for layer in self.layers)

    @property
    def is_moe(self) -> bool:
        """Whether a router picks experts."""
        return any(linear.part == "expert" for linear in self.linears)

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights as stored."""
        saved = sum(linear.num_parameters for linear in self.linears if linear.part in self.quantised_parts)
        return 2 * self.num_parameters - saved * (16 - self.weight_bits) / 8

    @property
    def active_weight_bytes(self) -> float:
        """Bytes of the weights that one token passes; what decoding one sequence reads."""
        saved = sum(linear.num_active_parameters for linear in self.linears if linear.part in self.quantised_parts)
        return 2 * self.num_active_parameters - saved * (16 - self.weight_bits) / 8

    def first_layer_without_kv(self) -> int | None:
        """Return the index of the first layer that neither holds nor borrows plain keys and values, or None."""
        return next((i for i, layer in enumerate(self.layers) if layer.kind in ("latent", "state")), None)

    def kv_bytes_per_token(self, bytes_per_element: float = 2) -> float:
        """Return what one token adds to the caches of all layers, in bytes.

        A window does not lessen it: a prefix's file and blocks hold every layer; layers that borrow hold none.
        """
        return sum(layer.elements_per_token for layer in self.layers) * bytes_per_element

    def state_bytes(self, bytes_per_element: float = 2) -> float:
        """Return what one sequence holds in state layers, however long it is, in bytes."""
        return sum(layer.state_elements for layer in self.layers) * bytes_per_element

    def _uniform(self, size: Callable[[LayerShape], int]) -> int | None:
        sizes = {size(layer) for layer in self.layers if layer.kind in ("kv", "latent", "shared")}
        return sizes.pop() if len(sizes) == 1 else None
