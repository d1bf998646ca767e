"""In which order a process of a pipeline works on its micro-batches: what torch's schedules do, as lists. No torch.

`tests/plan/test_schedules.py` holds them against the lists that torch makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, count
from typing import Literal, NamedTuple

from modelyard.config.layout import SPLIT_BACKWARD, Layout, Schedule

Kind = Literal["forward", "backward", "inputs", "weights"]
"""`inputs` and `weights` are the two halves of a `backward` that is split."""


class Action(NamedTuple):
    kind: Kind
    stage: int
    number: int
    """Of the micro-batch."""


def order(layout: Layout, place: int, micro_batches: int) -> list[Action]:
    """What the process at `place` along the pipeline does, in turn."""
    if layout.schedule == "gpipe":
        kinds: tuple[Kind, ...] = ("forward", "backward")
        return [Action(kind, place, number) for kind in kinds for number in range(micro_batches)]
    if layout.schedule == "1f1b":
        return list(_one_stage(layout.pipeline, place, micro_batches))
    if layout.schedule == "zbv":
        return list(_zbv(layout.pipeline, place, micro_batches))
    return list(_interleaved(layout, place, micro_batches))


@lru_cache(maxsize=4096)
def most_on_the_way(
    schedule: Schedule, pipeline: int, stages_per_process: int, place: int, micro_batches: int
) -> int:
    """Forwards of single stages whose backward is still to come, at most at a time, on the process at `place`."""
    layout = Layout(pipeline=pipeline, schedule=schedule, stages_per_process=stages_per_process)
    steps: dict[Kind, int] = {"forward": 1, "backward": -1, "inputs": 0, "weights": -1}
    return max(accumulate(steps[action.kind] for action in order(layout, place, micro_batches)))


def _one_stage(pipeline: int, place: int, micro_batches: int) -> Iterator[Action]:
    """As many forwards as it takes the first micro-batch to come back, then one backward, one forward in turn."""
    ahead = min(micro_batches, pipeline - place)
    for number in range(ahead):
        yield Action("forward", place, number)
    for number in range(micro_batches):
        yield Action("backward", place, number)
        if ahead + number < micro_batches:
            yield Action("forward", place, ahead + number)


def _interleaved(layout: Layout, place: int, micro_batches: int) -> Iterator[Action]:
    """Micro-batches go in rounds: a whole round through the process's first stage, then through its second, and so on."""
    pipeline, turns = layout.pipeline, layout.stages_per_process
    is_split = layout.schedule in SPLIT_BACKWARD
    round_length = micro_batches // max(1, micro_batches // pipeline)

    def in_rounds(kind: Kind, *, backwards: bool) -> list[Action]:
        numbers = [count() for _ in range(turns)]
        found = []
        for position in range(turns * micro_batches):
            turn = position // round_length % turns
            turn = turns - 1 - turn if backwards else turn
            found.append(Action(kind, turn * pipeline + place, next(numbers[turn])))
        return found

    forwards = in_rounds("forward", backwards=False)
    backwards = in_rounds("inputs" if is_split else "backward", backwards=True)
    weights = in_rounds("weights", backwards=True) if is_split else []
    hops = pipeline - 1 - place
    ahead = min(len(forwards), (turns - 1) * round_length + (1 if is_split else 2) * hops)
    yield from forwards[:ahead]
    for position, backward in enumerate(backwards):
        if ahead + position < len(forwards):
            yield forwards[ahead + position]
        yield backward
        # The first process of a pipeline fills no bubble with weights; each further one keeps one more of them back.
        if is_split and position >= place:
            yield weights[position - place]
    if is_split:
        yield from weights[max(0, len(backwards) - place) :]


def _zbv(pipeline: int, place: int, micro_batches: int) -> Iterator[Action]:
    """Of its two stages the process has one on the way down and one on the way back up."""
    down, up = place, 2 * pipeline - 1 - place
    to_the_turn = pipeline - place
    numbers: dict[tuple[Kind, int], Iterator[int]] = {}
    done: dict[tuple[Kind, int], int] = {}

    def next_of(kind: Kind, stage: int) -> Iterator[Action]:
        number = next(numbers.setdefault((kind, stage), count()))
        done[kind, stage] = number + 1
        # The order is made for no fewer micro-batches than fill the pipeline; those that are not there are passed over.
        if number < micro_batches:
            yield Action(kind, stage, number)

    def whole_backward(stage: int) -> Iterator[Action]:
        yield from next_of("inputs", stage)
        yield from next_of("weights", stage)

    at_least = max(2 * pipeline - 1, micro_batches)
    for _ in range(2 * to_the_turn - 1):
        yield from next_of("forward", down)
    for _ in range(place):
        yield from next_of("forward", up)
        yield from next_of("forward", down)
    for _ in range(to_the_turn):
        yield from next_of("forward", up)
        yield from whole_backward(up)
    while done["forward", up] < at_least:
        if done["forward", down] < at_least:
            yield from next_of("forward", down)
        yield from whole_backward(down)
        yield from next_of("forward", up)
        yield from whole_backward(up)
    for _ in range(place):
        yield from next_of("inputs", down)
        yield from next_of("inputs", up)
    for _ in range(to_the_turn):
        yield from whole_backward(down)
    for stage in (up, down):
        while done.get(("weights", stage), 0) < at_least:
            yield from next_of("weights", stage)
