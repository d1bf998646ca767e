"""Whether what tensors hold fits on a device, with what else needs memory there."""

from __future__ import annotations

from dataclasses import dataclass

from modelyard.plan.hardware import Hardware
from modelyard.plan.memory import Memory

FRAGMENTATION = 0.06
"""Of what tensors hold at their peak: what an allocator cannot give away, in pieces between them. Assumed; not measured here."""
RUNTIME = 1.5 * 2**30
"""Bytes that the device's context, its libraries' workspaces and the communicators' buffers take. Assumed, likewise."""


@dataclass(frozen=True)
class Room:
    """Bytes of one device."""

    tensors: int
    fragmentation: float
    runtime: float
    there: int

    @property
    def needed(self) -> float:
        return self.tensors + self.fragmentation + self.runtime

    @property
    def fits(self) -> bool:
        return self.needed <= self.there


def room_of(memory: Memory, hardware: Hardware) -> Room:
    """What a process needs of its device."""
    on_gpu = hardware.is_gpu
    return Room(
        memory.peak,
        FRAGMENTATION * memory.peak if on_gpu else 0.0,
        RUNTIME if on_gpu else 0.0,
        hardware.memory,
    )
