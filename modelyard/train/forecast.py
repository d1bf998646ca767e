"""What the plan says of a run (`modelyard plan`), beside what its first iterations show."""

from __future__ import annotations

import os
import statistics
from typing import TYPE_CHECKING, Any

import torch

from modelyard.config.disk import size
from modelyard.plan.duration import duration_of
from modelyard.plan.hardware import Hardware, cluster_of
from modelyard.plan.memory import most_of_all
from modelyard.plan.workload import workload_of

if TYPE_CHECKING:
    from modelyard.train.state import Run

WARM_UP = 3
"""Iterations at the start that are slower than those after them: compilation, first allocations."""
LOOKED_AT = 10
"""Iterations after those, whose median counts."""
SLOW = 0.8
"""Share of the planned speed below which a run is slower than it should be."""


class Forecast:
    """The memory and speed that a run should have. The main process has one; all of it is for people, none of it for the run."""

    def __init__(self, run: Run):
        self._say, self._tokens = run.console.line, run.config.batch.tokens
        self._on_gpu = run.device.type == "cuda"
        self._seconds: list[float] = []
        self._seen = 0
        self.memory: int | None = None
        """Bytes of the process that holds most: what the allocator hands out on a GPU, all that is resident otherwise."""
        self.tokens_per_second: float | None = None
        """Of all processes."""
        if not run.world.is_main:
            return
        try:
            self._plan(run)
        except Exception as error:  # a run goes on without a plan
            self._say(f"warning: no plan of this run: {type(error).__name__}: {error}")

    def _plan(self, run: Run) -> None:
        hardware = _hardware(run.device)
        workload = workload_of(run.config, run.architecture, run.world.size, on_gpu=self._on_gpu)
        _, memory = most_of_all(workload)
        self.memory = run.memory_before + memory.peak
        text = f"planned: memory {size(self.memory)}"
        if hardware is None:
            self._say(f"{text} (speed too, once `modelyard plan CONFIG --gpu this-machine` has measured it)")
            return
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cluster = cluster_of(hardware, run.world.size, gpus_per_node=max(per_node, 1))
        duration = duration_of(workload, cluster)
        self.tokens_per_second = duration.tokens / duration.step
        self._say(f"{text}, {self.tokens_per_second:,.0f} tokens/s (docs/planner.md)")

    def record(self) -> dict[str, Any]:
        """For every training record: what the measured figures are held against."""
        found: dict[str, Any] = {}
        if self.memory is not None:
            found["planned_memory_bytes"] = self.memory
        if self.tokens_per_second is not None:
            found["planned_tokens_per_second"] = self.tokens_per_second
        return found

    def look(self, seconds: float, memory: int) -> None:
        """One iteration took so long, and the process has held so much. Once, when enough were seen, both are said."""
        self._seen += 1
        if self.memory is None or self._seen <= WARM_UP or len(self._seconds) == LOOKED_AT:
            return
        self._seconds.append(seconds)
        if len(self._seconds) < LOOKED_AT:
            return
        beside = _difference(memory, self.memory) if self._on_gpu else "resident, with what libraries take"
        text = f"plan and run: memory {size(self.memory)} planned, {size(memory)} so far ({beside})"
        if self.tokens_per_second is not None:
            speed = self._tokens / statistics.median(self._seconds)
            text += (
                f"; {self.tokens_per_second:,.0f} tokens/s planned, {speed:,.0f} in the last {LOOKED_AT} iterations "
                f"({_difference(speed, self.tokens_per_second)})"
            )
            if speed < SLOW * self.tokens_per_second:
                text += ": SLOWER THAN IT SHOULD BE; training.profiling shows where the time goes"
        self._say(text)


def _difference(found: float, planned: float) -> str:
    return f"{found / planned - 1:+.0%}"


def _hardware(device: torch.device) -> Hardware | None:
    """What this process computes on, where its rates are known."""
    from modelyard.plan.machine import known_gpu, known_machine

    if device.type != "cuda":
        return known_machine()
    properties = torch.cuda.get_device_properties(device)
    return known_gpu(torch.cuda.get_device_name(device), properties.total_memory)
