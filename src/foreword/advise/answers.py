"""Answers to the questions of a form, checked one by one, and written as a constraints file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from foreword.advise.bases.find import KNOWN
from foreword.advise.constraints import DEFAULT_HARDWARE, from_tables, read_value
from foreword.advise.cost.hardware import find_hardware
from foreword.advise.questions import UNIT_MEANS, Question, questions
from foreword.errors import ConfigError

Ask = Callable[[str, str], str]
"""Takes the question and the default as text, returns the answer; an empty answer is the default."""
Say = Callable[[str], None]


def ask_all(ask: Ask, say: Say, given: Mapping[str, Any] | None = None, folder: Path | None = None) -> dict[str, Any]:
    """Ask every question and return the tables of a constraints file; `given` are the defaults, where they say so.

    A wrong answer is explained and asked again. Keys answered with their default are left out, so that a report lists
    them as assumed.
    """
    given = given or {}
    tables: dict[str, Any] = {"base": _ask_base(ask, say, given.get("base", {}), folder)}
    for question in questions():
        if question.table == "priorities":
            continue
        before = given.get(question.table, {}).get(question.name)
        shown = _shown(question, before if before is not None else question.default)
        label = f"{question.text} [{_means(question)}]"
        value = _until_right(ask, say, label, shown, partial(_answer, question))
        if value is not None and value != question.default:
            keep = before is not None and _read_or_none(question, before) == value
            tables.setdefault(question.table, {})[question.name] = before if keep else value
    if priorities := given.get("priorities"):
        tables["priorities"] = dict(priorities)
    hardware = dict(given.get("hardware", {}))
    if "known" in hardware or not hardware:
        name = hardware.get("known", DEFAULT_HARDWARE)
        label = "Which accelerator? [h100, h200, a100, l40s, cpu]"
        answered = _until_right(ask, say, label, name, _hardware_name)
        if answered != DEFAULT_HARDWARE or hardware:
            hardware["known"] = answered
    if hardware:
        tables["hardware"] = hardware
    return tables


def _hardware_name(text: str) -> str:
    find_hardware(text)
    return text


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Return tables of plain values as TOML text."""
    parts = []
    for name, table in tables.items():
        lines = [f"{key} = {_toml_value(value)}" for key, value in table.items()]
        parts.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(parts) + "\n"


def _ask_base(ask: Ask, say: Say, given: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    if given and not ({"known", "folder"} & given.keys()):
        return dict(given)
    default = str(given.get("known") or given.get("folder") or "")
    label = f"Which base? A folder with a config.json, or one of {', '.join(KNOWN)}"

    def read(text: str) -> dict[str, Any]:
        if not text:
            raise ConfigError("a base is needed", hint="Everything is counted from its shapes.")
        table = {"known": text} if text.lower() in KNOWN else {"folder": text}
        if "folder" in table and not ((folder or Path()) / text).is_dir():
            raise ConfigError(f"{text!r} is neither a known base nor a folder", hint=f"Known: {', '.join(KNOWN)}.")
        from_tables({"base": table}, folder=folder)
        return table

    table: dict[str, Any] = _until_right(ask, say, label, default, read)
    return table


def _until_right(ask: Ask, say: Say, label: str, default: str, read: Callable[[str], Any]) -> Any:
    while True:
        text = ask(label, default).strip() or default
        try:
            return read(text)
        except ConfigError as error:
            say(f"  {error.message}")
            if error.hint:
                say(f"  {error.hint}")


def _answer(question: Question, text: str) -> Any:
    if question.default is None and text.lower() in ("", "none", "no limit", "not known", "-"):
        return None
    return read_value(question, text)


def _read_or_none(question: Question, value: Any) -> Any:
    try:
        return read_value(question, value)
    except ConfigError:
        return None


def _shown(question: Question, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _means(question: Question) -> str:
    if question.choices:
        return " | ".join(question.choices)
    return "yes or no" if question.unit == "flag" else UNIT_MEANS[question.unit]


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        return str(value)
    return repr(float(value)) if value != int(value) or abs(value) > 1e15 else f"{value:.1f}"
