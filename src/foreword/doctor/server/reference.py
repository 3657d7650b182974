"""A base that is trusted, from its folder: the tokenizer of training, and what the plain base answers.

Importing this file imports no torch; the tokenizer needs none either. The model is loaded when it is first asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from foreword.core.conformance import TOP
from foreword.doctor.server.visit import Logprobs
from foreword.errors import ConfigError


def load_tokenizer(base: str) -> Any:
    """Return the base's tokenizer. Raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded from {base!r}: {str(error).splitlines()[0]}",
            hint="Give the folder of the base, or its hub id.",
        ) from error


def plain_logprobs(base: str, *, dtype: str = "auto", device: str = "cpu") -> Callable[[Sequence[int]], Logprobs]:
    """Return a function: ids -> the plain base's best next tokens with their log-probabilities, in nats."""
    loaded: list[Any] = []

    def ask(ids: Sequence[int]) -> Logprobs:
        import torch

        from foreword.core.forward import forward_rows
        from foreword.core.model import load_base

        if not loaded:
            loaded.append(load_base(base, dtype=dtype, device=device))  # type: ignore[arg-type]  # it checks the dtype
        with torch.no_grad():
            logits = forward_rows(loaded[0], [list(ids)], [None])[0, -1]
        best = torch.topk(torch.log_softmax(logits.float(), -1).cpu(), TOP)
        return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    return ask
