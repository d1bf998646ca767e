"""What a forked run of `benchmarks/faults_kills.py` is doing, in memory that its parent sees, and kills at a certain call."""

from __future__ import annotations

import functools
import json
import mmap
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = ("resume", "step", "save", "seal", "prune", "evaluate", "samples", "export", "between")
"""`resume` is all from the start to the first step; `seal` is the part of a save or export after the writing: checksums,
sync, rename; `between` is the rest, the copies that a checkpoint is written from among it."""
BESIDE = ("save", "seal", "prune")
"""What a thread does beside the training, unless `training.checkpoint.asynchronous` is off."""


class Marker:
    """The phases of a forked run, in memory that its parent sees, and how often each has begun.

    Threads have one each, for a checkpoint is written beside the training. Where the parent waits for a phase, the thread
    stands still at its beginning until the parent has seen it: some are over in less than a millisecond.
    """

    _WANTED, _TIMES, _REACHED, _GO, _COUNTS = range(5)
    _OPEN = _COUNTS + len(PHASES)

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._OPEN + len(PHASES))
        self._share: float | None = None
        self._lock, self._here = threading.Lock(), threading.local()
        self.calls: dict[str, int] = {}
        """Usual number of calls in each phase, from the runs so far that nobody stopped."""
        self.at_end: Callable[[], None] = lambda: None

    def clear(self, wanted: str | None = None, times: int = 0, share: float | None = None) -> None:
        """Before a start: which phase is waited for, and which time that it begins.

        With `share` the run kills itself after that share of the phase's calls; else the parent does it.
        """
        self._memory[:] = bytes(len(self._memory))
        self._memory[self._WANTED] = len(PHASES) if wanted is None else PHASES.index(wanted)
        self._memory[self._TIMES] = times
        self._share = share

    def begin(self, phase: str) -> bool:
        """This thread is in `phase` now; whether it kills the process before the phase is over."""
        number, memory = PHASES.index(phase), self._memory
        with self._lock:
            memory[self._COUNTS + number] = min(255, memory[self._COUNTS + number] + 1)
            reached = (memory[self._WANTED], memory[self._TIMES]) == (number, memory[self._COUNTS + number])
        self.back_in(phase)
        if reached:
            memory[self._REACHED] = 1
            if self._share is not None:
                _kill_at_call(int(self._share * self.calls[phase]))
                return True
            while not memory[self._GO]:
                time.sleep(0.0001)
        return False

    def back_in(self, phase: str | None) -> None:
        with self._lock:
            if phase is not None:
                self._memory[self._OPEN + PHASES.index(phase)] += 1
            if self.here is not None:
                self._memory[self._OPEN + PHASES.index(self.here)] -= 1
        self._here.phase = phase

    @property
    def reached(self) -> bool:
        return bool(self._memory[self._REACHED])

    def go(self) -> None:
        self._memory[self._GO] = 1

    @property
    def here(self) -> str | None:
        """The phase of this thread."""
        return getattr(self._here, "phase", None)

    @property
    def phases(self) -> set[str]:
        """Those of all threads."""
        return {phase for number, phase in enumerate(PHASES) if self._memory[self._OPEN + number]}

    def hit(self, wanted: str) -> str:
        """The phase that a kill has hit: of several the one that was aimed at, or what was done beside the training."""
        phases = self.phases
        if wanted in phases and (wanted != "between" or len(phases) == 1):
            return wanted
        return min(phases, key=lambda phase: (phase not in BESIDE, phase == "between"))

    def times(self, phase: str) -> int:
        return self._memory[self._COUNTS + PHASES.index(phase)]

    def during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            before = self.here
            kills = self.begin(phase)
            try:
                return function(*args, **kwargs)
            finally:
                if kills:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.back_in("between" if before == "resume" and phase == "step" else before)

        return marked


def _kill_at_call(calls: int) -> None:
    """Kill this process (-9) after so many calls of Python or C functions in this thread."""
    left = calls

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def count_calls_in(marker: Marker, file: Path) -> None:
    """Write the mean number of calls in each phase into `file` when this process ends."""
    sums: Counter[str] = Counter()

    def count(*_: object) -> None:
        sums[marker.here or "between"] += 1

    def keep() -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        means = {phase: sums[phase] // max(1, marker.times(phase)) for phase in PHASES}
        file.write_text(json.dumps(means))

    marker.at_end = keep
    threading.setprofile(count)
    sys.setprofile(count)


def mark_everything(marker: Marker) -> None:
    from modelyard import files
    from modelyard.config.training import SamplesEvaluatorConfig
    from modelyard.train import folders, state
    from modelyard.train.evaluators import Evaluators

    state.train_step = marker.during("step", state.train_step)
    state.save_checkpoint = marker.during("save", state.save_checkpoint)
    state.Run.export = marker.during("export", state.Run.export)  # type: ignore[method-assign]
    state.prune = folders.prune = marker.during("prune", files.prune)
    files.sha256 = marker.during("seal", files.sha256)
    files.sync = marker.during("seal", files.sync)
    evaluate, sample = (marker.during(name, Evaluators.run) for name in ("evaluate", "samples"))

    def run_evaluator(self: Evaluators, name: str, entry: Any, *rest: Any) -> Any:
        which = sample if isinstance(entry.evaluator, SamplesEvaluatorConfig) else evaluate
        return which(self, name, entry, *rest)

    Evaluators.run = run_evaluator  # type: ignore[method-assign]
