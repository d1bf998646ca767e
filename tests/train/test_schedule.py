"""The learning rate at hand-computed steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from modelyard.config.optimizer import LearningRateConfig
from modelyard.train.schedule import learning_rate


def rates(steps: list[int], **settings: Any) -> list[float]:
    config = LearningRateConfig(**settings)
    return [learning_rate(config, step) for step in steps]


def test_constant_stays_for_ever() -> None:
    assert rates([1, 2, 10**9], base=3e-4) == [3e-4] * 3
    assert rates([1, 10**9], base=3e-4, minimum=1e-5, decay_iterations=10) == [3e-4] * 2


def test_the_warmup_starts_above_zero_and_ends_at_base() -> None:
    assert rates([1, 2, 5, 9, 10, 11], base=1.0, warmup_iterations=10) == [0.1, 0.2, 0.5, 0.9, 1.0, 1.0]
    assert rates([1], base=6e-4, warmup_iterations=2000) == [pytest.approx(3e-7, rel=1e-12)]


@pytest.mark.parametrize("style", ["linear", "power"])
def test_linear_and_power_are_one_shape(style: str) -> None:
    settings = {
        "base": 1.0,
        "minimum": 0.2,
        "decay_style": style,
        "warmup_iterations": 10,
        "decay_iterations": 110,
    }
    # decay_iterations is the absolute end: halfway from 10 to 110 is 60.
    assert rates([5, 10, 60, 110, 111, 10**6], **settings) == pytest.approx([0.5, 1.0, 0.6, 0.2, 0.2, 0.2])
    assert rates([35, 60], decay_power=2.0, **settings) == pytest.approx([1 - 0.8 / 16, 1 - 0.8 / 4])


def test_cosine() -> None:
    settings = {
        "base": 6e-4,
        "minimum": 6e-5,
        "decay_style": "cosine",
        "warmup_iterations": 2000,
        "decay_iterations": 100_000,
    }
    quarter = 6e-5 + 5.4e-4 * (1 + math.cos(math.pi / 4)) / 2
    assert rates([2000, 26_500, 51_000, 100_000, 100_001], **settings) == pytest.approx(
        [6e-4, quarter, 3.3e-4, 6e-5, 6e-5], rel=1e-12
    )
    # The power bends the way before the cosine does: c = 1/2, c^2 = 1/4.
    assert rates([51_000], decay_power=2.0, **settings) == pytest.approx([quarter], rel=1e-12)


def test_warmup_stable_decay() -> None:
    settings = {
        "base": 1.0, "minimum": 0.1, "decay_style": "wsd", "warmup_iterations": 10,
        "decay_start_iteration": 80, "decay_iterations": 100,
    }  # fmt: skip
    assert rates([1, 10, 50, 80, 81, 90, 100, 1000], **settings) == pytest.approx(
        [0.1, 1.0, 1.0, 1.0, 0.955, 0.55, 0.1, 0.1]
    )
    # 1 - sqrt: a quarter of the way loses half.
    assert rates([85], decay_power=0.5, **settings) == pytest.approx([0.55])


def test_stages_in_one_line() -> None:
    line = "linear,10,0,1; constant,70,1; cosine,20,1,0.1"
    assert rates([1, 5, 10, 11, 80, 90, 100, 500], schedule=line) == pytest.approx(
        [0.1, 0.5, 1.0, 1.0, 1.0, 0.55, 0.1, 0.1]
    )
    assert rates([1, 10, 20, 10**9], schedule="power,10,1,0,2;constant,-1,0.5") == pytest.approx(
        [0.99, 0.0, 0.5, 0.5]
    )


def test_a_schedule_says_the_same_as_the_keys() -> None:
    keys = LearningRateConfig(
        base=1e-3, minimum=1e-5, decay_style="cosine", warmup_iterations=7, decay_iterations=40
    )
    line = LearningRateConfig(schedule="linear,7,0,1e-3;cosine,33,1e-3,1e-5")
    for step in range(1, 60):
        assert learning_rate(line, step) == pytest.approx(learning_rate(keys, step), rel=1e-12)


def test_the_rate_never_leaves_its_bounds() -> None:
    for style in ("linear", "power", "cosine"):
        config = LearningRateConfig(
            base=1.0,
            minimum=0.3,
            decay_style=style,
            warmup_iterations=3,
            decay_iterations=17,
            decay_power=1.7,  # type: ignore[arg-type]
        )
        values = [learning_rate(config, step) for step in range(1, 40)]
        assert max(values) == 1.0
        assert values[2:] == sorted(values[2:], reverse=True)
        assert values[-1] == 0.3
