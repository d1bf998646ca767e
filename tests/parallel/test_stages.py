"""Layers to stages by arithmetic, stages to processes by the schedule."""

from __future__ import annotations

import dataclasses

import pytest

from modelyard.config.architecture import Architecture
from modelyard.config.layout import Layout
from modelyard.parallel.mesh import alone
from modelyard.parallel.stages import layer_costs, process_of, split_layers, stages_of

LLAMA_8B = Architecture(128_256, 4096, 32, 32, 8, 128, 14_336)
LLAMA_405B = Architecture(128_256, 16_384, 126, 128, 8, 128, 53_248)
QWEN_HALF_B = Architecture(151_936, 896, 24, 14, 2, 64, 4864, tie_word_embeddings=True, qkv_bias=True)


def sizes(architecture: Architecture, stages: int, sequence_length: int = 8192) -> list[int]:
    split = split_layers(architecture, stages, sequence_length)
    layers = [layer for stage in split for layer in stage]
    assert layers == list(range(architecture.num_layers)), "each layer once, in order"
    return [len(stage) for stage in split]


def test_costs_of_llama_8b_by_hand() -> None:
    # 6 FLOPs a weight and token: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 14336 = 218,103,808 weights;
    # 12 a head, its size and key: 32 x 128, 4096 keys on average. The head: 128,256 x 4096 weights.
    costs, head = layer_costs(LLAMA_8B, 8192)
    assert costs == [6 * 218_103_808 + 12 * 32 * 128 * 4096] * 32
    assert head == 6 * 525_336_576


def test_a_window_makes_a_layer_cheaper() -> None:
    windowed = dataclasses.replace(LLAMA_8B, window_size=1024, full_attention_layers=1)
    costs, _ = layer_costs(windowed, 8192)
    # Keys of a query, on average: 4096 in the full layer, 1024 - 1024^2 / (2 * 8192) = 960 in the others.
    assert costs[0] - costs[1] == 12 * 32 * 128 * (4096 - 960)
    assert costs[1:] == [costs[1]] * 31


def test_splits_by_hand() -> None:
    # A head of 2.09 layers: 34.09 in all, so no split of whole layers has a largest stage under 9; the first then has 8,
    # and the last 6 (8.09).
    assert sizes(LLAMA_8B, 4) == [8, 9, 9, 6]
    # A head of 0.63 layers: 126 = 16 * 8 - 2, one fewer in the first and in the last (7.63), as the Llama 3 report has it.
    assert sizes(LLAMA_405B, 16) == [7, *[8] * 14, 7]
    assert sizes(LLAMA_405B, 4) == [31, 32, 32, 31]
    # A head of 6.12 layers: the last stage has 7.12 with a single layer, and the 23 others need 8 in some stage.
    assert sizes(QWEN_HALF_B, 4) == [7, 8, 8, 1]
    assert sizes(QWEN_HALF_B, 2) == [15, 9]
    assert sizes(QWEN_HALF_B, 1) == [24]


def test_every_stage_has_a_layer_even_where_the_head_outweighs_the_rest() -> None:
    assert sizes(QWEN_HALF_B, 24) == [1] * 24


@pytest.mark.parametrize("architecture", [LLAMA_8B, QWEN_HALF_B])
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_no_other_split_has_a_smaller_largest_stage(architecture: Architecture, stages: int) -> None:
    small = dataclasses.replace(architecture, num_layers=9)
    costs, head = layer_costs(small, 4096)

    def largest(split: list[int]) -> int:
        ends = [sum(split[: i + 1]) for i in range(len(split))]
        stage_costs = [sum(costs[end - size : end]) for end, size in zip(ends, split, strict=True)]
        stage_costs[-1] += head
        return max(stage_costs)

    def all_splits(layers: int, count: int) -> list[list[int]]:
        if count == 1:
            return [[layers]]
        return [[n, *rest] for n in range(1, layers) for rest in all_splits(layers - n, count - 1)]

    best = min(largest(split) for split in all_splits(9, stages))
    assert largest(sizes(small, stages, 4096)) == best


@pytest.mark.parametrize("stages", [0, 33])
def test_more_stages_than_layers_are_refused(stages: int) -> None:
    with pytest.raises(ValueError, match=f"32 layers cannot be split into {stages} stages"):
        split_layers(LLAMA_8B, stages, 8192)


@pytest.mark.parametrize(
    ("schedule", "each", "expected"),
    [
        ("gpipe", 1, [[0], [1], [2], [3]]),
        ("1f1b", 1, [[0], [1], [2], [3]]),
        ("interleaved", 2, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("zero_bubble", 3, [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]),
        ("zbv", 2, [[0, 7], [1, 6], [2, 5], [3, 4]]),
    ],
)
def test_stages_of_each_process(schedule: str, each: int, expected: list[list[int]]) -> None:
    layout = Layout(pipeline=4, schedule=schedule, stages_per_process=each)  # type: ignore[arg-type]
    assert [stages_of(process, layout) for process in range(4)] == expected
    for process, stages in enumerate(expected):
        assert [process_of(stage, layout) for stage in stages] == [process] * each


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"])
def test_the_loss_is_where_the_last_stage_is(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    each = 1 if schedule in ("gpipe", "1f1b") else 2
    layout = Layout(pipeline=3, schedule=schedule, stages_per_process=each)  # type: ignore[arg-type]
    mesh = alone()
    mesh.layout = layout
    for process in range(3):
        place = {"pipeline": process, "tensor": 0}
        monkeypatch.setattr(mesh, "place", place.__getitem__)
        assert mesh.has_loss == (layout.stages - 1 in stages_of(process, layout))
