"""Traces of single iterations, and what memory they take."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from modelyard.config.train import TrainConfig
from modelyard.errors import UserError
from modelyard.files import complete_or_absent, remove_folder
from modelyard.parallel.world import World
from modelyard.train.phases import PhaseClock
from modelyard.train.torch_private import cuda_memory_history


class Profiler:
    """Follows the iterations that the config names, into EXPERIMENT_DIR/profile/<iteration>/.

        trace.json.gz    for ui.perfetto.dev or chrome://tracing, with the phases `forward`, `backward`, `optimizer`
        operators.txt    the same added up by operator, the most expensive first
        memory.pickle    with `memory` on a GPU: for pytorch.org/memory_viz
        memory.json      with `memory` on a CPU: bytes held over time, beyond those at the beginning of the step

    The numbers of the step do not change. A trace that cannot be written costs a line, not the run.
    """

    def __init__(self, config: TrainConfig, device: torch.device, say: Callable[[str], None], world: World):
        """The main process is followed; the others wait for it to write."""
        self._world = world
        self._settings, self._schedule = config.training.profiling, config.profiling
        self._folder = config.run.experiment_dir / "profile"
        self._device, self._say = device, say

    def due(self, iteration: int) -> bool:
        return iteration in self._settings.iterations or self._schedule.due(iteration)

    @contextmanager
    def around(self, iteration: int, clock: PhaseClock) -> Iterator[None]:
        """Follow what happens inside, where `iteration` is one to be followed."""
        if not self.due(iteration):
            yield
            return
        if not self._world.is_main:
            yield
            self._wait(clock)
            return
        on_gpu = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        memory = self._settings.memory
        with cuda_memory_history(enabled=memory and on_gpu) as save_history:
            with profile(activities=activities, record_shapes=True, profile_memory=memory) as profiler:
                clock.traced = True
                try:
                    yield
                finally:
                    clock.traced = False
                    clock("export")
            try:
                self._write(iteration, profiler, save_history)
            except (UserError, OSError, RuntimeError) as error:
                self._say(f"warning: the profile of iteration {iteration} cannot be written: {error}")
        self._wait(clock)

    def _wait(self, clock: PhaseClock) -> None:
        """For the main process to have written: here, where it may take as long as an export, and not in a step."""
        clock("export")
        with self._world.together():
            pass
        clock("other")

    def _write(self, iteration: int, profiler: profile, save_history: Callable[[Path], None]) -> None:
        destination = self._folder / str(iteration)
        if destination.exists():  # from before the run went back to a checkpoint
            remove_folder(destination)
        with complete_or_absent(destination) as temporary:
            trace = temporary / "trace.json"
            profiler.export_chrome_trace(str(trace))
            on_gpu = self._device.type == "cuda"
            order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=-1, max_name_column_width=80)
            (temporary / "operators.txt").write_text(table + "\n", encoding="utf-8")
            content = trace.read_bytes()
            if self._settings.memory and on_gpu:
                save_history(temporary / "memory.pickle")
            elif self._settings.memory:
                timeline = memory_timeline(json.loads(content)["traceEvents"])
                (temporary / "memory.json").write_text(json.dumps(timeline) + "\n", encoding="utf-8")
            (temporary / "trace.json.gz").write_bytes(gzip.compress(content, compresslevel=5))
            trace.unlink()
        self._say(f"profiled iteration {iteration}: {destination}")


def memory_timeline(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes held over time from the events of a trace that followed memory.

    Returns {"peak_bytes", "peak_phase", "phases": {phase: highest bytes}, "timeline": [[microseconds since the first
    allocation, bytes], …]}; bytes count from 0 at the beginning of the trace, so that what was there before and is
    freed makes them negative.
    """
    phases = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in ("forward", "backward", "optimizer")
    )
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
    )
    held, timeline = 0, []
    highest: dict[str, int] = {}
    for moment, change in changes:
        held += change
        timeline.append([round(moment - changes[0][0], 3), held])
        phase = next((name for begin, end, name in phases if begin <= moment <= end), "other")
        highest[phase] = max(held, highest.get(phase, held))
    peak_phase = max(highest, key=lambda phase: highest[phase], default=None)
    return {
        "peak_bytes": highest[peak_phase] if peak_phase else 0,
        "peak_phase": peak_phase,
        "phases": highest,
        "timeline": timeline,
    }
