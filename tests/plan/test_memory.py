"""What a process holds: the replay against the step itself on tensors without memory, and against sums by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest

from modelyard.config.adapter import MODULES, Adapter, Quantization, block_matrices
from modelyard.config.architecture import Architecture, Rotary
from modelyard.config.layout import Layout
from modelyard.model.adapter import QUANTIZED
from modelyard.plan.apart import apart
from modelyard.plan.memory import least_memory, memory_of, most_of_all
from modelyard.plan.schedules import most_on_the_way, order
from modelyard.plan.trace import trace
from modelyard.plan.workload import Workload

LLAMA = Architecture(2048, 128, 4, 4, 2, 32, 384, rotary=Rotary("llama3", 500_000.0))
QWEN = replace(LLAMA, tie_word_embeddings=True, qkv_bias=True)
STARCODER = replace(
    LLAMA,
    gated=False,
    norm_type="layer_norm",
    activation="gelu",
    mlp_bias=True,
    output_bias=True,
    qkv_bias=True,
)


def workload(layout: Layout = Layout(), shape: Architecture = LLAMA, **changes: Any) -> Workload:  # noqa: B008
    known = {"batch_rows": 2 * layout.data, "micro_rows": 1, "sequence_length": 1024, "on_gpu": True}
    return Workload(shape, layout, **{**known, **changes})


def with_adapter(shape: Architecture, **how: Any) -> dict[str, Any]:
    parts = {f"{name}.{part}" for name in block_matrices(shape) for part in QUANTIZED}
    frozen = frozenset(shape.parameter_shapes()) | (parts if "quantization" in how else set())
    return {"adapter": Adapter(rank=8, alpha=16.0, modules=MODULES, **how), "frozen": frozen}


CASES: dict[str, tuple[Workload, int, int]] = {
    "one process": (workload(), 0, 0),
    "one process, fp32, selective": (workload(dtype="float32", recompute="selective"), 0, 0),
    "zero 1, qwen": (workload(Layout(shard=4), QWEN), 0, 0),
    "zero 2, copies": (workload(Layout(replicate=2, shard=2, zero_stage=2)), 0, 0),
    "zero 3, full": (workload(Layout(shard=4, zero_stage=3), recompute="full"), 0, 0),
    "starcoder": (workload(Layout(shard=2, zero_stage=3), STARCODER), 0, 0),
    "tensor": (workload(Layout(tensor=2), QWEN), 0, 0),
    "tensor, sequence": (
        workload(Layout(shard=2, tensor=2, sequence_parallel=True), recompute="selective"),
        0,
        0,
    ),
    "context": (workload(Layout(shard=2, context=2, zero_stage=2)), 0, 0),
    "1f1b": (workload(Layout(pipeline=2), batch_rows=4), 0, 0),
    "interleaved, last": (
        workload(Layout(pipeline=2, schedule="interleaved", stages_per_process=2), batch_rows=4),
        1,
        1,
    ),
    "zbv": (workload(Layout(pipeline=2, schedule="zbv", stages_per_process=2), batch_rows=4), 1, 1),
    "lora": (workload(Layout(shard=2, zero_stage=2), **with_adapter(LLAMA)), 0, 0),
    "qlora": (workload(**with_adapter(LLAMA, quantization=Quantization(block=64))), 0, 0),
}
"""Workload, rank, place."""


@pytest.mark.parametrize("name", CASES)
def test_is_what_a_trace_holds(name: str) -> None:
    work, rank, place = CASES[name]
    memory, traced = memory_of(work, place), apart(trace, work, rank)
    # Small models have more small things beside the large ones; docs/planner.md has those of real size.
    assert memory.peak == pytest.approx(traced.peak_bytes, rel=0.05)
    assert memory.at_rest == pytest.approx(traced.at_rest_bytes, rel=0.04)
    assert sum(memory.at_peak.values()) == memory.peak == max(memory.phases.values())
    assert least_memory(work) <= memory.peak or place


def test_by_hand() -> None:
    """Two layers of width 8, one process, fp32: weights, two moments; gradients beside them in the optimizer."""
    shape = Architecture(16, 8, 2, 2, 1, 4, 12)
    block = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 12 + 2 * 8
    count = 2 * 16 * 8 + 2 * block + 8
    assert shape.parameter_count() == count
    memory = memory_of(Workload(shape, Layout(), 1, 1, 4, dtype="float32"))
    assert memory.at_rest == 3 * 4 * count
    assert memory.phases["optimizer"] == 4 * 4 * count


def test_shares() -> None:
    """Of four processes each keeps a quarter, rows filled up: 10 words make 3 rows in each."""
    shape = Architecture(10, 8, 1, 2, 1, 4, 12, tie_word_embeddings=True)
    quarter = 3 * 8 + 16 + 2 * 8 + 16 + 3 * 24 + 3 * 2
    assert memory_of(Workload(shape, Layout(shard=4), 4, 1, 4, dtype="float32")).at_rest == 12 * quarter


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_keeps_less(mode: Any) -> None:
    """In a deep model by what a block keeps less: h 128, q 128, k 64, f 384 of bf16, 1,024 tokens, 32 blocks."""
    deep = replace(LLAMA, num_layers=32)
    none, some = (memory_of(workload(Layout(shard=2), deep, recompute=r)) for r in ("none", mode))
    token = 2 * 128 + 384 if mode == "selective" else 3 * 128 + 2 * 128 + 2 * 64 + 3 * 384
    numbers = (
        0 if mode == "selective" else 4 * 4 + 2 * 4
    )  # fp32: the log-sums of four heads, the inverses of two norms
    less = 32 * 1024 * (2 * token + numbers)
    assert none.at_peak["activations"] - some.at_peak["activations"] == pytest.approx(less, rel=0.05)


def test_the_fullest_process() -> None:
    """Of a pipeline the first holds most: it has all micro-batches on their way that there can be."""
    deep = replace(LLAMA, num_layers=8)
    work = workload(Layout(pipeline=4), deep, batch_rows=16, sequence_length=4096)
    place, memory = most_of_all(work)
    assert place == 0
    assert memory.peak == max(memory_of(work, other).peak for other in range(4))


def test_most_on_the_way() -> None:
    assert [most_on_the_way("1f1b", 4, 1, place, 8) for place in range(4)] == [4, 3, 2, 1]
    assert most_on_the_way("gpipe", 4, 1, 0, 8) == 8
    layout = Layout(pipeline=2, schedule="zero_bubble", stages_per_process=2)
    steps = {"forward": 1, "inputs": 0, "weights": -1, "backward": -1}
    assert most_on_the_way("zero_bubble", 2, 2, 0, 4) == max(
        accumulate(steps[action.kind] for action in order(layout, 0, 4))
    )


def test_what_the_host_has() -> None:
    """Masters, moments and reduced gradients with `cpu_offload`; with offloaded activations all block inputs but three."""
    work = workload(Layout(shard=2, zero_stage=3), replace(LLAMA, num_layers=16), recompute="full")
    plain, offloaded = memory_of(work), memory_of(replace(work, layout=replace(work.layout, offload=True)))
    kept = plain.at_peak["master weights"] + plain.at_peak["optimizer state"]
    assert plain.at_rest == kept
    assert offloaded.at_rest == 0
    assert plain.peak - offloaded.peak >= kept
    away = memory_of(replace(work, offload_activations=True))
    stream = 1024 * 128 * 2
    assert plain.at_peak["activations"] - away.at_peak["activations"] == 15 * stream
