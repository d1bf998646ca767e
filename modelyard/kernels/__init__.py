"""Own kernels in Triton for what is bound by memory, each beside its twin in torch.

    kernel          twin                                    what it saves
    rms_norm        model/elementwise.rms_norm_plain        the residual sum's passes, and what a norm is written to between
    rotary          model/elementwise.rotate_plain          a launch; the wide copies of queries and keys
    swiglu          model/elementwise.swiglu_plain          what silu(gate) is written to between
    cross_entropy   loss/cross_entropy._exponentials        most passes over the logits, and their wide copy
    adamw           torch.optim.AdamW                       passes over gradients and masters beside the update's own

They compute inside in fp32 whatever they read, and give the same bits run after run: no sum depends on which program
comes first. docs/performance-log.md has each one's bytes, beside the fewest possible.

A tensor goes through them where `available` says so: `training.kernels` chose them, and the tensor lies on a CUDA device.
In a process that starts with TRITON_INTERPRET=1, Triton's interpreter takes CPU tensors too; so are they tested. Nothing
here imports triton before that: the modules of the kernels do, and are imported where they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

Choice = Literal["torch", "triton"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its kernels in Python; it reads the variable once, too, when a kernel is defined."""

_choice: Choice = "torch"


def choose(choice: Choice) -> None:
    """Which of the twins this process computes with from now on. Raises ValueError where it cannot (`obstacle`)."""
    global _choice
    if choice == "triton":
        if problem := obstacle():
            raise ValueError(f"the kernels in Triton need {problem}")
        for module in ("rms_norm", "rotary", "swiglu", "cross_entropy", "adamw"):
            # Now: their operators are to be there before a compiler comes by.
            importlib.import_module(f"{__name__}.{module}")
    _choice = choice


@contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """`choose` for a while."""
    before = _choice
    choose(choice)
    try:
        yield
    finally:
        choose(before)


def obstacle() -> str | None:
    """What Triton's kernels need and this machine has not; None where they can run."""
    if not (INTERPRETED or torch.cuda.is_available()):
        return "a CUDA device, and there is none"
    if importlib.util.find_spec("triton") is None:
        return "the package triton, which is not installed"
    return None


def available(*tensors: Tensor) -> bool:
    """Whether these tensors go through Triton's kernels; the one place that decides it."""
    if _choice != "triton":
        return False
    return all((t.is_cuda or (INTERPRETED and t.is_cpu)) and t.dtype in DTYPES for t in tensors)


P = ParamSpec("P")
R = TypeVar("R")


def operator(shapes: Callable[P, Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a function that launches kernels: to a compiler it is one operator, whose results `shapes` makes empty.

    Eagerly the function itself is called: an operator's call takes longer than a small kernel.
    """

    def decorate(launch: Callable[P, R]) -> Callable[P, R]:
        compiled: Any = torch.library.custom_op(f"modelyard::{launch.__name__}", launch, mutates_args=())
        compiled.register_fake(shapes)

        @wraps(launch)
        def call(*arguments: P.args, **options: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                out: R = compiled(*arguments, **options)
                return out
            return launch(*arguments, **options)

        return call

    return decorate


def warps(values: int) -> int:
    """How many warps share so many values of each tensor: 16 bytes of bf16 for each thread twice over, 4 to 16 warps."""
    return min(max(values // (32 * 16), 4), 16)
