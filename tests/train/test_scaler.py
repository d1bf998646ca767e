"""fp16: the scale follows the gradients, the run follows fp32, and nothing is lost on the way."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from modelyard.config.optimizer import GradientScalerConfig
from modelyard.errors import RunFailed
from modelyard.train.checkpoint import Checkpoint
from modelyard.train.progress import Progress
from modelyard.train.run import train
from modelyard.train.scaler import GradientScaler
from modelyard.train.step import StepResult
from tests.parallel.processes import run_distributed
from tests.train.helpers import lines, loaded, losses

FP16 = "model.distributed.training_dtype=fp16"
SMOOTH = ("optimizer.learning_rate.base=0.003", "training.train_iters=12")


def result(grad_norm: float = 1.0, loss: float = 2.0, targets: int = 5) -> StepResult:
    return StepResult(loss, grad_norm, targets, None if math.isfinite(grad_norm) else "overflow")


def scales(results: list[StepResult], **settings: Any) -> list[float]:
    """The scale after each step."""
    scaler = GradientScaler(GradientScalerConfig(**settings), Progress())
    found = []
    for one in results:
        scaler.after(one)
        found.append(scaler.scale)
    return found


GOOD, BAD, LOST = result(), result(math.inf), result(math.nan, math.nan)


def test_the_scale_falls_with_overflows_and_rises_without() -> None:
    assert scales([GOOD] * 7, initial=8, window=3) == [8, 8, 16, 16, 16, 32, 32]
    assert scales([BAD] * 4, initial=8, hysteresis=1) == [4, 2, 1, 1]
    assert scales([BAD] * 4, initial=8, hysteresis=3) == [8, 8, 4, 2]
    # Good steps between them do not make up for overflows, but a whole window of them does.
    settings = {"initial": 8, "hysteresis": 2, "window": 3}
    assert scales([BAD, GOOD, GOOD, BAD, GOOD, GOOD], **settings) == [8, 8, 8, 4, 4, 4]
    assert scales([BAD, GOOD, GOOD, GOOD, BAD, BAD], **settings) == [8, 8, 8, 16, 16, 8]
    assert scales([BAD] * 3, initial=6, minimum=5, hysteresis=1) == [5, 5, 5]
    assert scales([result(math.nan)], initial=8, hysteresis=1) == [4]


def test_what_is_no_overflow_of_the_gradient_leaves_the_scale() -> None:
    empty = StepResult(0.0, 0.0, 0, "no trained token in the batch")
    assert scales([LOST, empty] * 3, initial=8, hysteresis=1, window=1) == [8] * 6
    assert scales([BAD, GOOD] * 3, constant=3, hysteresis=1, window=1) == [3] * 6
    scaler = GradientScaler(GradientScalerConfig(initial=2, hysteresis=1), Progress())
    assert scaler.after(LOST) is None
    assert scaler.after(BAD) == "the scale is now 1"
    assert scaler.after(BAD) is None, "no lower scale can help"
    patient = GradientScaler(GradientScalerConfig(), Progress())
    assert patient.after(BAD) == "overflow 1 of 2 that make it lower"


def tensors(folder: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(Path(folder))
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors().items()}
    checkpoint.load_into(found)
    return found


@pytest.mark.usefixtures("tiny")
def test_a_run_in_fp16_follows_that_in_fp32() -> None:
    assert train(loaded(*SMOOTH)) == 0
    assert train(loaded(*SMOOTH, FP16, "run.experiment_dir=half")) == 0
    exact, half = losses("run"), losses("half")
    assert half == pytest.approx(exact, rel=2e-4)
    assert half != exact
    records = lines("half/metrics.jsonl")
    assert {record["loss_scale"] for record in records} == {64}
    assert all("loss_scale" not in record for record in lines("run/metrics.jsonl"))
    # 11 bits against 24, twelve steps on.
    for name, tensor in tensors("half/checkpoint/12").items():
        assert tensor.dtype == torch.float32
        if name.startswith("model."):
            torch.testing.assert_close(tensor, tensors("run/checkpoint/12")[name], rtol=0, atol=2e-3)
    norms = [[r["grad_norm"] for r in lines(f"{run}/metrics.jsonl")] for run in ("run", "half")]
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)


@pytest.mark.usefixtures("tiny")
def test_overflows_are_skipped_and_recovered_from() -> None:
    """From a scale at which the logits' gradients are infinite, through more overflows than skipped steps are borne."""
    keys = (FP16, "optimizer.gradient_scaler={initial: 524288, window: 4}", "training.max_skipped_steps=2")
    assert train(loaded(*keys)) == 0
    records = {record["iteration"]: record for record in lines("run/metrics.jsonl")}
    events = [event for event in lines("run/events.jsonl") if event["event"] == "overflow"]
    falling = [event["loss_scale"] for event in events]
    assert falling[:3] == [524288, 524288, 262144]
    assert len(falling) > 4
    assert all(later in (earlier, earlier / 2) for earlier, later in itertools.pairwise(falling))
    assert (
        "the gradient overflows at loss scale 262144; the step is skipped, the scale is now 131072"
        in events[2]["text"]
    )
    assert not [event for event in lines("run/events.jsonl") if event["event"] == "skipped"]
    assert records[12]["skipped_steps"] == len(events)
    assert records[12]["grad_norm"] is not None
    assert records[1]["grad_norm"] is None
    assert records[1]["loss"] == pytest.approx(math.log(32), rel=0.2)
    assert records[12]["loss_scale"] == pytest.approx(falling[-1] / 2)
    # The weights are those of a run that had so many batches less.
    assert Checkpoint(Path("run/checkpoint/12")).state["optimizer_steps"] == 12 - len(events)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("scaler", ["{constant: 1e9}", "{initial: 1e9, minimum: 1e9}"])
