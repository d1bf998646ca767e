"""The orders of actions are those of torch's own schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from modelyard.config.layout import STAGES_PER_PROCESS, Layout, Schedule, takes
from modelyard.plan.schedules import Action, Kind, order

KINDS: dict[str, Kind] = {
    "FORWARD": "forward",
    "FULL_BACKWARD": "backward",
    "BACKWARD_INPUT": "inputs",
    "BACKWARD_WEIGHT": "weights",
}
CLASSES: dict[Schedule, Any] = {
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
}


class Stage:
    """As much of a stage as a schedule asks for when it makes its list."""

    has_backward = True
    submod = None

    def __init__(self, index: int, place: int, pipeline: int, stages: int):
        self.stage_index, self.group_rank, self.group_size = index, place, pipeline
        self.num_stages, self.group, self.device = stages, None, "cpu"
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.stage_index_to_group_rank: dict[int, int] = {}


def of_torch(layout: Layout, micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> list[list[Action]]:
    monkeypatch.setattr(schedules, "_check_torch_compile_compatibility", lambda *_: None)
    turns = range(layout.stages_per_process)
    stages = [Stage(turn * layout.pipeline, 0, layout.pipeline, layout.stages) for turn in turns]
    if layout.schedule == "zbv":
        stages[1].stage_index = layout.stages - 1
    made = CLASSES[layout.schedule](stages, micro_batches, loss_fn=lambda *_: None)
    return [
        [
            Action(KINDS[action.computation_type.name], action.stage_index, action.microbatch_index)
            for action in made.pipeline_order[place]
            if action is not None
        ]
        for place in range(layout.pipeline)
    ]


def cases() -> Iterator[tuple[Schedule, int, int, int]]:
    for schedule in CLASSES:
        for pipeline in (2, 3, 4, 8):
            for turns in {STAGES_PER_PROCESS[schedule], 2 if schedule == "zbv" else 3}:
                for micro_batches in (1, 2, 3, 4, 8, 12, 16, 24):
                    if takes(schedule, pipeline, micro_batches):
                        yield schedule, pipeline, turns, micro_batches


@pytest.mark.parametrize(("schedule", "pipeline", "turns", "micro_batches"), list(cases()))
def test_is_torchs(
    schedule: Schedule, pipeline: int, turns: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(pipeline=pipeline, schedule=schedule, stages_per_process=turns)
    expected = of_torch(layout, micro_batches, monkeypatch)
    for place in range(pipeline):
        assert order(layout, place, micro_batches) == expected[place]


def test_one_stage_each() -> None:
    """By hand: the first of two processes is two micro-batches ahead, the last none."""
    layout = Layout(pipeline=2)
    words = ["".join(f"{a.kind[0]}{a.number} " for a in order(layout, place, 3)) for place in (0, 1)]
    assert words == ["f0 f1 b0 f2 b1 b2 ", "f0 b0 f1 b1 f2 b2 "]
    gpipe = Layout(pipeline=2, schedule="gpipe")
    assert "".join(f"{a.kind[0]}{a.number} " for a in order(gpipe, 1, 2)) == "f0 f1 b0 b1 "
