"""A checkpoint on its way to the disk while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from modelyard.parallel.world import World


class HostCopies:
    """Copies of tensors in the host's memory, pinned where they come from a GPU.

    The memory is kept for the next time: it has to be there at every save, and fresh pages take longer than the copy.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of these, by name, which stay as they are until the next call."""
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        for name, tensor in tensors.items():
            if name not in self._kept:
                self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            self._kept[name].copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return {name: self._kept[name] for name in tensors}


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
