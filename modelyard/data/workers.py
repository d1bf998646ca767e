"""Ordered, bounded parallel map: results in the order of the inputs, a few in flight whatever the number of inputs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from modelyard.errors import UserError


class Stopped(UserError):
    """Nothing is wrong with the input, so what was done so far can be gone on with."""


class WorkerKilled(Stopped):
    """A worker process is gone."""


Item = TypeVar("Item")
Result = TypeVar("Result")

_state: Any = None
"""In a worker process: what `ordered_map` was given as `state`."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Any, Item], Result], state: Any, items: Iterable[Item], workers: int
) -> Generator[tuple[Item, Result], None, None]:
    """Yield `(item, function(state, item))` in order, computed by `workers` processes (in this one when 1).

    Memory is bounded: items are drawn as results are taken, at most two per worker ahead. Workers leave when this
    process is gone, also when it was killed.

    Raises:
        WorkerKilled: a worker was killed. Whatever `function` raises is raised here, in its place in the order.
    """
    if workers == 1:
        for item in items:
            yield item, function(state, item)
        return
    # Forked workers share the tokenizer's pages and start at once; elsewhere than on Linux forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(state, os.getpid()))
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(_call, function, item)))
            if len(waiting) >= 2 * workers + 1:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise WorkerKilled(
            "a worker process was killed: out of memory? Use fewer workers, or cut the largest documents"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(state: Any, parent: int) -> None:
    global _state
    _state = state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one cleans up
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _call(function: Callable[[Any, Any], Any], item: Any) -> Any:
    return function(_state, item)
