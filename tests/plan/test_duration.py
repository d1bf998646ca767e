"""Seconds of a step on a machine whose rates are round numbers, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from modelyard.config.architecture import Architecture
from modelyard.config.layout import Layout
from modelyard.plan import duration
from modelyard.plan.communication import Term
from modelyard.plan.duration import Program, duration_of, members_in_node, seconds_of_term
from modelyard.plan.hardware import Cluster, Hardware, cluster_of, load_hardware
from modelyard.plan.parts import parts_of
from modelyard.plan.rates import Measured, at, shape_share
from modelyard.plan.workload import Workload

SHAPE = Architecture(
    vocab_size=96,
    hidden_size=16,
    num_layers=4,
    num_attention_heads=4,
    head_groups=2,
    head_size=4,
    ffn_hidden_size=24,
)


@dataclass(frozen=True)
class Flat:
    """Rates that nothing changes: 1,000 FLOP/s, memory that takes no time, wires as they are, no latency."""

    together: float = 1.0
    dispatch: float = 0.0
    launch: float = 0.0
    flops: float = 1e3
    through: float = float("inf")

    def matmul(self, *_: Any) -> float:
        return self.flops

    def attention(self, *_: Any, backward: bool) -> float:
        return self.flops

    def stream(self, size: float) -> float:
        return self.through

    def update(self) -> float:
        return self.through

    def exponentials(self, dtype: str) -> float:
        return float("inf")

    def send(self, rate: float, size: float, *, crosses: bool) -> float:
        return rate

    def latency(self, inside: int, between: int) -> float:
        return 0.0


def hardware(rates: Any = None, **fields: Any) -> Hardware:
    peaks = {"bfloat16": 1e3, "float32": 1e3}
    plain = Hardware("flat", "flat", 1, peaks, 1.0, 100.0, 10.0, 4, 1, rates=rates or Flat())
    return replace(plain, **fields)


def cluster(gpus: int, **fields: Any) -> Cluster:
    return cluster_of(hardware(**fields), gpus)


def workload(layout: Layout | None = None, **fields: Any) -> Workload:
    plain = Workload(SHAPE, layout or Layout(), batch_rows=8, micro_rows=1, sequence_length=8, on_gpu=True)
    return replace(plain, **fields)


Say = Callable[..., None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Decides what processes communicate: nothing, until it is called with terms."""

    def say(*terms: Term) -> None:
        monkeypatch.setattr(duration, "communication_of", lambda workload, place: list(terms))

    say()
    return say


def term(
    kind: str, operation: str, group: int, calls: int, size: float, dimension: str | None = None
) -> Term:
    return Term((kind, operation), dimension or kind, group, calls, size)


def flops_of(work: Workload, place: int = 0) -> float:
    return sum(part.all_flops for part in parts_of(work, place))


# --- rates ----------------------------------------------------------------------------------------------------


def test_the_share_that_a_shape_can_have() -> None:
    # 8 x 4 tiles of 128 x 256 on 32 processors: one full wave, nothing cut; the inner length pays 128 for each tile.
    assert shape_share(1024, 1024, 896, 32) == 896 / 1024
    # On 33: a wave of which 32 / 33 is used, and half of what is not is lost.
    assert shape_share(1024, 1024, 896, 33) == pytest.approx((1 + 32 / 33) / 2 * 896 / 1024)
    # 100 rows of tiles of 128, whichever side they lie.
    assert shape_share(100, 1024, 896, 4) == pytest.approx(100 / 128 * 896 / 1024)
    assert shape_share(8192, 8192, 8192, 132) > shape_share(512, 512, 512, 132) > shape_share(64, 64, 64, 132)


