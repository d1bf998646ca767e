"""Signals on their way from the launching process to its ranks."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from modelyard.launch.rank import STOPS, RankFiles


class Stopped(BaseException):
    """A signal came while there were no ranks to decide what it means."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class Signals:
    """While `passed_on`, each of `STOPS` goes on to the ranks; where there are none for now, it raises `Stopped`."""

    def __init__(self) -> None:
        self.first = 0
        """The first that came; 0: none."""
        self._ranks: Sequence[RankFiles] = ()
        self._waiting = False

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        handler: Callable[[int, FrameType | None], None] = self._handle
        # What is ignored here (nohup) is ignored there.
        before = {
            signum: signal.signal(signum, handler)
            for signum in STOPS
            if signal.getsignal(signum) != signal.SIG_IGN
        }
        try:
            yield
        finally:
            for signum, handled in before.items():
                signal.signal(signum, handled)

    @contextmanager
    def without_ranks(self) -> Iterator[None]:
        """Around a time in which there are no ranks, and this process waits for something."""
        self._ranks = ()
        self._waiting = True
        try:
            if self.first:
                raise Stopped(self.first)
            yield
        finally:
            self._waiting = False

    def now_to(self, ranks: Sequence[RankFiles]) -> None:
        """From here on there are these ranks, in a folder of their own."""
        self._ranks = ranks
        if self.first:  # it came before
            self._leave_word(self.first)

    def pass_on(self, signum: int) -> None:
        """To every rank; one that is not there yet finds it in the folder."""
        self._leave_word(signum)
        for files in self._ranks:
            files.pass_on(signum)

    def _leave_word(self, signum: int) -> None:
        if self._ranks:
            self._ranks[0].leave_word(signum)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self.first = self.first or signum
        if self._waiting:
            raise Stopped(signum)
        self.pass_on(signum)
