"""Is a text turned into the tokens that the vectors were trained with? The tokenizer of training says. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foreword.core.template import TaskTemplate, encode_plain, render_chat
from foreword.doctor.finding import Finding
from foreword.doctor.server.client import Answer, Prompt, Refused
from foreword.doctor.server.visit import Visit
from foreword.errors import ForewordError

TEXTS = ("Where is my order 7,31?", "The café's invoice\nis  wrong (twice)", "zz")
FIRST, SECOND, THIRD = "Where is my order?", "It was sent on Monday.", "And the invoice?"


def check_rendering(visit: Visit) -> Finding:
    """Send texts and conversations, and the token ids that training would have made of them: the answers must agree.

    Where plain text to the plain base differs already, it is the tokenizer; where only the task's or the chat's does,
    it is the template; where only the second turn does, the vectors' place in a conversation.
    """
    name = f"{visit.model} rendering"
    if visit.tokenizer is None:
        return _needs(name, "the base's tokenizer as it was in training (--base)")
    if visit.version is None or not visit.version.header.template:
        return _needs(name, "a version with a template")
    try:
        cases = _cases(visit, TaskTemplate.from_json(visit.version.header.template))
    except ForewordError as error:
        return _needs(name, f"a template that this tokenizer renders: {error.message}")
    checked = []
    for what, fault, model, prompt, ids in cases:
        wrong = _differs(visit, model, prompt, ids)
        if wrong:
            return Finding(
                check=name,
                ok=False,
                measured=f"{what}: {wrong}",
                expected="the answer to the ids that training would have made of it",
                fix=_FIXES[fault],
                fault=fault,
            )
        checked.append(what)
    return Finding(check=name, ok=True, measured=f"as in training: {', '.join(dict.fromkeys(checked))}")


_FIXES = {
    "tokenizer-changed": "Serve with the tokenizer of training: compare tokenizer.json and its added tokens.",
    "template-drift": "Serve with the template in the artefact and the base's own chat template; pin both.",
    "injected-again": "Put the vectors in front of the first turn only.",
}


def _cases(visit: Visit, template: TaskTemplate) -> list[tuple[str, str, str, Prompt, list[int]]]:
    """Return what is sent as (what, the fault it proves, model, text or messages, the ids that it should become)."""
    tokenizer: Any = visit.tokenizer
    found: list[tuple[str, str, str, Prompt, list[int]]] = []
    if visit.base_name:
        texts = [(text, encode_plain(tokenizer, text)) for text in TEXTS]
        found += [("plain text", "tokenizer-changed", visit.base_name, text, ids) for text, ids in texts]
    if template.num_after:  # their rows stand between the tokens: no ids say the same
        return found
    found += [
        ("the task's text", "template-drift", visit.model, text, template.render(tokenizer, text).ids) for text in TEXTS
    ]
    one = [{"role": "user", "content": FIRST}]
    two = [*one, {"role": "assistant", "content": SECOND}, {"role": "user", "content": THIRD}]
    if visit.base_name and getattr(tokenizer, "chat_template", None):
        ids = encode_plain(tokenizer, render_chat(tokenizer, one))
        found.append(("the base's chat", "template-drift", visit.base_name, one, ids))
    if template.chat:
        for what, fault, turns in (("a chat", "template-drift", one), ("its second turn", "injected-again", two)):
            found.append((what, fault, visit.model, turns, template.render_messages(tokenizer, turns).ids))
    return found


def _differs(visit: Visit, model: str, prompt: Prompt, ids: Sequence[int]) -> str:
    try:
        as_text = visit.server.complete(model, prompt, max_tokens=2)
    except Refused as refusal:
        return f"refused: {refusal.message}"
    as_ids = visit.server.complete(model, ids, max_tokens=2)
    distance = visit.between([(as_text, as_ids)])
    counted, wanted = _prompt_tokens(as_text), _prompt_tokens(as_ids)
    if counted != wanted:
        return f"{counted} prompt tokens where training makes {wanted}; {distance.message} prompt"
    return "" if distance.ok else f"{distance.message} prompt of {len(ids)} tokens"


def _prompt_tokens(answer: Answer) -> int | None:
    count = answer.usage.get("prompt_tokens")
    return count if isinstance(count, int) else None


def _needs(name: str, what: str) -> Finding:
    return Finding(check=name, ok=True, skipped=True, measured=f"needs {what}")
