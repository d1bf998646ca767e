"""Several processes of one machine talking over gloo, for a test: `run_distributed(function, world_size)`."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist


def run_distributed(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0
) -> list[Any]:
    """`function(*arguments)` in `world_size` processes that share a gloo group; what each returned, by rank.

    The processes are forked, so that torch is imported once (2 ranks take about a second), and every one has one thread.
    The first that fails ends the others; AssertionError with its traceback. What they return is pickled: no tensors of
    any size, numbers and strings.
    """
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(
                target=_work,
                args=(function, rank, world_size, str(Path(folder) / "store"), results, timeout, arguments),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        try:
            return _collect(workers, results, world_size, time.monotonic() + timeout)
        finally:
            for worker in workers:
                worker.join(timeout=5)
                if worker.is_alive():
                    worker.kill()
                    worker.join()


def _collect(workers: list[Any], results: Any, world_size: int, deadline: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < world_size:
        try:
            rank, answer, failure = results.get(timeout=0.2)
        except Empty:
            dead = [
                (n, w.exitcode)
                for n, w in enumerate(workers)
                if w.exitcode not in (None, 0) and n not in answers
            ]
            if dead or time.monotonic() > deadline:
                waiting = [n for n in range(world_size) if n not in answers]
                why = f"ended with {dead}" if dead else "did not answer in time"
                _kill(workers)
                raise AssertionError(f"of {world_size} processes, {why}; waiting for {waiting}") from None
            continue
        if failure is not None:
            _kill(workers)
            raise AssertionError(f"rank {rank} of {world_size}:\n{failure}")
        answers[rank] = answer
    return [answers[rank] for rank in range(world_size)]


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()


def _work(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    results: Any,
    timeout: float,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        answer = function(*arguments)
        dist.barrier()
        results.put((rank, answer, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        # Neither the process group's nor pytest's clean-up of the parent is this process's business.
        os._exit(0)
