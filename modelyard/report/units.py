"""Numbers as people read them, with their units; an unknown one (None, NaN) is a dash."""

from __future__ import annotations

import math

from modelyard.config.disk import size as size_of

UNKNOWN = "–"
_DECIMAL = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _unknown(value: float | None) -> bool:
    return value is None or math.isnan(value)


def quantity(value: float | None, unit: str = "") -> str:
    """1234567, "tokens/s" → "1.23 M tokens/s": three digits and a decimal prefix."""
    if value is None or _unknown(value):
        return UNKNOWN
    factor, prefix = next(((f, p) for f, p in _DECIMAL if abs(value) >= 0.9995 * f), (1, ""))
    return f"{_three_digits(value / factor)} {prefix}{' ' if prefix and unit else ''}{unit}".strip()


def flops(value: float | None) -> str:
    """1.5e12 → "1.5 TFLOP/s"."""
    text = quantity(value)
    return text if text == UNKNOWN else f"{text}{'' if text[-1].isalpha() else ' '}FLOP/s"


def size(value: float | None) -> str:
    """3.4 * 2**30 → "3.4 GiB"."""
    return UNKNOWN if value is None or _unknown(value) else size_of(value)


def share(value: float | None) -> str:
    """0.0123 → "1.2%"."""
    if value is None or _unknown(value):
        return UNKNOWN
    return "< 0.1%" if 0 < value < 0.0005 else f"{value:.1%}"


def duration(value: float | None) -> str:
    """Seconds → "2 d 3 h", "1 h 5 min", "12 min 4 s", "8.3 s", "45 ms": two units at most."""
    if value is None or _unknown(value):
        return UNKNOWN
    if value < 0.9995:
        return f"{_three_digits(value * 1e3)} ms" if value else "0 s"
    if value < 59.95:
        return f"{_three_digits(value)} s"
    seconds = round(value)
    if seconds >= 86400:
        hours = round(seconds / 3600)
        return f"{hours // 24} d {hours % 24} h"
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds // 60} min {seconds % 60} s"


def _three_digits(value: float) -> str:
    digits = 3 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
