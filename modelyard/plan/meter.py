"""Counts what tensors hold and what processes send, as torch dispatches it: of real tensors and of ones without memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from modelyard.plan.torch_private import DispatchMode, device_of, resizes_seen

Key = tuple[str, str]
"""(kind of parallelism, operation)."""


@dataclass(eq=False)
class Held:
    """Memory of one storage, from its creation until it is freed."""

    bytes: int
    made_by: str
    """The operation."""
    phase: str
    """In which it was made."""
    shape: tuple[int, ...]
    """Of the first tensor on it."""
    dtype: str
    kind: str = ""
    """What it is for, where somebody said so."""


class Meter(DispatchMode):
    """Within, every storage that an operation makes is counted once, from then until nobody has it; and every collective.

    Not seen: what an operation takes for itself and gives back before it returns, and what an allocator rounds up or keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "build"
        self.now = 0
        """Bytes held."""
        self.sent: dict[Key, tuple[int, float]] = {}
        """Calls, and bytes that this process sends in a ring, since `start`."""
        self._held: dict[int, tuple[Held, weakref.ref[Any]]] = {}
        self._changes: list[tuple[Held, int]] = []
        self._before: dict[Held, int] = {}
        self._peak = self._peak_at = 0
        self._phase_peaks: dict[str, int] = {}
        self.tensor_group: str | None = None
        """The name of the group that shares matrices, where there is one."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        with resizes_seen(self._resized), self:
            yield

    def start(self) -> None:
        """Forget the highest point, and all messages, so far."""
        self.sent = {}
        self._changes, self._before = [], {held: held.bytes for held, _ in self._held.values() if held.bytes}
        self._peak, self._peak_at, self._phase_peaks = self.now, 0, {}

    def begin(self, phase: str) -> None:
        self.phase = phase
        self._phase_peaks[phase] = max(self.now, self._phase_peaks.get(phase, 0))

    @property
    def peak(self) -> int:
        """The most bytes held at once since `start`."""
        return self._peak

    @property
    def phase_peaks(self) -> dict[str, int]:
        """The same of every phase."""
        return dict(self._phase_peaks)

    def at_peak(self) -> list[tuple[Held, int]]:
        """What was held at the first highest point, and how many bytes each."""
        sizes = dict(self._before)
        for held, change in self._changes[: self._peak_at]:
            sizes[held] = sizes.get(held, 0) + change
        return [(held, size) for held, size in sizes.items() if size]

    def held_now(self) -> list[Held]:
        return [held for held, _ in self._held.values() if held.bytes]

    def mark(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Say what the memory of these tensors is for."""
        for tensor in tensors:
            if tensor is not None and (found := self._held.get(tensor.untyped_storage()._cdata)):
                found[0].kind = kind

    def stands_for(self, tensor: Tensor) -> None:
        """This tensor's memory is that of another one, which is counted."""
        self._see(tensor, "alias", counted=False)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if op.namespace == "prim":  # a question
            return op(*args, **(kwargs or {}))
        if op.namespace == "c10d":
            self._count(op._opname.strip("_"), args)
        result = op(*args, **(kwargs or {}))
        name = f"{op.namespace}.{op._opname}" if op.namespace != "aten" else op._opname
        for tensor in _tensors(result):
            if device_of(tensor).type != "meta":
                self._see(tensor, name)
        if op.namespace == "fsdp":
            self._mark_sharding(op._opname, args, result)
        return result

    # --- memory ---------------------------------------------------------------------------------------------------

    def _see(self, tensor: Tensor, name: str, *, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        held = Held(0, name, self.phase, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        self._held[key] = held, weakref.ref(storage, lambda _: self._freed(key))
        if counted:
            self._change(held, storage.nbytes())

    def _freed(self, key: int) -> None:
        held, _ = self._held.pop(key)
        self._change(held, 0)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if found := self._held.get(storage._cdata):
            found[0].kind = found[0].kind or "gathered"
            self._change(found[0], storage.nbytes())

    def _change(self, held: Held, size: int) -> None:
        change = size - held.bytes
        if not change:
            return
        held.bytes = size
        self.now += change
        self._changes.append((held, change))
        if self.now > self._phase_peaks.get(self.phase, 0):
            self._phase_peaks[self.phase] = self.now
        if self.now > self._peak:
            self._peak, self._peak_at = self.now, len(self._changes)

    def _mark_sharding(self, name: str, args: Any, result: Any) -> None:
        """FSDP's own operations: parameters are copied into the buffer that is gathered and out of the one that came, and
        gradients into the one that is reduced."""
        kind = "gradients" if name.startswith("chunk_cat") else "gathered"
        if name.startswith("all_gather_copy_in"):
            self.mark(_tensors(result), kind)
        else:
            self.mark([*_tensors(args)], kind)

    # --- messages -------------------------------------------------------------------------------------------------

    def _count(self, name: str, args: Any) -> None:
        if name.startswith("recv"):
            return  # counted where it is sent
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        ring = (group.size() - 1) / group.size()
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        size = first.numel() * first.element_size()
        if name == "allreduce":
            is_step = first.dtype == torch.float64 and first.shape == (5,)
            kind = "tensor" if group.group_name == self.tensor_group else "replicate"
            key, sent = ("step" if is_step else kind, "all-reduce"), 2 * size * ring
        elif name == "send":
            key, sent = ("pipeline", "send"), float(size)
        elif name in ("allgather_base", "reduce_scatter_base"):
            # FSDP sends flat stretches of parameters, tensor parallelism [tokens, hidden], contexts [tokens, groups, head].
            kind = {1: "weights", 2: "tensor", 3: "context"}[first.dim()]
            gathers = name == "allgather_base"
            key = kind, "all-gather" if gathers else "reduce-scatter"
            sent = size * ring if gathers else size * group.size() * ring
            if kind == "weights":
                self.mark(args[:1] if gathers else args[:2], "gathered" if gathers else "gradients")
        else:
            raise NotImplementedError(f"{name} is not counted")
        calls, total = self.sent.get(key, (0, 0.0))
        self.sent[key] = calls + 1, total + sent


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for one in found:
            yield from _tensors(one)
