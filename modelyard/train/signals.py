"""Ctrl-C, SIGTERM and SIGHUP: the first asks the run to save and leave, the second leaves at once."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

from modelyard.launch.process import say_farewell
from modelyard.parallel.world import World


class StopSignal:
    """While entered, remembers the first SIGINT, SIGTERM or SIGHUP; a second one ends the process at once.

    But for SIGHUP: a closing terminal sends it more than once, and where the parent ignores it (nohup) so do we. Of several
    processes one may hear a signal and another not: `signum` is what all of them go by. There torchrun passes Ctrl-C on as
    SIGTERM, so that only the same signal again counts as a second one.
    """

    def __init__(self, world: World | None = None) -> None:
        self._world = world or World()
        self.heard: int | None = None
        """By this process."""
        self._agreed: int | None = None
        self.word: str | None = None
        """Which other process the run stops for, where the main one did not hear the signal itself; known after `agree`."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.heard is not None:
            if signum == signal.SIGHUP or not (self._world.is_alone or signum == self.heard):
                return
            say_farewell(128 + signum)
            os._exit(128 + signum)
        self.heard = signum
        if not self._world.is_main:
            return
        name = signal.Signals(signum).name
        again = "" if signum == signal.SIGHUP else "; again to leave at once"
        with suppress(OSError):  # the terminal may be what went away
            os.write(2, f"\n{name}: saving after this iteration, then leaving{again}\n".encode())

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