def test_rates_by_data_sheet() -> None:
    rates = load_hardware("h100").rates
    large = rates.matmul("bfloat16", 8192, 8192, 8192, "output")
    assert large == pytest.approx(0.728 * 989e12)
    assert rates.matmul("float32", 8192, 8192, 8192, "output") == pytest.approx(0.728 * 67e12)
    # An eighth of a feed-forward is less efficient than the whole, and 128 columns for a key head less than that.
    sizes = (14_336, 1792, 128)
    slices = [rates.matmul("bfloat16", 2048, width, 4096, "output") for width in sizes]
    assert slices[0] > slices[2]
    assert all(0.5 * large < rate < 1.05 * large for rate in slices)
    # 128 of 8,320 keys are masked blocks on the diagonal.
    assert rates.attention("bfloat16", 128, 8192, backward=True) == pytest.approx(0.34 * 989e12 * 8192 / 8320)
    assert rates.stream(1e9) == pytest.approx(0.9 * 3.35e12)
    assert rates.send(450e9, 8, crosses=False) == pytest.approx(360e9)
    assert rates.latency(7, 1) == pytest.approx(8.4e-6 + 7 * 3.4e-6 + 14e-6)


def test_measured_rates_lie_between_their_points() -> None:
    curve = ((1.0, 10.0), (100.0, 1000.0))
    assert at(curve, 10) == pytest.approx(100)
    assert at(curve, 0.1) == 10
    assert at(curve, 1e6) == 1000
    products: Any = {"float32": {"output": curve}}
    large: Any = {"float32": {"output": 500.0}}
    rates = Measured(products, {}, large, ((1, 2.0),), 1.0, {})
    assert rates.matmul("float32", 100, 200, 300, "output") == 1000
    # A matrix of 16 MiB and more, and a dtype that was not measured.
    assert rates.matmul("float64", 100, 1 << 20, 300, "output") == 500
    assert rates.send(7.0, 10, crosses=False) == 7
    assert replace(rates, messages=curve).send(7.0, 10, crosses=False) == pytest.approx(100)


# --- one process ----------------------------------------------------------------------------------------------


def test_one_process_takes_what_its_products_take(say: Say) -> None:
    work = workload()
    found = duration_of(work, cluster(1))
    seconds = 8 * flops_of(work) / 1e3
    assert found.step == pytest.approx(seconds)
    assert sum(found.items.values()) == pytest.approx(found.step)
    assert found.items["attention"] == pytest.approx(8 * 4 * 7 * 2 * 8 * 4 * 16 / 1e3)
    assert found.tokens_per_second == pytest.approx(64 / seconds)
    assert found.bubble_share == 0
    # All that it does is at its peak; what the model needs of that is less, as flash attention computes the scores twice.
    assert found.hfu == pytest.approx(1)
    needed = 64 * (SHAPE.matmul_flops_per_token() + SHAPE.attention_flops_per_token(8, causal=True))
    assert found.mfu_causal == pytest.approx(needed / seconds / 1e3)
    square = 64 * SHAPE.attention_flops_per_token(8, causal=True)
    assert found.mfu_full == pytest.approx((needed + square) / seconds / 1e3)
    assert found.flops_per_second == pytest.approx(needed / seconds)


def test_a_run(say: Say) -> None:
    found = replace(duration_of(workload(layout=Layout(shard=2)), cluster(2)), step=864.0)
    assert found.days(100) == pytest.approx(1.0)
    assert found.gpu_hours(100) == pytest.approx(48.0)


def test_bytes_count_where_they_take_longer(say: Say) -> None:
    work = workload()
    found = duration_of(work, cluster(1, rates=Flat(flops=1e30, through=10.0)))
    per_step = sum(part.all_moved for part in parts_of(work) if part.per_step)
    each = sum(part.all_moved for part in parts_of(work) if not part.per_step)
    assert found.step == pytest.approx((8 * each + per_step) / 10)
    assert found.items["optimizer"] == pytest.approx((28 + 12 + 6) * SHAPE.parameter_count() / 10)


def test_the_host_may_be_what_takes_longest(say: Say) -> None:
    work = workload()
    calls = sum(part.times * part.calls for part in parts_of(work) if not part.per_step)
    found = duration_of(work, cluster(1, rates=Flat(flops=1e30, dispatch=2.0)))
    assert found.step == pytest.approx(8 * 2 * calls)
    assert found.items["waiting for the host"] == pytest.approx(found.step)
    # On a processor saying what is to be done comes on top of everything.
    work = replace(work, on_gpu=False)
    rates, processor = Flat(dispatch=2.0), {"is_gpu": False, "overlaps": False}
    more = (
        duration_of(work, cluster(1, rates=rates, **processor)).step
        - duration_of(work, cluster(1, **processor)).step
    )
    calls = sum(part.times * part.calls * (1 if part.per_step else 8) for part in parts_of(work))
    assert more == pytest.approx(2 * calls)


