"""What the kernels must compute, as functions of a device: against torch's own operations in fp64, and against their twins.

TRITON_INTERPRET=1 python -m tests.kernels.cases [part of a name …]    on a CPU; prints JSON, case → null or what went wrong
python -m tests.kernels.cases                                           on a GPU

No pytest: machines with a GPU may have torch alone. Shapes are small, for the interpreter takes 20 ms a launch. It cuts bf16
where a device rounds, so that bf16 is off by up to two roundings there, and fp16 by one.
"""

from __future__ import annotations

import json
import sys
import time
import traceback

import torch

from modelyard import kernels
from tests.kernels import parts, steps  # noqa: F401  (each case enters itself)
from tests.kernels.checking import CASES


def run(names: list[str], device: torch.device) -> dict[str, str | None]:
    """Case → None, or what went wrong in it."""
    results: dict[str, str | None] = {}
    for name in names:
        begin = time.perf_counter()
        try:
            CASES[name](device)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{time.perf_counter() - begin:6.2f} s  {name}", file=sys.stderr)
    return results


if __name__ == "__main__":
    wanted = [name for name in CASES if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    results = run(wanted, torch.device("cpu" if kernels.INTERPRETED else "cuda"))
    print(json.dumps(results, indent=1))
    sys.exit(any(results.values()))