def test_where_the_scale_cannot_fall_the_run_stops(scaler: str) -> None:
    keys = (FP16, f"optimizer.gradient_scaler={scaler}", "training.max_skipped_steps=3")
    with pytest.raises(RunFailed, match=r"3 steps in a row were skipped \(last: the gradient norm is"):
        train(loaded(*keys))


@pytest.mark.usefixtures("tiny")
def test_a_resumed_run_is_the_same_to_the_bit() -> None:
    """Stopped between an overflow and the next, and in the middle of a window."""
    keys = (FP16, "optimizer.gradient_scaler={initial: 131072, window: 3}")
    assert train(loaded(*keys, "run.experiment_dir=whole")) == 0
    for stop in (1, 3, 7, 8, 12):
        assert train(loaded(*keys, f"training.train_iters={stop}")) == 0
    assert losses() == losses("whole")
    scale = [
        {r["iteration"]: r["loss_scale"] for r in lines(f"{run}/metrics.jsonl")} for run in ("run", "whole")
    ]
    assert scale[0] == scale[1]
    assert len(set(scale[1].values())) > 2
    whole, resumed = tensors("whole/checkpoint/12"), tensors("run/checkpoint/12")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    states = [Checkpoint(Path(f"{run}/checkpoint/12")).state["progress"] for run in ("run", "whole")]
    assert states[0] == states[1]
    assert states[0]["loss_scale"] == scale[1][12]


def trained(*overrides: str) -> int:
    return train(loaded(*overrides))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "layout",
    [
        ("model.multi_stage.zero_stage=3",),
        ("model.distributed.pipeline_parallel=2",),
    ],
    ids=["ZeRO 3", "pipeline"],
)
def test_two_processes_are_one_within_rounding(layout: tuple[str, ...]) -> None:
    """They overflow in the same steps, too."""
    keys = (FP16, "optimizer.gradient_scaler={initial: 131072}", "model.base_model.transformer.num_layers=2")
    short = (
        "batch.micro_batch_size=2",
        "training.train_iters=16",
        "optimizer.learning_rate.base=0.003",
        "training.compile=no",
    )
    assert train(loaded(*keys, *short)) == 0
    assert run_distributed(trained, 2, *keys, *short, *layout, "run.experiment_dir=two") == [0, 0]
    one, two = (lines(f"{run}/metrics.jsonl") for run in ("run", "two"))
    assert [r["loss_scale"] for r in two] == [r["loss_scale"] for r in one]
    assert [r["skipped_steps"] for r in two] == [r["skipped_steps"] for r in one]
    assert 0 < one[-1]["skipped_steps"] < 14
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=2e-4)
    finite = [(a["grad_norm"], b["grad_norm"]) for a, b in zip(one, two) if a["grad_norm"] is not None]
    assert [b for _, b in finite] == pytest.approx([a for a, _ in finite], rel=5e-3)
