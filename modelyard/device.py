"""What kind of device a tensor is computed on, where that decides how much is worked on at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_as_on_gpu: ContextVar[bool] = ContextVar("as_on_gpu", default=False)


def on_gpu(tensor: Tensor) -> bool:
    """Whether pieces are those of a GPU, which wants many at once, and not of a CPU, which wants them in its cache."""
    return tensor.is_cuda or _as_on_gpu.get()


@contextmanager
def as_on_gpu(so: bool = True) -> Iterator[None]:
    """Within, if `so`, tensors of any device are taken in the pieces of a GPU: a dry run of what is meant for one."""
    token = _as_on_gpu.set(so)
    try:
        yield
    finally:
        _as_on_gpu.reset(token)
