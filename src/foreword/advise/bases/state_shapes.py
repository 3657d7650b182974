"""Sizes of state-space layers: Mamba, Mamba 2, and Jamba's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSizes:
    """One state-space layer."""

    inner_size: int
    linears: tuple[tuple[str, int, int, bool], ...]
    """Name, in_size, out_size, bias."""
    other_elements: int
    """Parameters that are no linear map: convolution, decay, skip, inner norms."""
    state_elements: int
    """Numbers that one sequence keeps: the last inputs of the convolution, and the state."""


def state_sizes(config: Mapping[str, Any], model_type: str, hidden: int) -> StateSizes | None:
    """Return the sizes of a family's state-space layers, None where it has none or they are not known."""
    if model_type == "mamba2":
        return _mamba2(config, hidden)
    if model_type in ("mamba", "falcon_mamba"):
        return _mamba(
            hidden,
            inner=_number(config, "intermediate_size", _number(config, "expand", 2) * hidden),
            state=_number(config, "state_size", 16),
            kernel=_number(config, "conv_kernel", 4),
            rank=_rank(config.get("time_step_rank"), hidden),
            bias=bool(config.get("use_bias", False)),
            conv_bias=bool(config.get("use_conv_bias", True)),
            has_norms=False,
        )
    if model_type == "jamba":
        return _mamba(
            hidden,
            inner=_number(config, "mamba_expand", 2) * hidden,
            state=_number(config, "mamba_d_state", 16),
            kernel=_number(config, "mamba_d_conv", 4),
            rank=_rank(config.get("mamba_dt_rank"), hidden),
            bias=bool(config.get("mamba_proj_bias", False)),
            conv_bias=bool(config.get("mamba_conv_bias", True)),
            has_norms=True,
        )
    return None


def _mamba(
    hidden: int, *, inner: int, state: int, kernel: int, rank: int, bias: bool, conv_bias: bool, has_norms: bool
) -> StateSizes:
    return StateSizes(
        inner_size=inner,
        linears=(
            ("in_proj", hidden, 2 * inner, bias),
            ("x_proj", inner, rank + 2 * state, False),
            ("dt_proj", rank, inner, True),
            ("out_proj", inner, hidden, bias),
        ),
        other_elements=inner * (kernel + int(conv_bias) + state + 1) + (rank + 2 * state) * int(has_norms),
        state_elements=inner * (kernel + state),
    )


def _mamba2(config: Mapping[str, Any], hidden: int) -> StateSizes:
    inner = _number(config, "expand", 2) * hidden
    heads, head_dim = _number(config, "num_heads", 128), _number(config, "head_dim", 64)
    groups, state = _number(config, "n_groups", 8), _number(config, "state_size", 128)
    kernel, bias = _number(config, "conv_kernel", 4), bool(config.get("use_bias", False))
    channels = inner + 2 * groups * state
    conv = channels * (kernel + int(bool(config.get("use_conv_bias", True))))
    return StateSizes(
        inner_size=inner,
        linears=(("in_proj", hidden, inner + channels + heads, bias), ("out_proj", inner, hidden, bias)),
        other_elements=conv + 3 * heads + inner,
        state_elements=channels * kernel + heads * head_dim * state,
    )


def _number(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    return default if value is None else int(value)


def _rank(value: Any, hidden: int) -> int:
    return value if isinstance(value, int) else math.ceil(hidden / 16)
