"""Every kernel compiled for an H100 or H200, without one: registers, spills, shared memory, widths of its accesses."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs the package triton, which is not installed (pip install triton)",
)
REGISTERS, SHARED = 65536, 232448
"""Of a multiprocessor of sm_90, and the bytes of it that one program may have (CUDA's programming guide, table of compute
capabilities)."""

# Kernel → programs that must fit on a multiprocessor together, warps of one, and the widths in bytes of its accesses to
# global memory. 16 are the widest. Narrower ones are numbers of a token (its inverse, target, loss), rotary's keys (4 values
# of each thread), tables and copies of `adamw`. "ahead" goes to shared memory and is waited for a round later.
EXPECTED: dict[str, tuple[int, int, set[str]]] = {
    "norm of a sum, forward": (8, 8, {"ld 16", "st 16", "st 4"}),
    "norm of a sum, backward": (2, 8, {"ahead 16", "ahead 4", "ld 16", "st 16"}),
    "rotary": (8, 4, {"ld 16", "ld 8", "st 16", "st 8"}),
    "swiglu, forward": (16, 4, {"ld 16", "st 16"}),
    "swiglu, backward": (8, 4, {"ld 16", "st 16"}),
    "cross-entropy": (1, 32, {"ahead 16", "ld 8", "ld 2", "st 16", "st 4"}),
    "adamw": (4, 8, {"ld 16", "ld 8", "ld 4", "st 16", "st 8"}),
}


@functools.cache
def compiled() -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.hopper"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_there_is_one_expectation_for_each_kernel() -> None:
    assert compiled().keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_kernel_becomes(name: str) -> None:
    programs, warps, widths = EXPECTED[name]
    found = compiled()[name]
    print(f"{name}: {found}")
    assert found["spilled"] == 0
    assert set(found["accesses"]) == widths
    registers = -(-found["registers"] // 8) * 8  # a warp is given them in eights for each thread
    assert registers * 32 * warps * programs <= REGISTERS
    assert found["shared"] * programs <= SHARED
    assert warps == found["warps"]


def test_what_moves_most_moves_in_widest_accesses() -> None:
    """By number: adamw reads 4 tensors and writes 3 of fp32 in 16 bytes a thread, and the narrow copy in 8."""
    accesses = compiled()["adamw"]["accesses"]
    assert (accesses["ld 16"], accesses["st 16"], accesses["st 8"]) == (4, 3, 1)
    assert compiled()["swiglu, backward"]["accesses"] == {"ld 16": 6, "st 16": 4}
