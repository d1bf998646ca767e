"""How far a long pass over the data is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

LINE_SECONDS = 5.0


class Progress:
    """A context manager; call `update` as often as you like.

    Args:
        total: sum of the weights that `update` will get.
        report: prints one line; used without a terminal.
        terminal: draw a bar; default: whether standard error is a terminal.
        before: weight, documents and tokens that an earlier start had done; they count as done, not as speed.
    """

    def __init__(
        self,
        total: int,
        report: Callable[[str], None],
        terminal: bool | None = None,
        before: tuple[int, int, int] = (0, 0, 0),
    ):
        self.total = max(total, 1)
        self.report = report
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.done, self.documents, self.tokens = before
        self._before = before
        self.started = self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.terminal:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("prepare"),
                BarColumn(10),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[counts]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("prepare", total=self.total, counts="")
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
        speed = (self.tokens - self._before[2]) / max(now - self.started, 1e-9)
        if self._bar is not None:
            counts = (
                f"{short(self.documents)} documents | {short(self.tokens)} tokens | {short(speed)} tokens/s"
            )
            self._bar.update(self._task, completed=self.done, counts=counts)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = (now - self.started) * (self.total - self.done) / max(self.done - self._before[0], 1)
            self.report(
                f"prepare {self.done / self.total:4.0%} | {self.documents:,} documents | {self.tokens:,} tokens | "
                f"{speed:,.0f} tokens/s | ETA {duration(left)}"
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
