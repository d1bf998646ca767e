"""Where the time of a run goes: seconds of each phase, measured without making anything wait."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "evaluation", "export", "other")

# Marks that may wait on a GPU before the complete ones among them are added up.
_MANY = 1024


def untimed(_phase: str) -> None:
    """In place of a `PhaseClock` where nobody wants to know."""


class PhaseClock:
    """Wall-clock seconds of each phase of a run; calling it with a phase's name ends the one before.

    On a CPU the host's clock is read. On a GPU an event is recorded in the current stream and nothing waits for it, so
    that a phase lasts from when the device reaches its beginning until it reaches the next; `read` alone, called at log
    time, waits for the last one.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._marks: deque[tuple[str, Any]] = deque()
        self._region: Any = None
        self.traced = False
        """Whether phases appear by name in the trace of a running profiler."""
        self.phase, self.changes = "other", 0
        """What goes on, as the host sees it, and how often that has changed."""
        self("other")

    def __call__(self, phase: str) -> None:
        self.phase = phase
        self.changes += 1
        if self._region is not None:
            self._region.__exit__(None, None, None)
            self._region = None
        if self.traced:
            self._region = torch.profiler.record_function(phase)
            self._region.__enter__()
        self._marks.append((phase, self._now()))
        if self._device.type != "cuda" or len(self._marks) > _MANY:
            self._add_up()

    def read(self) -> dict[str, float]:
        """Seconds of every phase since the last call, up to this moment; the running phase goes on."""
        running = self._marks[-1][0]
        now = self._now()
        self._marks.append((running, now))
        if self._device.type == "cuda":
            now.synchronize()
        self._add_up()
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return {phase: round(value, 6) for phase, value in seconds.items()}

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_up(self) -> None:
        """Add the phases that are over on the device, and forget their marks; asks, never waits."""
        while len(self._marks) > 1:
            (phase, begin), (_, end) = self._marks[0], self._marks[1]
            if self._device.type != "cuda":
                self._seconds[phase] += end - begin
            elif end.query():
                self._seconds[phase] += begin.elapsed_time(end) / 1000
            else:
                return
            self._marks.popleft()
