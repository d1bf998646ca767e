"""Ctrl-C, SIGTERM and SIGHUP: the first asks the run to save and leave, the second leaves at once."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any


class StopSignal:
    """While entered, remembers the first SIGINT, SIGTERM or SIGHUP in `signum`; a second one ends the process at once.

    But for SIGHUP: a closing terminal sends it more than once, and where the parent ignores it (nohup) so do we.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
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
        if self.signum is not None:
            if signum == signal.SIGHUP:
                return
            os._exit(128 + signum)
        self.signum = signum
        name = signal.Signals(signum).name
        again = "" if signum == signal.SIGHUP else "; again to leave at once"
        with suppress(OSError):  # the terminal may be what went away
            os.write(2, f"\n{name}: saving after this iteration, then leaving{again}\n".encode())

    def __bool__(self) -> bool:
        return self.signum is not None
