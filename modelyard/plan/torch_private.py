"""What tracing takes from torch that has no public door: tensors without memory, and processes that are not there.

Checked on torch 2.11 and 2.13; another version that lacks one of these says so when a trace is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from torch._C._distributed_c10d import FakeWork
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError as error:  # pragma: no cover
    raise RuntimeError(
        f"torch {torch.__version__} has another dry run; tracing needs torch 2.11 to 2.13"
    ) from error

DispatchMode = TorchDispatchMode
ValueNeeded = (DataDependentOutputException, DynamicOutputShapeException)
"""What an operation on tensors without values raises where its result's shape, or a number, depends on them."""


def fake_tensors() -> FakeTensorMode:
    """Within, operations give tensors that have a shape, a dtype and a device, and no memory. Real ones may take part."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor would be; to ask a fake one for its `device` is an operation."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def fake_of(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor without memory of the shape of a real one; the same object each time it is asked for."""
    return mode.from_tensor(tensor)


def for_real() -> AbstractContextManager[None]:
    """Within, no mode sees what is computed."""
    return torch._C._DisableTorchDispatch()


def done() -> Any:
    """What a collective gives to wait for, of one that nobody takes part in."""
    return FakeWork().boxed()


@contextmanager
def fake_processes(rank: int, world: int) -> Iterator[None]:
    """torch.distributed as process `rank` of `world` sees it; the others are not there, and what they send has no value."""
    if dist.is_initialized():
        raise RuntimeError("there are processes already: trace in one of its own")
    hook = sys.excepthook  # torch puts one there that names the rank, for good
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


@contextmanager
def resizes_seen(seen: Callable[[torch.UntypedStorage], object]) -> Iterator[None]:
    """Within, `seen` is called after every `resize_` of a storage: FSDP frees and takes memory by it, and no mode is told."""
    resize = torch.UntypedStorage.resize_

    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        seen(storage)

    torch.UntypedStorage.resize_ = resize_and_tell  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
