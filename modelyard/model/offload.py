"""Where full recomputation leaves the inputs of blocks between forward and backward: in the host's memory.

Of a block that is recomputed whole only its input is kept, and with `Offload` not even that stays on the device: it goes to
pinned host memory while the block runs, and comes back while the block after it is recomputed (the way of Unsloth's
gradient checkpointing). What is left on the device is two inputs, the one in use and the one that comes next, whatever the
number of blocks.

Who waits for whom, on a GPU; the host waits for nothing. All copies are on one side stream, so that they follow each
other, and a buffer of the host can be written to as soon as it was given back.

    an input leaves     the side stream waits for all that was asked of the computation so far: the input is there
                        at the block's end the computation waits for the copy, and then the input is let go of
    an input comes      the side stream waits likewise: nobody uses the memory any more that it is written to
                        when the block needs it the computation waits for the copy

So memory is given back in the order of the computation, which the allocator relies on, and is never held longer than that.
A block shorter than its copy is waited for, rather than that inputs pile up.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor


class Copies(Protocol):
    """Copies between device and host, in order, beside the computation."""

    is_pinned: bool
    """Whether the host's side is in pinned memory."""

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Copy `source` as the computation leaves it so far; what to `finish`."""
        ...

    def finish(self, copy: Any) -> None:
        """Have what is computed from now on come after the copy."""
        ...


class SideStream:
    """On a GPU: a stream of its own."""

    is_pinned = True

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def finish(self, copy: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(copy)


class Offload:
    """The host memory of one process, and the copies there and back. Buffers are used again from step to step."""

    def __init__(self, copies: Copies):
        self.copies = copies
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)

    def borrow(self, x: Tensor) -> Tensor:
        """Host memory for a tensor like `x`."""
        free = self._free[x.shape, x.dtype]
        if free:
            return free.pop()
        return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=self.copies.is_pinned)

    def give_back(self, buffer: Tensor) -> None:
        """Have what `borrow` gave be used again, after the copies that were started."""
        self._free[buffer.shape, buffer.dtype].append(buffer)


class Away:
    """The input of a block in one forward; it is on its way to the host from the beginning.

    `before` is that of the block before, which the backward wants next. It lives as long as somebody may want the input, and
    then gives the buffer back.
    """

    def __init__(self, offload: Offload, x: Tensor, host: Tensor, before: Away | None):
        self._offload, self._host = offload, host
        self._before = None if before is None else weakref.ref(before)
        self._requires_grad = x.requires_grad
        self._device = x.device
        self._x: Tensor | None = x
        self._was_wanted = False
        self._on_its_way: tuple[Tensor, Any] | None = None
        """What is copied from or to on the device, and the copy."""
        self._on_its_way = x, self._start(host, x)

    def leave(self) -> None:
        """Let go of the input on the device: the block has run."""
        self._arrive()
        self._x = None

    def take(self) -> Tensor:
        """The input on the device. Has the one before come, too, where this is the first time that this one is wanted."""
        if self._x is not None:
            return self._x
        self.come()
        x = self._arrive()
        before = None if self._before is None else self._before()
        # Parts of a backward that run later on their own have no order that one could foresee.
        if before is not None and not self._was_wanted:
            before.come()
        self._was_wanted = True
        return x.requires_grad_(self._requires_grad)

    def come(self) -> None:
        """Have the input come to the device, unless it does."""
        if self._on_its_way is None:
            x = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            self._on_its_way = x, self._start(x, self._host)

    def _start(self, target: Tensor, source: Tensor) -> Any:
        with torch.no_grad():
            return self._offload.copies.start(target, source)

    def _arrive(self) -> Tensor:
        """What is copied, on the device, once it is."""
        assert self._on_its_way is not None
        x, copy = self._on_its_way
        self._offload.copies.finish(copy)
        self._on_its_way = None
        return x

    def __del__(self) -> None:
        if self._on_its_way is not None:  # a backward that broke off, or that this block has no part in
            self._arrive()
        self._offload.give_back(self._host)


class Inputs:
    """The inputs of the blocks of one part of a decoder, forward after forward."""

    def __init__(self, offload: Offload):
        self._offload = offload
        self._last: weakref.ref[Away] | None = None

    def begin(self) -> None:
        """A forward begins."""
        self._last = None

    def away(self, x: Tensor) -> Away:
        """Send the input of the next block away."""
        before = None if self._last is None else self._last()
        away = Away(self._offload, x, self._offload.borrow(x), before)
        self._last = weakref.ref(away)
        return away


def offload_on(device: torch.device) -> Offload | None:
    """What offloads from `device`; None where memory is the host's already."""
    return Offload(SideStream(device)) if device.type == "cuda" else None
