"""What each method trains on a base: how many numbers, by which formula, and what of it works on one token."""

from __future__ import annotations

from dataclasses import dataclass

from foreword.advise.bases.families import STATE_MODELS
from foreword.advise.bases.shapes import BaseShape, LayerShape, LinearPart
from foreword.advise.cost.load import Load
from foreword.advise.cost.quantity import show_number

LORA_PARTS: tuple[LinearPart, ...] = ("attention", "mlp", "shared_expert", "state", "projection")
"""The linear maps that carry LoRA: all but experts, routers and the head. PEFT 0.21 with `target_modules="all-linear"`
puts one on every expert and router too in some families (Mixtral, Qwen3-MoE, DeepSeek-V3), in others on neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The trained numbers of one method."""

    count: int
    formula: str
    """In letters, without b: `2·L·P·Hkv·Dh`."""
    numbers: str
    """The formula with numbers: `2·64·20·8·128`."""
    where: str = ""
    """What a letter of the formula means, where it is none of the usual ones."""

    def times_b(self, b: float) -> tuple[str, str]:
        """Return formula and numbers of the bytes, b each."""
        end = f", {self.where}" if self.where else ""
        return f"{self.formula}·b{end}", f"{self.numbers}·{show_number(b)}"


def trained(method: str, base: BaseShape, load: Load) -> Trained:
    """Return what a method of the table trains; text methods train nothing."""
    if method in ("prompt", "compiled_prompt"):
        return _product("P·D" if base.embed_size == base.hidden_size else "P·E", load.num_vectors, base.embed_size)
    if method == "prefix":
        return _product("L·P·D", base.num_layers, load.num_vectors, base.hidden_size)
    if method in ("kv", "cartridge"):
        return kv_numbers(base, load.num_vectors if method == "kv" else load.cartridge_tokens)
    if method == "lora":
        size = lora_width(base)
        return _product("r·S", load.lora_rank, size, where="S = Σ (in + out) over the linear maps of all layers")
    if method == "adapter":
        return _adapter(base, load.adapter_size)
    if method == "ia3":
        return _ia3(base)
    if method == "full":
        return _product("N", base.num_parameters)
    return Trained(count=0, formula="0: text is written, not trained", numbers="")


def kv_numbers(base: BaseShape, tokens: int, letter: str = "P") -> Trained:
    """Return the cached numbers of `tokens` positions over all layers: keys and values, or latents."""
    kinds = {layer.kind for layer in base.layers}
    first = base.layers[0]
    per_token = sum(layer.elements_per_token for layer in base.layers)
    if kinds == {"kv"} and len({_kv_size(layer) for layer in base.layers}) == 1 and first.head_dim == first.value_dim:
        return _product(f"2·L·{letter}·Hkv·Dh", 2, base.num_layers, tokens, first.num_kv_heads, first.head_dim)
    if kinds == {"latent"}:
        width = f"({first.latent_dim} + {first.rope_dim})"
        return Trained(
            count=tokens * per_token,
            formula=f"L·{letter}·(latent + rope)",
            numbers=f"{base.num_layers}·{tokens}·{width}",
        )
    if per_token == 0:
        return Trained(count=0, formula="0: state layers keep a state of fixed size, no tokens", numbers="")
    where = "k = Σ Hkv·(Dh + Dv) over the layers that keep keys and values of their own"
    return _product(f"{letter}·k", tokens, per_token, where=where)


def lora_width(base: BaseShape, parts: tuple[LinearPart, ...] = LORA_PARTS) -> int:
    """Return S, the sum of in + out over all copies of the linear maps of `parts`.

    Mamba's out_proj is left out: its kernels read that weight past the module, and PEFT refuses it.
    """
    skipped = ("out_proj",) if base.model_type in STATE_MODELS else ()
    return sum(
        linear.count * (linear.in_size + linear.out_size)
        for linear in base.linears
        if linear.part in parts and linear.name not in skipped
    )


def _kv_size(layer: LayerShape) -> tuple[int, int, int]:
    return layer.num_kv_heads, layer.head_dim, layer.value_dim


def _adapter(base: BaseShape, size: int) -> Trained:
    """Return Houlsby's bottleneck adapters: one behind each sublayer, both maps with biases (arXiv:1902.00751)."""
    hidden, layers = base.hidden_size, base.num_layers
    sites = 2 if any(linear.part in ("mlp", "expert") for linear in base.linears) else 1
    return Trained(
        count=sites * layers * (2 * hidden * size + hidden + size),
        formula=f"{sites}·L·(2·D·m + D + m)",
        numbers=f"{sites}·{layers}·(2·{hidden}·{size} + {hidden} + {size})",
    )


def _ia3(base: BaseShape) -> Trained:
    """Return (IA)³'s scales: one per key, value and inner feed-forward feature (arXiv:2205.05638)."""
    scales = 0
    for layer in base.layers:
        if layer.kind == "kv":
            scales += layer.num_kv_heads * (layer.head_dim + layer.value_dim)
        elif layer.kind == "latent":
            scales += layer.num_kv_heads * (layer.head_dim - layer.rope_dim + layer.value_dim)
    downs = {linear.part: linear for linear in base.linears if linear.part in ("mlp", "expert", "shared_expert")}
    inner = sum(linear.in_size * linear.count for linear in downs.values())
    kv, dim, down = base.num_kv_heads, base.head_dim, downs.get("mlp")
    if kv and dim and len(base.kv_layers) == base.num_layers and len(downs) == 1 and down:
        if scales == base.num_layers * 2 * kv * dim:
            return Trained(
                count=scales + inner,
                formula="L·(2·Hkv·Dh + F)",
                numbers=f"{base.num_layers}·(2·{kv}·{dim} + {down.in_size})",
            )
    return Trained(
        count=scales + inner,
        formula="(k + f)",
        numbers=f"({show_number(scales)} + {show_number(inner)})",
        where="k the keys and values of all layers, f the inner feed-forward features of all layers and experts",
    )


def _product(formula: str, *factors: int, where: str = "") -> Trained:
    count = 1
    for factor in factors:
        count *= factor
    numbers = "·".join(show_number(factor) for factor in factors)
    return Trained(count=count, formula=formula, numbers=numbers, where=where)
