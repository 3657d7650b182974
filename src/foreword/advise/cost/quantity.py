"""A number with its unit, the formula that it comes from, and the formula with this base's numbers put in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["bytes", "s", "hours", "FLOP", "tokens", "parameters", "share"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One number of an advice."""

    value: float
    unit: Unit
    formula: str
    """In letters: `2·L·P·Hkv·Dh·b`; or, where the value is 0 by nature, why."""
    worked: str
    """The formula with numbers, and the result: `2·64·20·8·128·2 = 5.24 MB`."""

    def human(self) -> str:
        """Return the value with its unit, to three digits: decimal KB, MB, GB; µs, ms, s; FLOP; per cent."""
        return human(self.value, self.unit)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "value": self.value,
            "unit": self.unit,
            "human": self.human(),
            "formula": self.formula,
            "worked": self.worked,
        }


def quantity(value: float, unit: Unit, formula: str, numbers: str = "") -> Quantity:
    """Return a quantity whose `worked` is `numbers` followed by the value; without numbers, the value alone."""
    shown = human(value, unit)
    return Quantity(value=value, unit=unit, formula=formula, worked=f"{numbers} = {shown}" if numbers else shown)


def human(value: float, unit: Unit) -> str:
    """Return a value in its unit to three digits, in decimal steps."""
    if unit == "bytes":
        return _scaled(value, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1)))
    if unit == "FLOP":
        names = ("EFLOP", "PFLOP", "TFLOP", "GFLOP", "MFLOP", "FLOP")
        return _scaled(value, tuple(zip(names, (1e18, 1e15, 1e12, 1e9, 1e6, 1), strict=True)))
    if unit == "s":
        return _show_seconds(value)
    if unit == "hours":
        return f"{three_digits(value)} h"
    if unit == "share":
        return f"{three_digits(value * 100)} %"
    if abs(value) < 1e7:
        return f"{value:,.0f} {unit}" if float(value).is_integer() else f"{three_digits(value)} {unit}"
    return _scaled(value, ((f"trillion {unit}", 1e12), (f"billion {unit}", 1e9), (f"million {unit}", 1e6)))


def three_digits(value: float) -> str:
    """Return a number to three significant digits, never in powers of ten, without trailing zeros."""
    if value == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(value)))
    text = f"{round(value, places):,.{max(0, places)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def show_number(value: float) -> str:
    """Return a number as in a worked formula: whole below ten million, else as 3.28·10^10, to four digits."""
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}·10^{int(exponent)}"
    return str(int(value)) if float(value).is_integer() else f"{value:.4g}"


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str:
    for unit, size in units:
        if abs(value) >= size * 0.9995:
            return f"{three_digits(value / size)} {unit}"
    unit, size = units[-1]
    return f"{three_digits(value / size)} {unit}"


def _show_seconds(value: float) -> str:
    size = abs(value)
    if size >= 7200:
        return f"{three_digits(value / 3600)} h"
    if size >= 120:
        return f"{three_digits(value / 60)} min"
    return "0 s" if value == 0 else _scaled(value, (("s", 1), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)))
