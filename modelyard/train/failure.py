"""When one of several processes fails, loses the others or stands still: a line that says which, where and in what."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from modelyard.errors import RunFailed, UserError
from modelyard.launch.process import say_farewell
from modelyard.parallel.world import PATIENCE, World
from modelyard.train.console import Console
from modelyard.train.phases import PhaseClock

# What gloo and NCCL say of a process that is gone or late, in errors that have no type of their own.
_SIGNS = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "NCCL",
    "ncclSystemError",
    "ncclRemoteError",
)
_LONG_PHASES = ("checkpoint", "evaluation", "export")
"""In these the others may wait for one, longer than `model.distributed.timeout`."""


def lost_contact(error: BaseException) -> str | None:
    """The reason, where `error` says that another process is gone or did not answer; None for anything else."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        distributed = isinstance(cause, dist.DistError)
        if distributed or (isinstance(cause, RuntimeError) and any(sign in text for sign in _SIGNS)):
            first = next(iter(text.strip().splitlines()), "") or type(cause).__name__
            # gloo begins with the place in its own source, and ends in advice.
            first = first.split("] ", 1)[1] if first.startswith("[") and "] " in first else first
            return first.split(". This is typically", 1)[0]
        cause = cause.__cause__
    return None


@contextmanager
def on_its_own(world: World, console: Console, where: Callable[[], str]) -> Iterator[None]:
    """What goes wrong inside in this process and not in the others ends it here: a line on standard error that says
    `where`, the traceback in the log.

    The others find out by themselves, or torchrun ends them. What all have alike (`World.together`) is raised.
    """
    try:
        yield
    except (RunFailed, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if world.is_alone or error is world.agreed:
            raise
        _leave(error, where(), world, console)


def _leave(error: BaseException, where: str, world: World, console: Console) -> NoReturn:
    reason = lost_contact(error)
    if isinstance(error, UserError):
        text, status = f"rank {world.rank}: error in {where}: {'; '.join(error.problems)}", 2
    elif reason is not None:
        text, status = f"rank {world.rank}: lost contact in {where} ({reason})", 1
    else:
        words = next(iter(str(error).splitlines()), "")
        text, status = f"rank {world.rank}: {type(error).__name__} in {where}: {words}", 1
    details = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    if console.path is None:  # it has no log yet
        text = details + text
    elif not details:
        console.keep(text)
        console.close()
    else:
        text += f"; traceback in {console.path}"
        console.keep(text)
        console.keep(details)
        console.close()
    _last_words(text, status)


def _last_words(text: str, status: int) -> NoReturn:
    sys.stdout.flush()
    os.write(2, (text + "\n").encode())
    say_farewell(status)
    os._exit(status)  # torch's own farewells wait for the others


class Watch:
    """While entered, ends a process that has made no progress for a while, after a line and the stacks of its threads.

    Progress is a new phase, or a message between processes. The time allowed is `timeout` [seconds] once a whole iteration
    is done, and many times that before, and while a checkpoint or the like is on its way.
    """

    def __init__(
        self,
        clock: PhaseClock,
        world: World,
        *,
        timeout: float,
        where: Callable[[], str],
        settled: Callable[[], bool],
        log: Path | None,
    ):
        self._clock, self._world, self._timeout = clock, world, timeout
        self._where, self._settled, self._log = where, settled, log
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._watched = threading.main_thread().ident

    def __enter__(self) -> Watch:
        if not self._world.is_alone:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if not self._world.is_alone:
            self._thread.join()

    def _watch(self) -> None:
        seen, since = self._progress(), time.monotonic()
        while not self._left.wait(min(1.0, self._timeout / 20)):
            if (now := self._progress()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self._allowed():
                self._give_up(time.monotonic() - since)

    def _progress(self) -> tuple[int, int]:
        return self._clock.changes, self._world.signs_of_life

    def _allowed(self) -> float:
        patient = self._clock.phase in _LONG_PHASES or not self._settled()
        return max(10 * self._timeout, PATIENCE) if patient else self._timeout

    def _give_up(self, seconds: float) -> None:
        text = (
            f"rank {self._world.rank}: no progress for {seconds:.0f} s in {self._where()}, "
            f"{position(sys._current_frames().get(self._watched or 0))}"
        )
        if self._log is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            text += f"; the stacks of all threads are in {self._log}"
        if torch.cuda.is_available():
            # NCCL's own watch writes the flight recorder's trace when its timeout is over, a moment after this one.
            time.sleep(min(20.0, self._timeout / 2))
        _last_words(text, 1)


def position(frame: FrameType | None) -> str:
    """Where a thread is: its innermost line in our code, and whether it waits for other processes there."""
    waits, place = False, "at an unknown place"
    while frame is not None:
        code = frame.f_code
        waits = waits or "torch/distributed" in code.co_filename
        if "modelyard" in code.co_filename:
            place = f"at {Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
            break
        frame = frame.f_back
    return place + (", waiting for other processes" if waits else "")
