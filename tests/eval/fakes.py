"""A tokenizer of characters and engines without a model: every answer follows from the request alone."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from foreword.config import TaskConfig
from foreword.engine.request import Completion, FinishReason, Output, Request, TokenLogprob
from foreword.eval.tasks import Task

END = 3


class CharTokenizer:
    """One token per character (its code point), `<`, `>` and the end token 3 between the turns of a chat."""

    bos_token = chr(1)  # known, but in front of nothing, as in Qwen's own files
    bos_token_id = 1
    eos_token_id = END
    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True, return_offsets_mapping: bool = False) -> Any:
        offsets = [(place, place + 1) for place in range(len(text))]
        return SimpleNamespace(input_ids=[ord(char) for char in text], offset_mapping=offsets)

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        text = "".join(f"<{turn['role']}>{turn['content']}{chr(END)}" for turn in messages)
        return text + "<assistant>" if add_generation_prompt else text

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def said(text: str, reason: FinishReason = "stop", logprobs: tuple[TokenLogprob, ...] = ()) -> Output:
    ids = tuple(map(ord, text))
    completion = Completion(text=text, token_ids=ids, finish_reason=reason, logprobs=logprobs)
    return Output(completions=(completion,), num_prompt_tokens=1)


def next_token_shares(ids: Sequence[int], allowed: Sequence[int]) -> dict[int, float]:
    """The fake model: a peaked random distribution over the allowed tokens, by the sequence before them."""
    rng = random.Random(repr(list(ids)))
    masses = {token: math.exp(4 * rng.gauss(0, 1)) for token in sorted(allowed)}
    total = sum(masses.values())
    return {token: mass / total for token, mass in masses.items()}


def random_model(requests: Sequence[Request]) -> list[Output]:
    """Answer constrained one-token requests from `next_token_shares`."""
    outputs = []
    for request in requests:
        assert request.max_tokens == 1 and request.ignore_eos and request.prompt_ids and request.allowed_ids
        shares = next_token_shares(request.prompt_ids, request.allowed_ids)
        best = max(shares, key=lambda token: shares[token])
        top = {token: math.log(share) for token, share in shares.items()}
        step = TokenLogprob(token_id=best, logprob=top[best], top=top)
        outputs.append(said(chr(best), "length", (step,)))
    return outputs


def answering(answer: Callable[[Request], str]) -> Callable[[Sequence[Request]], list[Output]]:
    """An engine that answers each request with a function's text."""
    return lambda requests: [said(answer(request)) for request in requests]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_task(folder: Path, rows: Sequence[Any], train: Sequence[Any] | None = None, **config: Any) -> Task:
    """A task with `rows` as test and, where not given, as training data."""
    test = write_rows(folder / "test.jsonl", rows)
    path = write_rows(folder / "train.jsonl", rows if train is None else train)
    return Task(TaskConfig(**{"name": "t", "train": str(path), "test": str(test), **config}))
