"""How far a long pass over the data is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

LINE_SECONDS = 5.0

Amount = tuple[int, int, int]
"""Weight, documents and tokens."""


class Progress:
    """A context manager; call `update` as often as you like.

    Args:
        total: sum of the weights that `update` will get.
        report: prints one line; used without a terminal.
        terminal: draw a bar; default: whether standard error is a terminal.
        before: weight, documents and tokens that an earlier start had done; they count as done, not as speed.
        word: what is being done.
        interval: of lines, in multiples of `LINE_SECONDS`.
        elsewhere: what other processes have done; asked for about as often as a line is due.
    """

    def __init__(
        self,
        total: int,
        report: Callable[[str], None],
        terminal: bool | None = None,
        before: Amount = (0, 0, 0),
        *,
        word: str = "prepare",
        interval: int = 1,
        elsewhere: Callable[[], Amount] | None = None,
    ):
        self.total = max(total, 1)
        self.report = report
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.done, self.documents, self.tokens = before
        self.word, self.interval = word, interval
        self._before = before
        self._elsewhere = elsewhere
        self.started = self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.terminal:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn(self.word),
                BarColumn(10),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[counts]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self.word, total=self.total, counts="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, weight: int, documents: int, tokens: int) -> None:
        """Add what one chunk brought."""
        self.done += weight
        self.documents += documents
        self.tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            speed = (self.tokens - self._before[2]) / max(now - self.started, 1e-9)
            counts = (
                f"{short(self.documents)} documents | {short(self.tokens)} tokens | {short(speed)} tokens/s"
            )
            self._bar.update(self._task, completed=self.done, counts=counts)
        elif now - self._last_line >= LINE_SECONDS * self.interval:
            self._last_line = now
            self.report(self._line(now))

    def _line(self, now: float) -> str:
        others = self._elsewhere() if self._elsewhere is not None else (0, 0, 0)
        done, documents, tokens = self.done + others[0], self.documents + others[1], self.tokens + others[2]
        done = min(done, self.total)
        seconds = max(now - self.started, 1e-9)
        left = seconds * (self.total - done) / max(done - self._before[0], 1)
        return (
            f"{self.word} {done / self.total:4.0%} | {documents:,} documents | {tokens:,} tokens | "
            f"{(tokens - self._before[2]) / seconds:,.0f} tokens/s | ETA {duration(left)}"
        )


def short(number: float) -> str:
    """A count in few characters: `999`, `12.3k`, `4.58M`, `1.2G`, `15T`."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03`."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
