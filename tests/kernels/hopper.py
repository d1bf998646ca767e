"""Compile every kernel for an H100 or H200 (sm_90), at Llama-3.1-8B's shapes, without a GPU; print what the assembler says.

python -m tests.kernels.hopper prints JSON: kernel → registers and spilled bytes of a thread, shared memory of a program,
loads, fetches ahead (into shared memory) and stores of global memory by their bytes. It runs as its own process, for the tests beside it interpret the kernels.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

HIDDEN, HEADS, GROUPS, HALF = 4096, 32, 8, 64


class Case(NamedTuple):
    module: str
    kernel: str
    arguments: dict[str, str]
    """Types of the runtime arguments, in Triton's words."""
    constants: dict[str, Any]
    warps: int
    any_number: tuple[str, ...] = ()
    """Runtime integers and pointers that are no multiple of 16."""


def cases() -> dict[str, Case]:
    import triton.language as tl

    from modelyard.kernels import adamw, cross_entropy, swiglu, warps

    def half(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "*bf16")

    def typed(kind: str, *names: str) -> dict[str, str]:
        return dict.fromkeys(names, kind)

    norm = {"SIZE": HIDDEN, "IS_SUM": True, "BLOCK": HIDDEN}
    return {
        "norm of a sum, forward": Case(
            "rms_norm",
            "forward_kernel",
            half("x", "added", "weight", "total", "out") | {"inverse": "*fp32", "epsilon": "fp32"},
            norm,
            warps(HIDDEN),
        ),
        "norm of a sum, backward": Case(
            "rms_norm",
            "backward_kernel",
            half("x", "weight", "gradient", "sum_gradient", "x_gradient")
            | typed("*fp32", "inverse", "partial")
            | typed("i32", "rows", "stretch"),
            norm | {"OF_WEIGHT": True},
            warps(HIDDEN),
            any_number=("stretch",),
        ),
        "rotary": Case(
            "rotary",
            "rotate_kernel",
            half("q", "k", "q_out", "k_out") | typed("*fp32", "cos", "sin") | typed("i32", "q_row", "k_row"),
            {"Q_HEADS": HEADS, "K_HEADS": GROUPS, "HALF": HALF, "BACK": False}
            | {"Q_BLOCK": HEADS, "K_BLOCK": GROUPS, "HALF_BLOCK": HALF},
            warps(HEADS * HALF),
        ),
        "swiglu, forward": Case(
            "swiglu",
            "forward_kernel",
            half("gate", "up", "out") | typed("i32", "gate_row", "up_row", "columns"),
            {"BLOCK": swiglu.BLOCK},
            4,
        ),
        "swiglu, backward": Case(
            "swiglu",
            "backward_kernel",
            half("gate", "up", "gradient", "gate_gradient", "up_gradient")
            | typed("i32", "gate_row", "up_row", "columns"),
            {"BLOCK": swiglu.BLOCK},
            4,
        ),
        "cross-entropy": Case(
            "cross_entropy",
            "gradient_kernel",
            half("logits")
            | {"targets": "*i64", "losses": "*fp32"}
            | typed("i32", "words", "row_stride")
            | typed("fp32", "logits_scale", "gradient_scale", "z_loss"),
            {"BLOCK": cross_entropy.BLOCK},
            cross_entropy.WARPS,
        ),
        "adamw": Case(
            "adamw",
            "adamw_kernel",
            {"addresses": "*i64", "numbers": "*fp32", "chunks": "*i32"}
            | typed("fp32", "rate", "factor", "beta_1", "beta_2", "correction_1", "root_correction_2")
            | {"epsilon": "fp32"},
            {"HAS_COPY": True, "COPY_DTYPE": tl.bfloat16, "ALIGNED": True}
            | {"CHUNK": adamw.CHUNK, "BLOCK": adamw.BLOCK},
            adamw.WARPS,
        ),
    }


def compiled(case: Case) -> dict[str, Any]:
    """What one kernel became."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"modelyard.kernels.{case.module}"), case.kernel)
    signature = case.arguments | dict.fromkeys(case.constants, "constexpr")
    multiples = [
        (kernel.arg_names.index(name),)
        for name, kind in case.arguments.items()
        if (kind[0] == "*" or kind == "i32") and name not in case.any_number
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in case.constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in multiples},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": case.warps})
    ptx = binary.asm["ptx"]
    widths: Counter[str] = Counter()
    for operation, vector, bits in re.findall(
        r"\b(ld|st)\.global(?:\.[a-zA-Z_0-9:]+)*?(?:\.(v[248]))?\.[bfus](\d+)", ptx
    ):
        widths[f"{operation} {int(bits) // 8 * int((vector or 'v1')[1:])}"] += 1
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)", ptx):
        widths[f"ahead {int(size, 0)}"] += 1
    return {
        **_resources(binary.asm["cubin"]),
        "shared": binary.metadata.shared,
        "warps": case.warps,
        "accesses": dict(sorted(widths.items())),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and its bytes of stack, where spilled registers would be."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        said = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said))
    return {"registers": int(numbers["REG"]), "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"])}


if __name__ == "__main__":
    json.dump({name: compiled(case) for name, case in cases().items()}, sys.stdout, indent=1)
