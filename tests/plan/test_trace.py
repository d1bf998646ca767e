"""The dry run: what it counts is what real tensors hold and real processes send."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from modelyard.config.adapter import Adapter, Quantization
from modelyard.config.layout import Layout
from modelyard.config.presets import preset
from modelyard.parallel.mesh import Mesh, alone
from modelyard.plan.apart import apart
from modelyard.plan.meter import Meter
from modelyard.plan.trace import Traced, batch_of, measure, trace
from modelyard.plan.workload import Workload
from tests.parallel.matrix import TINY
from tests.parallel.processes import run_distributed

SHAPE = replace(
    TINY, vocab_size=96, hidden_size=32, num_layers=2, head_size=8, ffn_hidden_size=48, qkv_bias=False
)
QLORA = Adapter(2, 4, ("q_proj", "o_proj", "down_proj"), quantization=Quantization(8))


def workload(layout: Layout, **options: Any) -> Workload:
    options = {"architecture": SHAPE, "batch_rows": 4, "micro_rows": 1, "sequence_length": 32, **options}
    return Workload(layout=layout, **options)


def really(work: Workload) -> Traced:
    """The same steps with tensors that have memory, in the processes that are there."""
    warnings.simplefilter("ignore")
    mesh = alone() if work.layout.world == 1 else Mesh(work.layout, torch.device("cpu"))
    meter = Meter()

    def fill(model: torch.nn.Module, _write: object) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                part: Tensor = getattr(parameter, "_local_tensor", parameter)
                part.fill_(0.01)

    batch = batch_of(work, mesh)
    with meter.counting():
        return measure(work, mesh, batch, meter, steps=2, fill=fill)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="bf16"),
        pytest.param(
            {"dtype": "float32", "recompute": "selective", "document_length": 10},
            id="fp32, selective, documents",
        ),
        pytest.param(
            {"adapter": QLORA, "frozen": frozenset(SHAPE.parameter_shapes()), "recompute": "full"},
            id="QLoRA, full",
        ),
    ],
)
def test_one_process_holds_what_real_tensors_hold(options: dict[str, Any]) -> None:
    work = workload(Layout(), batch_rows=2, **options)
    traced, real = apart(trace, work, 0), really(work)
    assert traced.peak_bytes == real.peak_bytes
    assert traced.at_rest_bytes == real.at_rest_bytes
    assert traced.phase_peaks == real.phase_peaks
    assert traced.by_category == real.by_category


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(shard=2, zero_stage=3), id="ZeRO 3"),
        pytest.param(Layout(tensor=2, sequence_parallel=True), id="sequence"),
        pytest.param(Layout(pipeline=2), id="pipeline"),
    ],
)
def test_two_processes_send_what_real_processes_send(layout: Layout) -> None:
    work = workload(layout, batch_rows=2)
    for rank, real in enumerate(run_distributed(really, 2, work)):
        traced = apart(trace, work, rank)
        assert traced.calls == real.calls
        assert traced.by_category["weights"] == real.by_category["weights"]
        # gloo holds a message until it has gone, and frees what it sent a moment later.
        assert traced.at_rest_bytes == pytest.approx(real.at_rest_bytes, rel=0.01)
        assert real.peak_bytes == pytest.approx(traced.peak_bytes, rel=0.1)


def test_what_is_at_rest_can_be_counted_by_hand() -> None:
    traced = apart(trace, workload(Layout(), batch_rows=2), 0)
    parameters = SHAPE.parameter_count()
    # Masters, copies in bf16, two moments; a count of steps each; the batch: ids and labels are one tensor, positions.
    batch = 2 * (2 * 32 * 8) + 2 * 2 * 4
    assert traced.at_rest_bytes == parameters * (4 + 2 + 8) + 4 * len(SHAPE.parameter_shapes()) + batch
    assert traced.by_category["weights"] == 4 * parameters
    assert traced.by_category["optimizer"] == 8 * parameters + 4 * len(SHAPE.parameter_shapes())
    assert sum(traced.by_category.values()) == traced.peak_bytes == max(traced.phase_peaks.values())
    assert traced.calls == {}


def test_a_model_that_this_machine_has_no_memory_for() -> None:
    large = replace(preset("llama-3.1-405b"), num_layers=1)
    work = workload(
        Layout(shard=256, zero_stage=3), architecture=large, batch_rows=256, sequence_length=4096, on_gpu=True
    )
    traced = apart(trace, work, 255)
    assert traced.by_category["weights"] == 4 * large.parameter_count() // 256
    # The gradients of the one block, in fp32, as all processes send each other their parts of them.
    block = large.parameter_count() - 2 * 128_256 * 16_384 - 16_384
    assert traced.peak_bytes > 4 * block
    assert (traced.live[0].bytes, traced.live[0].shape) == (4 * block, (block,))
    assert (traced.live[0].kind, traced.live[0].phase) == ("gradients", "backward")


def test_a_gpu_takes_the_loss_in_larger_pieces() -> None:
    wordy = replace(SHAPE, vocab_size=50_000)
    options = {"architecture": wordy, "batch_rows": 1, "sequence_length": 512}
    here, there = (apart(trace, workload(Layout(), **options, on_gpu=gpu), 0) for gpu in (False, True))
    # 512 rows of logits in bf16 both times, in fp32 five rows on a CPU and all on a GPU.
    assert there.phase_peaks["forward"] - here.phase_peaks["forward"] > 500 * 50_000 * 4
    assert max(one.bytes for one in there.live if one.phase == "forward") == 512 * 50_000 * 4


def test_nothing_is_left_behind() -> None:
    apart(_trace_and_look)


def _trace_and_look() -> None:
    hook = sys.excepthook
    trace(workload(Layout(shard=2), batch_rows=2), 1)
    assert not dist.is_initialized()
    assert sys.excepthook is hook
    assert torch.zeros(2).tolist() == [0.0, 0.0]


def test_processes_that_are_there_already_are_not_mixed_up() -> None:
    message = run_distributed(_trace_among_others, 2)[0]
    assert message == "there are processes already: trace in one of its own"


def _trace_among_others() -> str:
    try:
        trace(workload(Layout(shard=2)), 0)
    except RuntimeError as error:
        return str(error)
    return "none"
