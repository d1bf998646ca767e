"""Copies between a device and its host as a test wants them: both sides on the CPU, and none made before it must be."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class AtOnce:
    """Every copy is made when it is asked for."""

    is_pinned = False

    def start(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def finish(self, copy: None) -> None:
        pass


class Late:
    """Copies in order, each made no sooner than somebody waits for it or for a later one: as a slow link would have it.

    AssertionError where the device's memory was given back before; memory that is copied to holds no numbers until then.
    """

    is_pinned = False

    def __init__(self) -> None:
        self.log: list[str] = []
        """`out 0`, `out 0 done`, `back 0`, `back 0 done`: what was asked for, by the number of the input, and waited for."""
        self.hosts: dict[int, Tensor] = {}
        """The host's buffers, by address."""
        self.most = 0
        """Largest number of inputs that had come back and were on the device at one time."""
        self.waiting: deque[tuple[str, Callable[[], object]]] = deque()
        self._inside: dict[int, int] = {}
        """Address of a buffer -> number of the input that it holds."""
        self._came: list[StorageWeakRef] = []
        self._count = 0

    def start(self, target: Tensor, source: Tensor) -> str:
        is_back = source.data_ptr() in self.hosts
        work = self._back(target, source) if is_back else self._out(target, source)
        number = self._inside[(source if is_back else target).data_ptr()]
        name = f"{'back' if is_back else 'out'} {number}"
        self.log.append(name)
        self.waiting.append((name, work))
        return name

    def finish(self, copy: str) -> None:
        self.log.append(f"{copy} done")
        while copy in [name for name, _ in self.waiting]:
            self.waiting.popleft()[1]()

    def _out(self, host: Tensor, x: Tensor) -> Callable[[], object]:
        self.hosts[host.data_ptr()] = host
        self._inside[host.data_ptr()] = self._count
        self._count += 1
        values, there = x.detach().clone(), StorageWeakRef(x.untyped_storage())

        def work() -> None:
            assert not there.expired(), "an input was let go of before it had left"
            host.copy_(values)

        return work

    def _back(self, x: Tensor, host: Tensor) -> Callable[[], object]:
        x.fill_(torch.nan)
        there = weakref.ref(x)
        self._came.append(StorageWeakRef(x.untyped_storage()))
        self.most = max(self.most, sum(not ref.expired() for ref in self._came))

        def work() -> None:
            target = there()
            assert target is not None, "an input was let go of before it had come"
            with torch.no_grad():
                target.copy_(host)

        return work
