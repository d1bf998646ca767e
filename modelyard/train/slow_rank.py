"""Which of several processes keeps the others waiting: what each measures of itself, and who stands out.

Collectives hide it: all wait for the slowest, and each of them looks as slow. So every process times a fixed piece of work
of its own now and then, and counts what it waits for beside the others: batches, and a core to run on.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from modelyard.train.metrics import STARVED

_ALIKE = 2
"""Checks in a row that must find the same before anything is said."""
_LEAST = 1.0
"""Seconds of steps between two checks below which shares of the time are taken for 0: who waits for a core is chance then."""


class Speed(NamedTuple):
    """How fast a process is, as it finds itself."""

    host: float
    """Seconds of a fixed piece of Python and small operations, of its processor's time."""
    device: float
    """Seconds of fixed arithmetic on the device."""
    core_wait: float
    """Share of the time since the last check in which its main thread wanted to run and had no core."""
    data_wait: float
    """Share of the steps' time in which it waited for a batch."""


class Slow(NamedTuple):
    """A process that stands out; `words` has {} for its name."""

    rank: int
    why: str
    """A field of `Speed`."""
    factor: float
    """By how much the others would be faster without it."""
    words: str


class SlowRanks:
    """Who was slow in two checks in a row; each is given once, and again only when it was not slow in between."""

    def __init__(self, factor: float):
        self._factor = factor
        self._streaks: dict[tuple[int, str], int] = {}
        """Checks in a row in which a rank that is not known as slow was, or one that is was not."""
        self._known: set[tuple[int, str]] = set()

    def judge(self, speeds: Sequence[Speed]) -> tuple[list[Slow], list[tuple[int, str]]]:
        """From what the processes measured, by rank: those newly found slow, and (rank, why) of those that no longer are."""
        slow = {(found.rank, found.why): found for found in outliers(speeds, self._factor)}
        changed = self._known ^ slow.keys()
        self._streaks = {key: self._streaks.get(key, 0) + 1 for key in changed}
        settled = sorted(key for key, streak in self._streaks.items() if streak >= _ALIKE)
        self._known ^= set(settled)
        for key in settled:
            del self._streaks[key]
        return [slow[key] for key in settled if key in slow], [key for key in settled if key not in slow]


def outliers(speeds: Sequence[Speed], factor: float) -> list[Slow]:
    """Who is slow in this check: its work takes `factor` times the median of the others, or its waiting makes a step of
    theirs so much longer; of waiting for data a tenth of the time is enough."""
    found = []
    for why in ("host", "device"):
        times = [getattr(speed, why) for speed in speeds]
        for rank, (own, others) in enumerate(zip(times, medians_of_others(times), strict=True)):
            if own > factor * others:
                work = (
                    "Python and small operations take" if why == "host" else "arithmetic on its device takes"
                )
                words = (
                    f"{{}} computes {own / others:.1f} times slower than the others: {work} {1000 * own:.2f} ms, "
                    f"in the others {1000 * others:.2f} ms"
                )
                found.append(Slow(rank, why, own / others, words))
    limits = {"core_wait": 1 - 1 / factor, "data_wait": STARVED}
    for why, limit in limits.items():
        shares = [getattr(speed, why) for speed in speeds]
        for rank, (own, others) in enumerate(zip(shares, medians_of_others(shares), strict=True)):
            if own - others > limit:
                thing = "its data" if why == "data_wait" else "a core to run on"
                words = f"{{}} makes the others wait: it waited for {thing} in {own:.0%} of the time, they in {others:.0%}"
                found.append(Slow(rank, why, 1 / max(1 - own + others, 1e-3), words))
    return found


def medians_of_others(values: Sequence[float]) -> list[float]:
    """For each of two or more values the median of all but it."""
    ordered, last = sorted(values), len(values) - 2
    found = []
    for value in values:
        place = bisect_left(ordered, value)
        low, high = (ordered[middle + (middle >= place)] for middle in (last // 2, (last + 1) // 2))
        found.append((low + high) / 2)
    return found


class Stopwatch:
    """What a process measures of itself, from one check to the next."""

    def __init__(self, device: torch.device):
        self._device = device
        self._data_wait = self._seconds = 0.0
        self._cores = core_times()

    def add(self, seconds: float, data_wait: float) -> None:
        """Count a step of so many seconds, of which so many were spent waiting for its batch."""
        self._seconds += seconds
        self._data_wait += data_wait

    def read(self) -> Speed:
        """Over the time since the last call; some milliseconds of work (on a GPU 10 to 20)."""
        (running, waiting), before = core_times(), self._cores
        running, waiting = running - before[0], waiting - before[1]
        core_wait = data_wait = 0.0
        if self._seconds >= _LEAST:
            core_wait, data_wait = waiting / max(running + waiting, 1), self._data_wait / self._seconds
        speed = Speed(host_seconds(), device_seconds(self._device), core_wait, data_wait)
        self._data_wait = self._seconds = 0.0
        self._cores = core_times()
        return speed


def core_times() -> tuple[int, int]:
    """Nanoseconds that the calling thread ran, and that it could have run but had no core; zeros where the system does not
    tell (it is Linux's, https://docs.kernel.org/scheduler/sched-stats.html)."""
    try:
        running, waiting, *_ = Path("/proc/thread-self/schedstat").read_text().split()
        return int(running), int(waiting)
    except (OSError, ValueError):
        return 0, 0


def host_seconds() -> float:
    """The least of several times of the same work, in the processor's time of this thread: what else runs on its core, or
    holds the interpreter, does not count."""
    small = torch.ones(64)
    return min(_processor_time(lambda: _python(small)) for _ in range(5))


def device_seconds(device: torch.device) -> float:
    """Likewise of arithmetic: on a GPU matrix products, by its own clock."""
    if device.type == "cuda":
        return min(_matrix_products(device, 3))
    numbers = torch.linspace(-1, 1, 8192)  # so few that they stay in one thread, and in the cache
    return min(_processor_time(lambda: _products(numbers)) for _ in range(5))


def _processor_time(work: Callable[[], object]) -> float:
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def _python(small: torch.Tensor) -> int:
    total = 0
    for i in range(3000):
        total += i * i % 7
    for _ in range(50):
        small.add_(1)
    return total


def _products(numbers: torch.Tensor) -> None:
    for _ in range(100):
        torch.addcmul(numbers, numbers, numbers)


def _matrix_products(device: torch.device, times: int) -> list[float]:
    size = 2048  # 17 GFLOP each, in 24 MiB for the three
    numbers = torch.linspace(-1, 1, size * size, device=device).sin().bfloat16().view(size, size)
    result = torch.empty_like(numbers)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(100):
            torch.mm(numbers, numbers, out=result)
        mark.record()
    marks[-1].synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(marks)]
