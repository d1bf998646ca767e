"""This machine as hardware: measured on the smallest sizes there are, kept, and measured again when it should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modelyard.config.layout import Layout
from modelyard.plan import machine
from modelyard.plan.duration import duration_of
from modelyard.plan.hardware import cluster_of
from modelyard.plan.machine import Sizes, hardware_from, measure, this_machine
from modelyard.plan.workload import Workload

TINY = Sizes(
    tokens=64,
    widths=(8, 16, 32),
    large=(32, 16, 512),
    lengths=(8, 16),
    stream=(1 << 12, 1 << 16),
    update=1 << 12,
    dtypes=("float32",),
    seconds=0.002,
)
KEPT: dict[str, Any] = {
    "memory": 2**30,
    "bandwidth": 8e9,
    "peaks": {"float32": 2e11},
    "rates": {
        "products": {
            "float32": {
                direction: [[64, 1e11], [1024, 2e11]]
                for direction in ("output", "input gradient", "weight gradient")
            }
        },
        "large": {"float32": {"output": 1e11, "input gradient": 1e11, "weight gradient": 1e11}},
        "attentions": {"float32": {"forward": [[64, 1e10]], "backward": [[64, 1e10]]}},
        "streams": [[1 << 20, 1e10], [1 << 26, 8e9]],
        "updates": 1e10,
        "exponential": {"float32": 1e9},
        "messages": [],
        "dispatch": 1e-5,
        "together": 0.9,
    },
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "modelyard"


def test_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MIDDLE", (machine.SMALL, 1, 16))
    before = torch.get_rng_state()
    found = measure(TINY)
    assert torch.equal(torch.get_rng_state(), before)
    rates = found["rates"]
    for curve in rates["products"]["float32"].values():
        assert [size for size, _ in curve] == [8, 16, 32]
        # Between a hundredth of what the slowest processor does and a thousand times what the fastest does.
        assert all(1e6 < rate < 1e15 for _, rate in curve)
    assert [size for size, _ in rates["streams"]] == [1 << 12, 1 << 16]
    assert 1e-7 < rates["dispatch"] < 1e-2
    assert rates["together"] > 0
    assert found["memory"] > 2**27
    kept = {"machine": machine.fingerprint(), "date": "2026-01-01", **json.loads(json.dumps(found))}
    hardware = hardware_from(kept)
    assert hardware.is_gpu is torch.cuda.is_available()
    assert hardware.peak("float32") == max(rate for _, rate in rates["products"]["float32"]["output"])
    work = Workload(machine.SMALL, Layout(), 2, 1, 16, dtype="float32")
    assert duration_of(work, cluster_of(hardware, 1)).step > 0


def test_it_is_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = []

    def measured() -> dict[str, Any]:
        times.append(1)
        return json.loads(json.dumps(KEPT))

    monkeypatch.setattr(machine, "measure", measured)
    first = this_machine()
    assert first.name == "this-machine"
    assert first.memory == 2**30
    assert first.rates.matmul("float32", 64, 2048, 2048, "output") == 1e11
    assert first.rates.together == 0.9
    assert "measured on" in first.sources["all"]
    assert this_machine() == first
    assert len(times) == 1
    (path,) = cache.iterdir()
    assert json.loads(path.read_text())["machine"] == machine.fingerprint()
    assert this_machine(again=True) == first
    assert len(times) == 2
    # What another machine, or a torn file, left there is not believed.
    for wrong in ("{", json.dumps({**json.loads(path.read_text()), "machine": {"cores": 99}})):
        path.write_text(wrong)
        assert this_machine() == first
    assert len(times) == 4


def test_threads_are_part_of_what_a_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    one = machine.cache_file()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert machine.cache_file() != one


def test_a_gpu_by_torchs_name() -> None:
    for torch_name, memory, name in (
        ("NVIDIA H200", 140, "h200"),
        ("NVIDIA H100 80GB HBM3", 79, "h100"),
        ("NVIDIA RTX A6000", 47, "a6000"),
        ("NVIDIA A100-SXM4-80GB", 79, "a100"),
        ("NVIDIA A100-SXM4-40GB", 39, "a100-40gb"),
    ):
        found = machine.known_gpu(torch_name, memory * 2**30)
        assert found is not None
        assert found.name == name
    assert machine.known_gpu("Radeon", 2**34) is None
