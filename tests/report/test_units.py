"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from modelyard.report import units


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 tokens"), (0.5, "0.5 tokens"), (999, "999 tokens"), (999.9, "1 k tokens"), (1234567, "1.23 M tokens"), (
        15e12,
        "15 T tokens",
    ), (None, "–"), (math.nan, "–")],
)  # fmt: skip
def test_quantity(value: float | None, text: str) -> None:
    assert units.quantity(value, "tokens") == text


def test_other_units() -> None:
    assert units.flops(1.5e12) == "1.5 TFLOP/s"
    assert units.flops(12) == "12 FLOP/s"
    assert units.flops(None) == "–"
    assert units.size(3.4 * 2**30) == "3.4 GiB"
    assert units.size(math.nan) == "–"
    assert units.share(0.0123) == "1.2%"
    assert units.share(0.0001) == "< 0.1%"
    assert units.share(0) == "0.0%"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.045, "45 ms"), (8.34, "8.34 s"), (59.97, "1 min 0 s"), (724, "12 min 4 s"), (3900, "1 h 5 min"), (
        86400 * 2 + 3600 * 3 + 100,
        "2 d 3 h",
    ), (86399, "24 h 0 min")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text
