"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1: the first asks the run to save and leave, a second one leaves at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from modelyard.launch.process import say_farewell
from modelyard.parallel.world import World

_PATIENT = (signal.SIGHUP, signal.SIGUSR1)
"""A second one of these, or one after these, does not end the process: a closing terminal sends SIGHUP more than once, and a
scheduler that has sent SIGUSR1 before the end of the time sends SIGTERM, too."""

_ECHO = 2.0
"""Seconds in which the same signal again is no second one: a scheduler that ends a job (Slurm's scancel, and its preemption)
sends it to every process, and the launching process, which got it too, passes it on."""


class StopSignal:
    """While entered, remembers the first SIGINT, SIGTERM, SIGHUP or SIGUSR1; a second SIGINT or SIGTERM ends the process.

    SIGHUP and SIGUSR1 count for nothing where the parent ignores them (nohup). Of several processes one may hear a signal and
    another not: `signum` is what all of them go by. There torchrun passes Ctrl-C on as SIGTERM, so that only the same signal
    again counts as a second one. One that hears it while it waits in a collective says so to those who wait for data by a
    thread: its own handler runs when the collective is over.
    """

    def __init__(self, world: World | None = None) -> None:
        self._world = world or World()
        self.heard: int | None = None
        """By this process."""
        self._insisted: int | None = None
        self._since = 0.0
        """When that came [seconds]."""
        self._agreed: int | None = None
        self.word: str | None = None
        """Which other process the run stops for, where the main one did not hear the signal itself; known after `agree`."""
        self._before: dict[int, Any] = {}
        self._ears: _Ears | None = None

    def __enter__(self) -> StopSignal:
        for signum in (signal.SIGINT, signal.SIGTERM, *_PATIENT):
            if signum in _PATIENT and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            self._before[signum] = signal.signal(signum, self._handle)
        if not self._world.is_alone:
            self._ears = _Ears(self._world, frozenset(self._before))
        return self

    def __exit__(self, *_: object) -> None:
        if self._ears is not None:
            self._ears.close()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if signum not in _PATIENT:
            now, alone = time.monotonic(), self._world.is_alone
            if self._insisted is not None and (alone or signum == self._insisted):
                if not alone and now - self._since < _ECHO:
                    return
                say_farewell(128 + signum)
                os._exit(128 + signum)
            self._insisted, self._since = signum, now
        if self.heard is not None:
            return
        self.heard = signum
        if not self._world.is_main:
            return
        name = signal.Signals(signum).name
        again = "" if signum in _PATIENT else "; again to leave at once"
        with suppress(OSError):  # the terminal may be what went away
            os.write(2, f"\n{name}: saving after this iteration, then leaving{again}\n".encode())

    def asked(self) -> bool:
        """Whether this process was asked to stop, or knows that another was. The others may not know it yet."""
        return self.heard is not None or self._world.is_posted(_KEY)

    def agree(self) -> bool:
        """Ask every process; whether one of them was asked to stop. All must call it."""
        if self._agreed is None:
            self._agreed = self._world.largest(self.heard or 0) or None
            if self._agreed and not self._world.is_alone:
                self._name_who(self._world.gather(self.heard))
        return bool(self)

    def _name_who(self, heard: list[int | None]) -> None:
        if heard[0] is None:
            rank, signum = next((rank, signum) for rank, signum in enumerate(heard) if signum is not None)
            name = signal.Signals(signum).name
            self.word = f"rank {rank} got {name}: saving after this iteration, then leaving"

    @property
    def signum(self) -> int | None:
        """The signal that the run stops for; that of another process is known after `agree`."""
        return self.heard if self._world.is_alone else self._agreed

    def __bool__(self) -> bool:
        return self.signum is not None


_KEY = "asked to stop"


class _Ears:
    """Tells the other processes of a signal at once, whatever this one's main thread is waiting for."""

    def __init__(self, world: World, signals: frozenset[int]):
        self._world, self._signals = world, signals
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, end == self._read)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while 0 not in (numbers := os.read(self._read, 64)):
            if self._signals.intersection(numbers):
                self._world.post(_KEY)

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.write(self._write, b"\0")  # no signal has this number
        self._thread.join()
        os.close(self._write)
        os.close(self._read)
