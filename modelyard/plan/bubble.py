"""How long a pipeline takes for its micro-batches, by playing its schedule through: who waits for whom, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from modelyard.config.layout import Layout, takes
from modelyard.plan.schedules import Action, order

ENOUGH = 2
"""Micro-batches for each process of the pipeline after which another one adds its own time and nothing else."""


class StageTime(NamedTuple):
    """Seconds of one micro-batch on one stage."""

    forward: float
    inputs: float
    """The backward up to the gradient of what came in, recomputation before it included."""
    weights: float
    """The rest of the backward, which a schedule may put off."""


def makespan(layout: Layout, micro_batches: int, stages: Sequence[StageTime]) -> float:
    """Seconds from the first forward to the last backward; `stages` has the times of each stage of the pipeline.

    A stage's forward waits for the stage before, its backward for the one behind; messages take no time here.
    """
    seconds = {
        "forward": lambda time: time.forward,
        "backward": lambda time: time.inputs + time.weights,
        "inputs": lambda time: time.inputs,
        "weights": lambda time: time.weights,
    }
    waiting = [iter(order(layout, place, micro_batches)) for place in range(layout.pipeline)]
    following: list[Action | None] = [next(actions, None) for actions in waiting]
    free = [0.0] * layout.pipeline
    """When each process has done what it began."""
    ends: dict[tuple[bool, int, int], float] = {}
    """When the forward (True) or the backward of a stage and micro-batch was done, as far as others wait for it."""
    last = layout.stages - 1
    while any(action is not None for action in following):
        moved = False
        for place, action in enumerate(following):
            while action is not None:
                ready = _ready(action, last, ends)
                if ready is None:
                    break
                end = max(free[place], ready) + seconds[action.kind](stages[action.stage])
                free[place], moved = end, True
                if action.kind != "weights":
                    ends[action.kind == "forward", action.stage, action.number] = end
                action = following[place] = next(waiting[place], None)
        if not moved:
            raise ValueError(f"{layout.schedule} with {micro_batches} micro-batches waits for itself")
    return max(free)


def _ready(action: Action, last: int, ends: dict[tuple[bool, int, int], float]) -> float | None:
    """When an action can begin; None while what it waits for is not done."""
    if action.kind == "forward":
        return 0.0 if action.stage == 0 else ends.get((True, action.stage - 1, action.number))
    if action.kind == "weights":
        return 0.0  # behind its own first half, in the same process
    if action.stage == last:
        return ends.get((True, last, action.number))
    return ends.get((False, action.stage + 1, action.number))


def enough_micro_batches(layout: Layout, micro_batches: int) -> int:
    """As many as show what a pipeline of more waits for."""
    most = ENOUGH * layout.pipeline
    if micro_batches <= most:
        return micro_batches
    return most if takes(layout.schedule, layout.pipeline, most) else micro_batches