def test_parts_together_take_longer(say: Say) -> None:
    alone, together = (
        duration_of(workload(), cluster(1, rates=Flat(together=share))).step for share in (1.0, 0.8)
    )
    assert together == pytest.approx(alone / 0.8)


def test_another_program_may_recompute_more(say: Say) -> None:
    plain = duration_of(workload(), cluster(1))
    found = duration_of(workload(), cluster(1), Program(recomputed=0.5))
    blocks = 4 * (768 + 3 * 16 * 24) * 2 * 64
    assert found.step - plain.step == pytest.approx(0.5 * blocks / 1e3)
    assert found.items["recomputation"] == pytest.approx(0.5 * blocks / 1e3)


# --- who is where ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [("tensor", (8, 8)), ("context", (2, 1)), ("pipeline", (4, 1)), ("weights", (8, 1)), ("world", (512, 8))],
)
def test_groups_and_nodes_of_eight(dimension: str, expected: tuple[int, int]) -> None:
    layout = Layout(replicate=2, shard=4, pipeline=4, context=2, tensor=8)
    assert members_in_node(layout, dimension, 8) == expected


def test_groups_that_a_node_holds_part_of() -> None:
    layout = Layout(shard=8, tensor=2)
    assert members_in_node(layout, "weights", 8) == (8, 4)
    assert members_in_node(layout, "tensor", 8) == (2, 2)
    assert members_in_node(Layout(shard=64), "weights", 8) == (64, 8)
    assert members_in_node(Layout(tensor=16), "tensor", 8) == (16, 8)


def test_seconds_of_a_collective() -> None:
    """Links of 100 bytes/s within nodes of four, a network of 10 bytes/s for each device."""
    inside = seconds_of_term(term("tensor", "all-gather", 4, 2, 600), Layout(tensor=4, shard=2), cluster(8))
    assert inside == pytest.approx(6)
    # One of each node: its own share of the network.
    across = seconds_of_term(term("weights", "all-gather", 2, 2, 600), Layout(tensor=4, shard=2), cluster(8))
    assert across == pytest.approx(60)
    # All four of each node: the ring has the network shares of all four.
    together = seconds_of_term(term("weights", "all-gather", 8, 2, 600), Layout(shard=8), cluster(8))
    assert together == pytest.approx(15)
    # Not faster than the links.
    wide = cluster_of(hardware(), 8, network=80.0)
    assert seconds_of_term(term("weights", "all-gather", 8, 2, 600), Layout(shard=8), wide) == pytest.approx(
        6
    )
    assert seconds_of_term(term("weights", "all-gather", 1, 2, 600), Layout(), cluster(1)) == 0


def test_latency_grows_with_the_group() -> None:
    real = load_hardware("h100")
    short = term("weights", "all-gather", 16, 10, 0.0)
    found = seconds_of_term(short, Layout(shard=16), cluster_of(real, 16))
    assert found == pytest.approx(10 * (8.4e-6 + 14 * 3.4e-6 + 14e-6))
    # An all-reduce goes up and down a tree: 2 x 7 steps in a node, 2 x 2 between four.
    short = term("step", "all-reduce", 32, 1, 0.0, "world")
    found = seconds_of_term(short, Layout(shard=32), cluster_of(real, 32))
    assert found == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 4 * 14e-6)


# --- waiting --------------------------------------------------------------------------------------------------


def test_tensor_parallel_exchanges_are_waited_for(say: Say) -> None:
    layout = Layout(tensor=4, shard=2)
    plain = duration_of(workload(layout), cluster(8))
    say(term("tensor", "all-reduce", 4, 8, 500.0))
    found = duration_of(workload(layout), cluster(8))
    assert found.items["tensor exchanges"] == pytest.approx(5)
    assert found.step == pytest.approx(plain.step + 5)
    half = duration_of(workload(layout), cluster(8), Program(hidden={"tensor": 0.5}))
    assert half.step == pytest.approx(plain.step + 2.5)
    assert half.hidden == pytest.approx(2.5)


