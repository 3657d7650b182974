"""Small pieces of sentences: lists, counts, amounts, names."""

from __future__ import annotations

from collections.abc import Sequence

from foreword.advise.cost.quantity import human
from foreword.advise.decide import Standing

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

NOUNS = {
    "hard_text": "the hard text prompt",
    "few_shot": "few-shot prompting",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning in its hidden-state form",
    "kv": "prefix tuning in its KV form",
    "compiled_prompt": "a compiled prompt",
    "cartridge": "a cartridge",
    "lora": "LoRA",
    "adapter": "adapter tuning",
    "ia3": "(IA)³",
    "full": "full fine-tuning",
}


def spelled(count: int) -> str:
    """Return a small count as a word, a larger one in digits."""
    return NUMBERS[count] if 0 <= count < len(NUMBERS) else f"{count:,}"


def joined(items: Sequence[str], last: str = "and") -> str:
    """Return `a, b and c`."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


def counted(count: int, noun: str) -> str:
    """Return `1 task`, `12 tasks`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def noun(method: str) -> str:
    """Return what a method is called within a sentence."""
    return NOUNS[method]


def capital(text: str) -> str:
    """Return a text that begins a sentence."""
    return text[:1].upper() + text[1:]


def amount(value: float) -> str:
    """Return bytes as text."""
    return human(value, "bytes")


def time(seconds: float) -> str:
    """Return seconds as text."""
    return human(seconds, "s")


def hours(value: float) -> str:
    """Return hours as text, in the unit that reads best."""
    if value >= 48:
        return f"{value / 24:.3g} days"
    if value >= 2:
        return f"{value:.3g} hours"
    return f"{value * 60:.3g} minutes" if value >= 1 / 60 else f"{value * 3600:.3g} seconds"


def times(ratio: float) -> str:
    """Return a ratio in words: `12 times`, `1.5 times`."""
    if ratio >= 999_500:
        return f"{ratio / 1e6:.2g} million times"
    digits = max(0, len(f"{ratio:.0f}") - 3)
    return f"{round(ratio, -digits):,.0f} times" if ratio >= 9.95 else f"{ratio:.2g} times"


def quantity(standing: Standing, key: str) -> str:
    """Return one of a method's numbers as text; a dash where it cannot be had."""
    found = standing.effects.cost.quantities[key]
    return "-" if found is None else found.human()


def number(standing: Standing, key: str) -> float:
    """Return one of a method's numbers; 0 where it cannot be had."""
    return standing.effects.cost.value(key) or 0.0
