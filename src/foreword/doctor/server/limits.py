"""Limits and defaults: is the prefix counted in the context, and are sampling settings those that were asked for?"""

from __future__ import annotations

import re
from typing import Any

from foreword.core.conformance import TOP
from foreword.doctor.finding import Finding
from foreword.doctor.server.client import Answer, Refused
from foreword.doctor.server.shape import setting_between
from foreword.doctor.server.visit import SHORT_TOKENS, Visit

NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Every setting that a server might have another default for, at the value that changes nothing."""
SEEDS = (11, 12, 13, 14)
DRAWN = 12
GREEDY_TOKENS, LONG_TOKENS = 10, 32
SETTINGS_FIX = "Send sampling parameters with each request, or take the server's own defaults out (generation_config)."


def check_context(visit: Visit) -> Finding:
    """Ask for one position more than the base has, counted with the vectors: the answer must be a 400 with the numbers.

    A server that forgets the vectors takes the request, and fails or cuts it when the last positions are reached. The
    request is streamed and ended at its first token, so it costs no more than a short one.
    """
    name = f"{visit.model} context"
    if visit.version is None or visit.version.header.spec.max_positions is None:
        return _needs(name, "the base's number of positions and P, which a registry's version tells")
    limit, block = visit.version.header.spec.max_positions, visit.version.num_positions
    ids = visit.fresh_ids(SHORT_TOKENS)
    said: list[str] = []
    for _ in range(2):
        wanted = limit + 1 - block - len(ids)
        if wanted < 1:
            return _needs(name, f"a context longer than {limit} positions")
        total = f"{block} of the block + {len(ids)} + {wanted} new = {limit + 1} positions"
        try:
            visit.server.first_token_s(visit.model, ids, max_tokens=wanted)
        except Refused as refusal:
            said.append(f"{total} of {limit}: {refusal.answered}, {refusal.message}")
            if refusal.answered >= 500:
                return _overflow(name, f"{total}, the limit is {limit}: answered with {refusal.answered}")
            lower = _limit_in(refusal.message, below=limit, above=block + len(ids))
            if lower is None:
                break
            limit = lower
        else:
            return _overflow(name, f"{total} are accepted, the limit is {limit}")
    numbers = [int(number) for number in re.findall(r"\d+", said[-1].partition(": ")[2])]
    helpful = "" if limit in numbers else "; its message does not name the limit"
    return Finding(check=name, ok=True, measured=said[-1][:300] + helpful, numbers={"limit": limit, "block": block})


def _limit_in(message: str, *, below: int, above: int) -> int | None:
    """Return a lower limit of the server's own that a refusal names, such as vLLM's --max-model-len."""
    found = re.search(r"(?:takes|context length is|max_model_len\D*|at most) (\d+)", message)
    number = int(found[1]) if found else 0
    return number if above < number < below else None


def _overflow(name: str, measured: str) -> Finding:
    return Finding(
        check=name,
        ok=False,
        measured=measured,
        expected="400 before anything is computed, with both numbers",
        fix="Check block + prompt + new tokens against the limit before the request is taken.",
        fault="context-overflow",
    )


def check_decoding(visit: Visit) -> Finding:
    """Compare what a request gets by default with what it gets when every setting is written out.

    Greedy tokens must be the best of their own log-probabilities and as many as were asked for; drawn tokens with one
    seed must be the same by default and with neutral settings, and the default length must be the version's own.
    """
    name = f"{visit.model} decoding"
    ids = visit.fresh_ids(SHORT_TOKENS)
    greedy = visit.server.complete(visit.model, ids, max_tokens=GREEDY_TOKENS)
    wrong = _not_greedy(greedy) or _default_length(visit, ids) or _penalised(visit, ids) or _default_draw(visit, ids)
    made = "greedy tokens are the best ones, default settings draw as neutral ones do"
    return Finding(
        check=name,
        ok=not wrong,
        measured=wrong or made,
        expected="settings as the request says, neutral where it says nothing",
        fix=SETTINGS_FIX,
        fault="decoding-drift" if wrong else "",
    )


def _not_greedy(answer: Answer) -> str:
    for place, (token, top) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        best = max(top.values())
        if top.get(token, -1e9) < best - 1e-3:
            return (
                f"at temperature 0, token {place + 1} of {len(answer.token_ids)} is {token} with log-probability "
                f"{top.get(token, float('nan')):.3g}, the best has {best:.3g}"
            )
    if len(answer.token_ids) != GREEDY_TOKENS:
        return (
            f"{len(answer.token_ids)} of {GREEDY_TOKENS} tokens with ignore_eos and no stop strings "
            f"(finish_reason {answer.finish_reason})"
        )
    return ""


def _penalised(visit: Visit, ids: list[int]) -> str:
    """Compare the last step of a long generation with the same tokens sent as a prompt: penalties are of answers."""
    answer = visit.server.complete(visit.model, ids, max_tokens=LONG_TOKENS)
    last = len(answer.token_ids) - 1
    if last < 1:
        return ""
    found = visit.server.next_logprobs(visit.model, [*ids, *answer.token_ids[:last]])[0]
    setting = setting_between(found, answer.logprobs[last], answer.token_ids[:last], visit.dtype)
    return (
        f"token {last + 1} of a generation differs from the same place of a prompt as under {setting}"
        if setting
        else ""
    )


def _default_length(visit: Visit, ids: list[int]) -> str:
    wanted = visit.version.header.max_new_tokens if visit.version else None
    if wanted is None:
        return ""
    found = len(visit.server.complete(visit.model, ids, max_tokens=None).token_ids)
    return "" if found == wanted else f"{found} new tokens by default, the version says {wanted}"


def _default_draw(visit: Visit, ids: list[int]) -> str:
    differing = 0
    for seed in SEEDS:
        fields = {"seed": seed, "max_tokens": DRAWN, "logprobs": TOP}
        default = visit.server.complete(visit.model, ids, **{**fields, "temperature": None})
        neutral = visit.server.complete(visit.model, ids, **{**fields, **NEUTRAL})
        if default.token_ids == neutral.token_ids:
            continue
        again = visit.server.complete(visit.model, ids, **{**fields, **NEUTRAL})
        if again.token_ids != neutral.token_ids:
            return ""  # seeds repeat nothing here: nothing can be said
        differing += 1
    if differing < len(SEEDS) / 2:  # one draw may lie on an edge that rounding moves
        return ""
    return f"with {differing} of {len(SEEDS)} seeds a request without settings draws other tokens than a neutral one"


def _needs(name: str, what: str) -> Finding:
    return Finding(check=name, ok=True, skipped=True, measured=f"needs {what}")
