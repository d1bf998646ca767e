"""Every kernel under Triton's interpreter, on a CPU: the cases of `tests.kernels.cases`, in a process of their own.

Triton reads TRITON_INTERPRET when a kernel is defined, and other tests want it defined otherwise.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.kernels.cases import CASES


def missing() -> str | None:
    """Why the interpreter cannot run; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed (pip install triton)"
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        return "the interpreter of triton before 3.7 needs numpy < 2.4"
    return None


def version(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SLOW = {"compiled blocks that recompute take them too"}
QUICK = [name for name in CASES if name not in SLOW]


@functools.cache
def results(*names: str) -> dict[str, str | None]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cases", *names],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", QUICK)
def test_interpreted(name: str) -> None:
    problem = results(*QUICK)[name]
    assert problem is None, problem


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
def test_interpreted_slowly(name: str) -> None:
    problem = results(name)[name]
    assert problem is None, problem
