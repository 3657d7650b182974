"""Sizes and durations as people write them, read into bytes and seconds."""

from __future__ import annotations

import re

SIZES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
"""Bytes in a unit; decimal KB, binary KiB."""
SECONDS = {
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "second": 1.0,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hour": 3600.0,
    "day": 86400.0,
    "week": 604800.0,
}
"""Seconds in a unit; a plural s is taken off first."""
AMOUNT = re.compile(r"\s*([0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµ]*)\s*")


def parse_bytes(text: str) -> float:
    """Return the bytes that a text such as `20 MB` or `512 KiB` means. Raises ValueError."""
    value, unit = _split(text)
    if unit.lower() not in SIZES:
        raise ValueError("its unit is none of B, KB, MB, GB, TB, KiB, MiB, GiB, TiB")
    return value * SIZES[unit.lower()]


def parse_seconds(text: str) -> float:
    """Return the seconds that a text such as `1 day`, `90 min` or `5 ms` means. Raises ValueError."""
    value, unit = _split(text)
    name = unit.lower()
    if name not in SECONDS:
        name = name.removesuffix("s")
    if name not in SECONDS:
        raise ValueError("its unit is none of us, ms, s, min, hours, days, weeks")
    return value * SECONDS[name]


def _split(text: str) -> tuple[float, str]:
    match = AMOUNT.fullmatch(text)
    if not match:
        raise ValueError("it is not a number and a unit")
    return float(match[1].replace(",", "")), match[2]
