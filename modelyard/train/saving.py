"""A checkpoint on its way to the disk while training goes on."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from modelyard.parallel.world import World


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory, which training does not touch any more.

    Of tensors on a GPU they are pinned. Those of the host lie in a mapping of their own, which goes back to the system with
    the last of them: what is freed otherwise stays with the process (`train.allocator`), and this is much.
    """
    sizes = {name: -(-tensor.nbytes // _ALIGNED) * _ALIGNED for name, tensor in tensors.items()}
    on_gpu = any(tensor.is_cuda for tensor in tensors.values())
    memory = None if on_gpu or not sum(sizes.values()) else mmap.mmap(-1, sum(sizes.values()))
    copies, offset = {}, 0
    for name, tensor in tensors.items():
        if memory is None or not tensor.numel():
            copy = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu, requires_grad=False)
        else:
            copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
            copy = copy.view(tensor.shape)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
        offset += sizes[name]
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return copies


_ALIGNED = 64
"""Bytes that a tensor begins at a multiple of."""


class Saver:
    """Does one piece of work at a time, beside the training or in its place, and keeps how it ended until asked."""

    def __init__(self, world: World, *, asynchronous: bool):
        """All processes must call it alike."""
        self._here = world
        self._beside = world.twin() if asynchronous else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.busy = False
        """Whether there is work that `finish` was not asked about yet."""

    @property
    def ended(self) -> bool:
        """Whether there is such work, and it is over."""
        return self.busy and (self._thread is None or not self._thread.is_alive())

    def start(self, work: Callable[[World], None], *, wait: bool) -> None:
        """Begin `work`, which talks to the other processes through the world that it is given; `wait` until it is over.

        Errors come out of `finish`.
        """
        assert not self.busy, "one at a time"
        self.busy = True
        if wait or self._beside is None:
            self._do(work, self._here)
            return
        self._thread = threading.Thread(
            target=self._do, args=(work, self._beside), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _do(self, work: Callable[[World], None], world: World) -> None:
        try:
            work(world)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait for the work, however it ends."""
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """Wait for the work, and raise what went wrong in it."""
        self.wait()
        error, self._error, self._thread, self.busy = self._error, None, None, False
        if error is not None:
            raise error
