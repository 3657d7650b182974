"""What access refuses, with ConfigError: limits, rights, fractions, URLs and numbers that are none."""

from __future__ import annotations

import re

from foreword.errors import ConfigError, did_you_mean
from foreword.registry.access_records import ALL_TASKS, Limits
from foreword.registry.records import check_name, is_text

RIGHTS = ("call", "manage")
ROUTES = ("canary", "shadow")
MAX_LIMIT = 10**15
MAX_ROWS = 10_000
_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")


def check_limits(limits: Limits) -> None:
    """Refuse limits that are no whole numbers of 1 or more."""
    for name, value in limits.to_json().items():
        if value is not None and not (type(value) is int and 1 <= value <= MAX_LIMIT):
            raise ConfigError(f"{name} is {value!r}", hint="Give a whole number of 1 or more, or none for no limit.")


def check_grant(task: str, right: str) -> None:
    """Refuse what is neither a task's name nor "*", and unknown rights."""
    if task != ALL_TASKS:
        check_name(task, "task")
    if right not in RIGHTS:
        raise ConfigError(f"no right {right!r:.80}", hint=did_you_mean(str(right), RIGHTS))


def check_kind(kind: str) -> None:
    """Refuse unknown kinds of route."""
    if kind not in ROUTES:
        raise ConfigError(f"no kind of route {kind!r:.80}", hint=did_you_mean(str(kind), ROUTES))


def check_fraction(fraction: float) -> None:
    """Refuse what is not above 0 and at most 1."""
    if not (isinstance(fraction, int | float) and 0 < fraction <= 1):
        raise ConfigError(f"a fraction of {fraction}", hint="Give more than 0 and at most 1.")


def check_label(text: str, what: str, *, at_least: int = 0) -> None:
    """Refuse what is no text, or longer than 200 characters."""
    if not is_text(text) or not at_least <= len(text) <= 200:
        raise ConfigError(f"{what} is {text!r:.100}", hint=f"Give a text of {at_least} to 200 characters.")


def check_url(url: str) -> str:
    """Return a replica's URL without a slash at the end; refuse any other."""
    if not is_text(url) or len(url) > 500 or not _URL.fullmatch(url):
        raise ConfigError(f"{url!r:.100} is no replica's URL", hint="Give it as http://host:port.")
    return url.rstrip("/")


def check_num_rows(limit: int) -> None:
    """Refuse to return none, or more rows than anybody reads."""
    if not 1 <= limit <= MAX_ROWS:
        raise ConfigError(f"a limit of {limit} rows", hint=f"Give 1 to {MAX_ROWS}.")
