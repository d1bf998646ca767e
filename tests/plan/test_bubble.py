"""Pipelines played through, against what can be found by hand and the papers' formulas."""

from __future__ import annotations

import pytest

from modelyard.config.layout import Layout
from modelyard.plan.bubble import StageTime, enough_micro_batches, makespan

EQUAL = StageTime(1.0, 1.0, 1.0)


def whole(schedule: str, pipeline: int, turns: int, micro_batches: int, time: StageTime = EQUAL) -> float:
    layout = Layout(pipeline=pipeline, schedule=schedule, stages_per_process=turns)  # type: ignore[arg-type]
    return makespan(layout, micro_batches, [time] * layout.stages)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_one_stage_each(schedule: str) -> None:
    """Each of m micro-batches takes 3, and p - 1 more are filled and drained (arXiv 2104.04473, 2.2.1)."""
    assert whole(schedule, 4, 1, 8) == pytest.approx((8 + 3) * 3)


def test_interleaved() -> None:
    """The bubble is (p - 1) / v of a micro-batch's whole time (arXiv 2104.04473, 2.2.2)."""
    for turns in (2, 4):
        each = 3 * turns
        assert whole("interleaved", 4, turns, 8) == pytest.approx(8 * each + 3 / turns * each)


def test_fewer_micro_batches_than_processes() -> None:
    """One micro-batch is in one place at a time, however finely the layers are dealt out."""
    assert whole("interleaved", 4, 16, 1) == pytest.approx(4 * 16 * 3)
    assert whole("gpipe", 4, 1, 2) == pytest.approx((2 + 3) * 3)


def test_a_split_backward_fills_the_bubble() -> None:
    """ZB-V of the paper has none where the three parts take as long (arXiv 2401.10241, section 6); zero_bubble less than
    the same without the split."""
    assert whole("zbv", 4, 2, 16) == pytest.approx(16 * 6, rel=0.07)
    assert 8 * 6 <= whole("zero_bubble", 4, 2, 8) < whole("interleaved", 4, 2, 8)


def test_the_slowest_sets_the_pace() -> None:
    layout = Layout(pipeline=2)
    slow = StageTime(2.0, 2.0, 2.0)
    # By hand: forward 1 of the first, then the second is never without work, then the first's last backward of 2.
    assert makespan(layout, 4, [EQUAL, slow]) == pytest.approx(1 + 4 * 6 + 2)


def test_more_micro_batches_only_take_their_own_time() -> None:
    for schedule, turns in (("1f1b", 1), ("interleaved", 2), ("zero_bubble", 2), ("zbv", 2)):
        layout = Layout(pipeline=4, schedule=schedule, stages_per_process=turns)  # type: ignore[arg-type]
        few = enough_micro_batches(layout, 64)
        assert few == 8
        more = makespan(layout, 64, [EQUAL] * layout.stages) - makespan(layout, few, [EQUAL] * layout.stages)
        assert more == pytest.approx((64 - few) * 3 * turns)
