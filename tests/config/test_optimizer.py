"""Learning-rate schedules that cannot be are refused where they are read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from modelyard.config.optimizer import LearningRateConfig, OptimizerConfig, Stage


def problem(**settings: Any) -> str:
    with pytest.raises(ValidationError) as raised:
        LearningRateConfig(**settings)
    return str(raised.value.errors()[0]["ctx"]["error"])


def test_impossible_decays() -> None:
    assert (
        problem(decay_style="cosine")
        == "decay_style cosine needs decay_iterations (the step at which the decay ends)"
    )
    assert problem(decay_style="linear", decay_iterations=100, warmup_iterations=100).startswith(
        "decay_iterations 100 is not after warmup_iterations 100; it is the absolute step"
    )
    assert problem(decay_style="linear", decay_iterations=9, minimum=1.0) == "minimum 1 is above base 0.0001"
    assert problem(decay_style="wsd", decay_iterations=9).startswith(
        "decay_style wsd needs decay_start_iteration"
    )
    assert problem(decay_style="wsd", decay_iterations=9, decay_start_iteration=9).startswith(
        "decay_start_iteration 9 is not before decay_iterations 9"
    )
    assert problem(
        decay_style="wsd", decay_iterations=9, decay_start_iteration=3, warmup_iterations=5
    ).startswith("decay_start_iteration 3 lies inside the warm-up")
    assert (
        problem(decay_start_iteration=3) == "decay_start_iteration belongs to decay_style wsd, not constant"
    )


def test_every_problem_of_a_decay_at_once() -> None:
    assert len(problem(decay_style="wsd", minimum=1.0).splitlines()) == 3


def test_a_schedule_taken_apart() -> None:
    config = LearningRateConfig(schedule="linear, 2_000, 0, 6e-4; constant,-1,6e-4")
    assert config.stages() == [
        Stage("linear", 2000, 0.0, 6e-4, 1.0),
        Stage("constant", None, 6e-4, 6e-4, 1.0),
    ]
    assert LearningRateConfig(schedule="power,5,1,0.5,2;").stages() == [Stage("power", 5, 1.0, 0.5, 2.0)]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("cosin,5,1,0", "'cosin' is not a shape (constant, linear, power, cosine)"),
        ("linear,5", "is not `shape,steps,rate[,end_rate[,power]]`"),
        ("linear,x,1,0", "is not `shape,steps,rate[,end_rate[,power]]`"),
        ("linear,5,1", "a linear stage needs an end_rate and a number of steps"),
        ("linear,-1,1,0", "a linear stage needs an end_rate and a number of steps"),
        ("constant,5,1,2", "a constant stage has one rate"),
        ("constant,0,1", "steps must not be 0"),
        ("constant,-1,1;constant,5,1", "only the last stage may go on for ever"),
        ("", "there is no stage in it"),
    ],
)
def test_schedules_that_cannot_be_read(schedule: str, words: str) -> None:
    assert words in problem(schedule=schedule)


def test_a_schedule_replaces_the_other_keys() -> None:
    assert problem(schedule="constant,-1,1", base=1e-3, warmup_iterations=5) == (
        "schedule describes the whole learning rate; remove base, warmup_iterations, or remove schedule"
    )


def test_clipping_can_be_off() -> None:
    assert OptimizerConfig(gradient_norm_clipping=0.0).gradient_norm_clipping == 0
