"""What attention really sees, watched from outside: queries, keys, values and weights of every attention of a forward.

The calls are caught where they enter torch (a `TorchFunctionMode`), so that nothing has to be known of the model and a
black box of Python can be watched as well. Fused attention and the matmul-softmax-matmul form are understood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

VISIBLE = -5e3
"""A score below it is masked: masks are written as -inf, the dtype's least number, -1e9 or -1e4; real scores lie
within a few hundred of zero."""
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm}
SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax, torch._softmax}


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention over a batch, as it was computed."""

    keys: Tensor | None
    """[B, Hkv or H, K, Dh], positions applied; None where they could not be seen."""
    values: Tensor | None
    """[B, Hkv or H, K, Dv], or None."""
    weights: Tensor
    """[B, H, Q, K], float32."""
    visible: Tensor
    """[B, Q, K]: whether any head's query may see the key."""

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.weights.shape[2]

    @property
    def num_keys(self) -> int:
        """K, with masked ones."""
        return self.weights.shape[3]


class AttentionWatch(TorchFunctionMode):
    """While active, `calls` fills with every attention that is computed.

    `dropout=False` leaves all dropout out of what runs inside, without a change of any module.
    """

    def __init__(self, *, dropout: bool = True, keep: bool = True) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []
        self._dropout, self._keep = dropout, keep
        self._product: tuple[Tensor, Tensor] | None = None
        self._pending: tuple[Tensor | None, Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let a torch function run, and keep what it shows of an attention."""
        kwargs = dict(kwargs or {})
        if not self._dropout and func in (F.dropout, torch.dropout):
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            return self._fused(func, args, kwargs)
        result = func(*args, **kwargs)
        if self._keep and func in SOFTMAXES:
            self._softmax(args[0] if args else kwargs["input"], result)
        elif self._keep and func in PRODUCTS:
            left, right = args[-2:] if len(args) >= 2 else (kwargs.get("batch1"), kwargs.get("batch2"))
            if isinstance(left, Tensor) and isinstance(right, Tensor):
                self._multiplied(left, right)
        return result

    def _fused(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        if not self._dropout:
            given["dropout_p"] = 0.0
        if self._keep:
            self.calls.append(_explain(given))
        return func(**given)

    def _softmax(self, scores: Tensor, weights: Tensor) -> None:
        if scores.ndim != 4 or not isinstance(weights, Tensor):
            return
        keys = None
        if self._product is not None and self._product[1].shape[-1] == scores.shape[-1]:
            right = self._product[1].detach()  # [.., Dh, K]
            keys = _as_heads(right.transpose(-1, -2), scores.shape[0])
        self._pending = keys, scores.detach(), weights.detach()
        self._emit(None)

    def _emit(self, values: Tensor | None) -> None:
        if self._pending is None:
            return
        keys, scores, weights = self._pending
        visible = (scores > VISIBLE).any(1)
        call = AttentionCall(keys=keys, values=values, weights=weights.float(), visible=visible)
        if values is None:
            self.calls.append(call)
        else:
            self.calls[-1] = call
            self._pending = None

    def _multiplied(self, left: Tensor, right: Tensor) -> None:
        pending = self._pending
        if pending is not None:
            weights = pending[2]
            same = left.numel() == weights.numel() and left.shape[-2:] == weights.shape[-2:]
            if same and right.shape[-2] == weights.shape[-1]:
                self._emit(_as_heads(right.detach(), weights.shape[0]))
                return
        if left.ndim >= 3 and right.ndim >= 3:
            self._product = (left, right)


def _as_heads(rows: Tensor, batch: int) -> Tensor | None:
    """Return [B, heads, K, Dh] of rows that may have batch and heads folded together."""
    if rows.ndim == 4:
        return rows
    return rows.reshape(batch, -1, *rows.shape[1:]) if rows.ndim == 3 and rows.shape[0] % batch == 0 else None


def _explain(given: dict[str, Any]) -> AttentionCall:
    """Compute the weights that a fused attention uses."""
    query, key, value = (given[name].detach() for name in ("query", "key", "value"))
    mask = given.get("attn_mask")
    wide = key if key.shape[1] == query.shape[1] else key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = given.get("scale") or query.shape[-1] ** -0.5
    scores = query.float() @ wide.float().transpose(-1, -2) * scale
    if given.get("is_causal"):
        scores = scores.masked_fill(~torch.ones_like(scores[0, 0], dtype=torch.bool).tril(), float("-inf"))
    if isinstance(mask, Tensor):
        mask = mask.detach()
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a row that sees nothing has no weights
    return AttentionCall(keys=key, values=value, weights=weights, visible=(scores > VISIBLE).any(1))
