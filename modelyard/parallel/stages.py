"""Which layers make which stage of a pipeline, and which stages a process has. Arithmetic only."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from itertools import accumulate, pairwise

from modelyard.config.architecture import Architecture
from modelyard.config.layout import Layout


@lru_cache(maxsize=64)
def layer_costs(architecture: Architecture, sequence_length: int) -> tuple[list[int], int]:
    """FLOPs per token, forward and backward, of every layer and of the head, at full rows of one document."""

    def whole(layers: int) -> int:
        part = dataclasses.replace(architecture, num_layers=layers)
        return part.matmul_flops_per_token() + part.attention_flops_per_token(sequence_length, causal=True)

    totals = [whole(layers) for layers in range(architecture.num_layers + 1)]
    return [after - before for before, after in pairwise(totals)], totals[0]


@lru_cache(maxsize=256)  # the planner asks again for every layout that it tries
def split_layers(architecture: Architecture, stages: int, sequence_length: int) -> list[range]:
    """The layers of each stage, in order, every stage with at least one.

    The largest stage is as small as it can be, as the slowest sets the pace of all: the head counts to the last stage.
    Among the splits with that largest stage the most even one (the least sum of squares), and among those the one
    with the fewest layers in the first stages: the first also holds the embedding, which costs no FLOPs, and keeps
    the activations of the most micro-batches. Raises ValueError where there are more stages than layers.
    """
    costs, head = layer_costs(architecture, sequence_length)
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be split into {stages} stages")
    before = list(accumulate(costs, initial=0))

    def cost(begin: int, end: int) -> int:
        return before[end] - before[begin] + (head if end == layers else 0)

    # smallest[i]: the smallest possible largest stage when the layers from i on make the stages looked at so far.
    smallest: list[int | None] = [cost(i, layers) if i < layers else None for i in range(layers + 1)]
    for _ in range(stages - 1):
        previous = smallest
        smallest = [None] * (layers + 1)
        for i in range(layers + 1):
            least: int | None = None
            for j in range(i + 1, layers):
                here = cost(i, j)
                if least is not None and here >= least:
                    break  # longer stages cost more
                if (worst := previous[j]) is not None and (least is None or max(here, worst) < least):
                    least = max(here, worst)
            smallest[i] = least
    largest = smallest[0]
    assert largest is not None

    # best[i]: (sum of squares, sizes) of the layers from i on, no stage above `largest`.
    Best = tuple[int, tuple[int, ...]]
    best: list[Best | None] = [
        (cost(i, layers) ** 2, (layers - i,)) if i < layers and cost(i, layers) <= largest else None
        for i in range(layers + 1)
    ]
    for _ in range(stages - 1):
        following = best
        best = [None] * (layers + 1)
        for i in range(layers + 1):
            found: list[Best] = []
            for j in range(i + 1, layers):
                if (here := cost(i, j)) > largest:
                    break
                if (rest := following[j]) is not None:
                    found.append((here**2 + rest[0], (j - i, *rest[1])))
            best[i] = min(found, default=None)
    assert best[0] is not None
    ends = list(accumulate(best[0][1], initial=0))
    return [range(begin, end) for begin, end in pairwise(ends)]


def stages_of(process: int, layout: Layout) -> list[int]:
    """The stages that a process of a pipeline has, the earlier first: one after the other round the processes, or,
    for `zbv`, up the processes and down again, so that the first one has the first and the last stage."""
    processes = layout.pipeline
    if layout.schedule == "zbv":
        return [process, 2 * processes - 1 - process]
    return [process + turn * processes for turn in range(layout.stages_per_process)]


def process_of(stage: int, layout: Layout) -> int:
    """The process of a pipeline that has a stage."""
    turn, place = divmod(stage, layout.pipeline)
    return layout.pipeline - 1 - place if layout.schedule == "zbv" and turn else place
