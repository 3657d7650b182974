"""Load a base and freeze it; the only file that knows how model families differ.

Nothing here changes layer code: vectors enter through `inputs_embeds`, the cache, and forward pre-hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foreword.core.identity import bits_sha256, compute_fingerprint
from foreword.core.pertoken import computed_only_at, per_token_modules
from foreword.core.quantise import quantisation
from foreword.core.spec import Fingerprint, LayerSpec, ModelSpec
from foreword.errors import ConfigError, IncompatibleModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FrozenModel:
    """A frozen base model: every parameter has requires_grad False, evaluation mode, no dropout.

    `model` is the transformers causal language model, `tokenizer` may be None, `spec` its shapes.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        model.requires_grad_(False)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.decoder: nn.Module = model.base_model
        self.layers = _decoder_layers(model)
        self._accepts = set(inspect.signature(self.decoder.forward).parameters)
        self.spec = _probe_spec(self)

    @property
    def device(self) -> torch.device:
        """Device of the embeddings, where inputs go."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the base, which keys and values share."""
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding."""
        module: nn.Embedding = self.model.get_input_embeddings()
        return module

    @property
    def config(self) -> Any:
        """The text decoder's configuration."""
        return self.model.config.get_text_config()

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The base's identity; computed on first use."""
        return compute_fingerprint(self)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer: the generation configuration's and the tokenizer's end of sequence."""
        ids: set[int] = set()
        for source in (getattr(self.model, "generation_config", None), self.config, self.tokenizer):
            found = getattr(source, "eos_token_id", None)
            ids.update(found if isinstance(found, list | tuple) else [] if found is None else [found])
        return frozenset(ids)

    @cached_property
    def per_token(self) -> dict[str, type[nn.Module]]:
        """Names and types of a layer's modules that may skip rows (core/pertoken.py); found on first use."""
        return per_token_modules(self)

    @contextmanager
    def computed_only_at(self, layers: Sequence[int], rows: Tensor) -> Iterator[None]:
        """While active, all of these layers but keys and values is computed at `rows` [K] of the B·T only.

        -1 is the last layer. Outputs elsewhere are not meant to be read. A layer made of other modules than the last
        one is computed whole.
        """
        modules = [
            module
            for layer in (number % len(self.layers) for number in layers)
            for name, kind in self.per_token.items()
            if type(module := dict(self.layers[layer].named_modules()).get(name)) is kind
        ]
        with computed_only_at(modules, rows):
            yield

    def embed(self, ids: Tensor) -> Tensor:
        """Return the rows [..., D] that `inputs_embeds` takes for token ids."""
        rows: Tensor = self.embedding(ids)
        return rows

    def run_decoder(self, embeds: Tensor, *, positions: Tensor, cache: Any, mask: Tensor | None = None) -> None:
        """Run the decoder over `embeds` [B, T, D] only to fill `cache`; no logits are computed."""
        self.decoder(inputs_embeds=embeds, **self._arguments(positions, cache, mask))

    def run(
        self,
        *,
        ids: Tensor | None = None,
        embeds: Tensor | None = None,
        positions: Tensor,
        cache: Any,
        mask: Any = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """Run the model on `ids` [B, T] or `embeds` [B, T, D] at `positions` [B, T]; return logits.

        `cache` is a transformers cache (it is filled) or None, `mask` [B, past + T] has 1 at real tokens, or is in the
        form that the model's attention takes. With `select`, flat
        indices into B·T, logits are computed at those places only and come back as [len(select), V]; otherwise
        [B, T, V]. The head's input is gathered by a pre-hook, so a family's scales and caps of logits still apply.
        """
        inputs = {"inputs_embeds": embeds} if ids is None else {"input_ids": ids}
        with _gather_before_head(self.model.get_output_embeddings(), select):
            logits: Tensor = self.model(**inputs, **self._arguments(positions, cache, mask)).logits
        return logits[0] if select is not None else logits

    def _arguments(self, positions: Tensor, cache: Any, mask: Any) -> dict[str, Any]:
        arguments = {"attention_mask": mask, "past_key_values": cache, "use_cache": cache is not None}
        if "position_ids" in self._accepts:  # BLOOM counts positions from the mask
            arguments["position_ids"] = positions
        return arguments

    @contextmanager
    def layer_inputs_replaced(self, index: Tensor, rows: Sequence[Tensor]) -> Iterator[None]:
        """While active, layer l reads `rows[l]` [K, D] at `index` [K], flat indices into its input's B·T positions."""

        def hook_for(row: Tensor) -> Any:
            def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                new = put_rows(hidden, index, row)
                return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

            return replace

        handles = [
            layer.register_forward_pre_hook(hook_for(row), with_kwargs=True)
            for layer, row in zip(self.layers, rows, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check_holds(self, num_positions: int) -> None:
        """Raise IncompatibleModel when a layer's window or the position table cannot hold the block."""
        for index, layer in enumerate(self.spec.layers):
            if layer.window is not None and num_positions >= layer.window:
                raise IncompatibleModel(
                    f"layer {index} attends to a sliding window of {layer.window} tokens, "
                    f"the block in front of the text takes {num_positions}",
                    hint=f"Use at most {layer.window - 1} positions for vectors and hard text.",
                )
        limit = self.spec.max_positions
        if limit is not None and num_positions >= limit:
            raise IncompatibleModel(
                f"the base takes {limit} positions, the block in front of the text alone takes {num_positions}",
                hint="Use fewer vectors.",
            )

    def checksum(self) -> str:
        """Return an exact hash of every bit of every parameter and buffer, to prove that the base did not change.

        Of a sharded base, of the bits that this process holds.
        """
        return bits_sha256(self.model)


def load_base(
    base: Any,
    *,
    dtype: Literal["auto", "checkpoint", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
    tokenizer: Any = None,
    attention: str | None = None,
    quantise: str | None = None,
) -> FrozenModel:
    """Load a base and freeze it.

    `base` is a folder, a hub id or a transformers causal language model (kept where and as it is). `dtype` "checkpoint"
    is the checkpoint's own; "auto" is that too, but float32 on a CPU without instructions for 16-bit products, where
    those are tens of times slower (x86 with AVX2 only: 0.3 against 15 GFLOP/s). `attention` is transformers'
    attn_implementation; None is its default, but "eager" for bfloat16 on a CPU, where the backward pass of its fused
    attention is slow. `quantise` "8bit" or "4bit" holds the weights so, by bitsandbytes on a GPU.
    Raises ConfigError when nothing can be loaded from `base` or not in this way, IncompatibleModel when a layer has
    no plain keys and values (state-space layers, MLA latents).
    """
    if isinstance(base, FrozenModel):
        return base
    if isinstance(base, nn.Module):
        return FrozenModel(base, tokenizer)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in ("auto", "checkpoint", *DTYPES):
        raise ConfigError(f"dtype {dtype!r} is not one of auto, checkpoint, {', '.join(DTYPES)}")
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if quantise is not None:
        options |= {"quantization_config": quantisation(quantise, device), "device_map": {"": device}}
    try:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device {device!r} asked for, but no CUDA device is available", hint="Use device=cpu.")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES.get(dtype, "auto"), **options)
        if dtype == "auto" and device == "cpu" and not has_fast_products(model.dtype):
            model = model.float()
        if quantise is None:
            model = model.to(device)
        if attention is None and device == "cpu" and model.dtype == torch.bfloat16:
            model.set_attn_implementation("eager")
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        kind = "folder" if Path(str(base)).exists() else "folder or hub id"
        raise ConfigError(
            f"no base model can be loaded from {kind} {str(base)!r}: {str(error).splitlines()[0]}",
            hint="Give a folder with config.json, weights and tokenizer files, or a Hugging Face model id.",
        ) from error
    return FrozenModel(model, tokenizer)


def has_fast_products(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies matrices of `dtype` with instructions made for it."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or bool(supported[dtype]())


def put_rows(hidden: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return `hidden` [B, T, D] with `rows` [K, D] in place of the positions `index` [K] of its B·T."""
    return hidden.flatten(0, 1).index_copy(0, index, rows.to(hidden.dtype)).view_as(hidden)


def _decoder_layers(model: Any) -> list[nn.Module]:
    """Return the decoder's layers: the largest module list with one entry per hidden layer."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists: list[nn.ModuleList] = [
        m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count
    ]
    if not lists:
        raise IncompatibleModel(
            f"{type(model).__name__} has no list of {count} decoder layers", hint="foreword needs a causal decoder."
        )
    return list(max(lists, key=_num_parameters))


def _num_parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _probe_spec(base: FrozenModel) -> ModelSpec:
    """Run two tokens and read every layer's keys and values; refuse what has none."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    config, model_type = base.config, base.model.config.model_type

    def refuse(index: int, why: str) -> IncompatibleModel:
        return IncompatibleModel(
            f"layer {index} of {model_type} {why}",
            hint="A prefix needs plain keys and values in every layer; soft prompts for such a base are not compiled.",
        )

    if getattr(config, "is_encoder_decoder", False):
        raise IncompatibleModel(f"{model_type} is an encoder-decoder", hint="foreword needs a causal decoder.")
    if getattr(config, "kv_lora_rank", None):
        raise refuse(0, f"caches an MLA latent of {config.kv_lora_rank} numbers, not keys and values")
    declared = DynamicCache(config=config).layers
    for index, layer in enumerate(declared):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise refuse(index, f"keeps a {type(layer).__name__}, not plain keys and values")
    cache = DynamicCache()
    with torch.no_grad():
        embeds = base.embed(torch.zeros(1, 2, dtype=torch.long, device=base.device))
        positions = torch.arange(2, device=base.device)[None]
        base.run_decoder(embeds, positions=positions, cache=cache, mask=torch.ones_like(positions))
    count = len(base.layers)
    for index in range(count):
        if index >= len(cache.layers) or getattr(cache.layers[index], "keys", None) is None:
            raise refuse(index, "leaves no keys and values of its own in the cache")
    layers = []
    for index, layer in enumerate(cache.layers):
        window = getattr(declared[index], "sliding_window", None) if index < len(declared) else None
        layers.append(
            LayerSpec(
                num_kv_heads=layer.keys.shape[1],
                head_dim=layer.keys.shape[3],
                value_dim=layer.values.shape[3],
                window=window,
            )
        )
    return ModelSpec(
        model_type=model_type,
        hidden_size=config.hidden_size,
        embed_size=base.embedding.weight.shape[1],
        vocab_size=base.embedding.weight.shape[0],
        max_positions=_max_positions(config),
        num_parameters=_num_parameters(base.model),
        layers=tuple(layers),
    )


def _max_positions(config: Any) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None


@contextmanager
def _gather_before_head(head: nn.Module, select: Tensor | None) -> Iterator[None]:
    if select is None:
        yield
        return

    def gather(module: nn.Module, args: tuple[Any, ...]) -> Any:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, select)[None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
