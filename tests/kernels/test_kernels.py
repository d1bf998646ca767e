"""Which tensors go through the kernels, and what a config that wants them is told."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import kernels as benchmark
from modelyard import kernels
from modelyard.errors import UserError
from modelyard.train.build import chosen_kernels


def config(choice: str, dtype: str = "float32") -> Any:
    return SimpleNamespace(
        training=SimpleNamespace(kernels=choice),
        model=SimpleNamespace(distributed=SimpleNamespace(training_dtype=dtype)),
    )


def has(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, triton: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (object() if triton else None) if name == "triton" else find(name),
    )


class OnCuda:
    """What `available` asks of a tensor."""

    is_cuda, is_cpu = True, False

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


def test_only_cuda_tensors_of_these_dtypes_and_only_where_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow: Any = OnCuda(torch.bfloat16)
    wide: Any = OnCuda(torch.float64)
    assert not kernels.available(narrow)
    monkeypatch.setattr(kernels, "_choice", "triton")
    assert kernels.available(narrow)
    assert kernels.available(narrow, narrow)
    assert not kernels.available(narrow, wide)
    assert not kernels.available(narrow, torch.zeros(1))
    assert not kernels.available(torch.zeros(1))
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert kernels.available(torch.zeros(1))
    assert not kernels.available(torch.zeros(1, dtype=torch.float64))
    assert not kernels.available(torch.zeros(1, device="meta"))


@pytest.mark.parametrize(
    ("cuda", "triton", "problem"),
    [
        (False, True, "a CUDA device, and there is none"),
        (True, False, "the package triton, which is not installed"),
        (False, False, "a CUDA device, and there is none"),
    ],
)
def test_where_they_cannot_run_the_config_is_refused(
    cuda: bool, triton: bool, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, cuda=cuda, triton=triton)
    with pytest.raises(UserError, match=f"^training.kernels: triton needs {problem}; write kernels: auto$"):
        chosen_kernels(config("triton"))
    assert chosen_kernels(config("auto")) == chosen_kernels(config("torch")) == "torch"
    with pytest.raises(ValueError, match=problem):
        kernels.choose("triton")
    assert kernels._choice == "torch"


def test_where_they_can_run_they_are_taken_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, cuda=True, triton=True)
    assert chosen_kernels(config("triton", "bfloat16")) == "triton"
    assert chosen_kernels(config("auto", "bfloat16")) == "torch"
    with pytest.raises(
        UserError, match=r"computes in float32, and model\.distributed\.training_dtype is float64"
    ):
        chosen_kernels(config("triton", "float64"))


def test_bytes_that_the_benchmark_counts_are_those_counted_by_hand() -> None:
    """Passes over [8192, 14336] of bf16. Torch: silu 2, times up 3; silu 2, times the gradient 3, gradient times up 3, silu's
    backward 3. The kernels: 3 and 5."""
    found = {part.name: part for part in benchmark.parts()}
    part, one = found["swiglu"], 2 * 8192 * 14336
    assert (part.fewest, part.moved, benchmark.counted(part)) == (8 * one, 8 * one, 16 * one)
    # Masters, gradients and both moments read, all but the gradients written, a copy in bf16 written: 16 + 12 + 2 bytes.
    assert found["adamw"].fewest * found["adamw"].calls == pytest.approx(30 * 8_030_261_248)
