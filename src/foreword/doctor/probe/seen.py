"""One attention call in a few numbers, and the measure by which two tensors are compared."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foreword.doctor.probe.attention import AttentionCall


@dataclass(frozen=True, slots=True)
class Seen:
    """What one layer's attention saw of a single row of T text tokens."""

    text_tokens: int
    """T."""
    num_queries: int
    num_keys: int
    extra: int
    """Keys beside the text's, whether or not any query may see them."""
    visible: int
    """Of these, how many some text token's query may see."""
    mass: float
    """Mean share of the text's attention on them."""
    blind_tokens: int
    """Text tokens whose query may not see their own key."""
    is_blank: bool
    """Whether all values in front of the text are zero."""

    @property
    def outside(self) -> int:
        """Keys beside the text's that no query of this forward made: those of a cache."""
        return max(0, (self.visible or self.extra) - (self.num_queries - self.text_tokens))


def summarise(call: AttentionCall, text_tokens: int) -> Seen:
    """Return what an attention over a single row saw; its text's keys are the last `text_tokens`."""
    extra = max(0, call.num_keys - text_tokens)
    shares = call.weights[0, :, -text_tokens:, :extra].sum(-1)
    own = call.visible[0, -text_tokens:, -text_tokens:].diagonal()
    return Seen(
        text_tokens=text_tokens,
        num_queries=call.num_queries,
        num_keys=call.num_keys,
        extra=extra,
        visible=int(call.visible[0, -text_tokens:, :extra].any(0).sum()),
        mass=float(shares.mean()) if extra else 0.0,
        blind_tokens=int((~own).sum()),
        is_blank=extra > 0 and call.values is not None and not bool(call.values[0, :, :extra].any()),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected."""
    want = expected.float()
    return float((found.float().to(want.device) - want).norm() / want.norm().clamp_min(1e-12))
