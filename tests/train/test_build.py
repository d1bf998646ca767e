"""What a config asks of the machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modelyard.config.model import DistributedConfig
from modelyard.errors import UserError
from modelyard.train.build import compiles


def _config(compile: Any, **distributed: Any) -> Any:
    return SimpleNamespace(
        training=SimpleNamespace(compile=compile),
        model=SimpleNamespace(distributed=DistributedConfig(**distributed)),
    )


@pytest.mark.parametrize(
    ("wanted", "device", "expected"),
    [
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        (False, "cuda", False),
        (False, "cpu", False),
        (True, "cuda", True),
        (True, "cpu", True),
    ],
)
def test_blocks_are_compiled_on_a_gpu_or_where_asked(
    wanted: Any, device: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "true")  # a program that every machine has
    assert compiles(_config(wanted), torch.device(device)) is expected


@pytest.mark.parametrize(
    ("schedule", "expected"), [("1f1b", True), ("interleaved", True), ("zero_bubble", False), ("zbv", False)]
)
def test_auto_compiles_no_backward_that_is_split(schedule: str, expected: bool) -> None:
    gpu = torch.device("cuda")
    assert compiles(_config("auto", pipeline_parallel=2, pipeline_schedule=schedule), gpu) is expected
    assert compiles(_config("auto", pipeline_schedule=schedule), gpu)  # there is no pipeline


def test_without_a_compiler_a_cpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match=r"training\.compile: yes needs a C\+\+ compiler, and there is no no-such"
    ):
        compiles(_config(True), torch.device("cpu"))
    assert compiles(_config("auto"), torch.device("cpu")) is False