def test_weights_come_while_something_is_computed(say: Say) -> None:
    layout = Layout(shard=4)
    work = workload(layout)
    plain = duration_of(work, cluster(4))
    forward = sum(part.all_flops for part in parts_of(work) if part.phase == "forward") / 1e3
    # Short ones: of four blocks the first one's gather is waited for, and the last one's reduction.
    say(term("weights", "all-gather", 4, 6, 8.0), term("weights", "reduce-scatter", 4, 6, 16.0))
    found = duration_of(work, cluster(4))
    assert found.step - plain.step == pytest.approx(0.08 / 4 + 0.16 / 4)
    assert found.hidden == pytest.approx(0.24 - 0.06)
    # Long ones: what the forward has no time for.
    say(term("weights", "all-gather", 4, 6, 100 * 4 * forward))
    found = duration_of(work, cluster(4))
    assert found.step - plain.step == pytest.approx(4 * forward / 4 + 3 / 4 * (4 * forward - forward))
    # Nothing goes on beside a processor's computation.
    processor = {"is_gpu": False, "overlaps": False}
    alone = duration_of(work, cluster(4, **processor)).step
    say()
    assert alone - duration_of(work, cluster(4, **processor)).step == pytest.approx(4 * forward)


def test_zero_3_gathers_twice_a_micro_batch(say: Say) -> None:
    work = workload(Layout(shard=4, zero_stage=3))
    plain = duration_of(work, cluster(4))
    assert work.micro_batches == 2
    say(term("weights", "all-gather", 4, 24, 8.0), term("weights", "reduce-scatter", 4, 12, 16.0))
    found = duration_of(work, cluster(4))
    # A quarter of each micro-batch's forward gather, and of its backward's gather and reduction.
    assert found.step - plain.step == pytest.approx(2 * (0.02 / 4 + (0.02 + 0.08) / 4))


# --- the pipeline ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "each"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 2), ("zbv", 2)]
)
def test_the_bubble(say: Say, schedule: Any, each: int) -> None:
    layout = Layout(pipeline=2, schedule=schedule, stages_per_process=each)
    work = workload(layout)
    found = duration_of(work, cluster(2))
    slow, other = sorted((flops_of(work, place) / 1e3 for place in (0, 1)), reverse=True)
    bubble = found.items.get("bubble", 0.0)
    assert found.step == pytest.approx(8 * slow + bubble)
    if schedule in ("gpipe", "1f1b"):  # what the other one does before and after
        assert bubble == pytest.approx(other)
    else:  # between a half and none of that, for two stages each
        assert 0 < bubble < 0.75 * other


def test_the_bubble_of_equal_stages_is_the_papers(say: Say) -> None:
    """(p - 1) / (v m) of the time that the computation takes (arXiv 2104.04473, 2.2)."""
    shape = replace(SHAPE, num_layers=16, vocab_size=2)  # a head that counts for little
    layout = Layout(pipeline=4, schedule="interleaved", stages_per_process=2)
    found = duration_of(workload(layout, architecture=shape), cluster(4))
    computed = found.step - found.items["bubble"]
    assert found.items["bubble"] / computed == pytest.approx(3 / (2 * 8), rel=0.02)
    assert found.bubble_share == pytest.approx(found.items["bubble"] / found.step)


def test_the_slowest_stage_sets_the_pace(say: Say) -> None:
    shape = replace(SHAPE, vocab_size=4096)  # the last stage has the head, which is most of the work
    work = workload(Layout(pipeline=2), architecture=shape)
    found = duration_of(work, cluster(2))
    first, last = (flops_of(work, place) / 1e3 for place in (0, 1))
    assert last > 5 * first
    assert found.step == pytest.approx(8 * last + first)


def test_a_cluster_of_another_size_is_a_mistake(say: Say) -> None:
    with pytest.raises(ValueError, match="8 devices for 1 processes"):
        duration_of(workload(), cluster(8))
