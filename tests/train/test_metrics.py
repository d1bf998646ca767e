import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modelyard.config.adapter import Adapter
from modelyard.config.architecture import Architecture
from modelyard.train.metrics import (
    MetricsLog,
    model_flops_per_second,
    peak_flops,
    training_line,
    utilization,
)


def test_starting_again_drops_later_and_torn_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resumed_at=0, tensorboard=False)
    for iteration in (1, 2, 3):
        log.write({"iteration": iteration, "loss": 1 / iteration}, prefix="training")
    log.write({"iteration": 2, "evaluator": "validation", "loss": 0.1}, prefix="validation")
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 1, "lo')
    log = MetricsLog(tmp_path, resumed_at=2, tensorboard=False)
    log.close()
    assert log.evaluated == {"validation"}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["iteration"], r["loss"]) for r in lines] == [(1, 1.0), (2, 0.5), (2, 0.1)]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, resumed_at=0, tensorboard=True)
    log.write(
        {"iteration": 7, "loss": 2.5, "evaluator": "x", "seconds": {"data": 0.25}, "loss_mean": None},
        prefix="training",
    )
    log.write({"iteration": 8, "loss": 9.0}, prefix="training")
    log.close()
    log = MetricsLog(tmp_path, resumed_at=7, tensorboard=True)  # what was after 7 is void
    log.write({"iteration": 8, "loss": 2.0}, prefix="training")
    log.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["training/loss", "training/seconds/data"]
    assert [(e.step, e.value) for e in events.Scalars("training/loss")] == [(7, 2.5), (8, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("training/seconds/data")] == [(7, 0.25)]


def test_utilization_of_the_published_8b_run() -> None:
    """10,100 tokens/s per H100 at 4,096 tokens is 487 TFLOP/s, 49.2% of 989 (causal), as Fast-LLM prints."""
    shape = Architecture(128256, 4096, 32, 32, 8, 128, 14336)
    shares = utilization(shape, 4096, 10_100, 989e12)
    assert shares["mfu_causal"] == pytest.approx(0.493, abs=0.001)
    assert shares["mfu_full"] == pytest.approx(shares["mfu_causal"] + 0.033, abs=0.001)
    assert utilization(shape, 4096, 10_100, None) == {}
    assert model_flops_per_second(shape, 4096, 10_100) == pytest.approx(487e12, rel=0.005)


def test_what_is_frozen_is_not_counted_as_trained() -> None:
    """A step of the 8B shape with LoRA: 4 FLOPs a frozen weight for each token, 6 a weight of the adapter."""
    shape = Architecture(128256, 4096, 32, 32, 8, 128, 14336)
    adapter = Adapter(16, 32.0, ("q_proj", "v_proj"))
    weights = shape.parameter_count() - 128256 * 4096 - 65 * 4096  # without the embedding and the norms
    own = 32 * 16 * (4096 + 4096 + 4096 + 1024)
    attention = shape.attention_flops_per_token(4096, causal=True)
    assert model_flops_per_second(shape, 4096, 1.0, adapter=adapter) == 4 * weights + 6 * own + attention
    beside = replace(adapter, freeze_others=False)
    assert model_flops_per_second(shape, 4096, 1.0, adapter=beside) == 6 * (weights + own) + attention


@pytest.mark.parametrize(
    ("name", "bfloat16", "float16"),
    [
        ("NVIDIA H200", 989e12, 989e12),
        ("Tesla V100-SXM2-16GB", None, 125e12),
        ("Tesla T4", None, 65e12),
        ("other", None, None),
    ],
)
def test_peaks(
    name: str, bfloat16: float | None, float16: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda")
    assert peak_flops(device, torch.bfloat16) == bfloat16
    assert peak_flops(device, torch.float16) == float16
    assert peak_flops(device, torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.float16) is None


def test_line_for_people() -> None:
    record = {
        "iteration": 10, "loss": 2.34567, "learning_rate": 3e-4, "grad_norm": 1.23456, "tokens_per_second": 12345.6,
        "memory_bytes": 2**30, "data_wait_share": 0.015, "skipped_steps": 2, "trained_share": 0.95,
    }  # fmt: skip
    assert training_line(record, 100, 3661) == (
        "iteration 10/100 | loss 2.3457 | lr 3.000e-04 | grad norm 1.235 | 12,346 tokens/s | memory 1.00 GiB | "
        "data wait 1.5% | skipped 2 | ETA 1:01:01"
    )
    half = training_line({**record, "trained_share": 0.5234}, 100, 1)
    assert "| trained 52.3% |" in half
    starved = training_line({**record, "data_wait_share": 0.25}, 100, 1)
    assert "| data wait 25.0%: TRAINING WAITS FOR DATA |" in starved
    assert "| loss not finite |" in training_line({**record, "loss": None}, 100, 1)
