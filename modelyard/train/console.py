"""What a run says: plain lines to standard output and to a file; on a terminal, a progress bar below them."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO


class Console:
    """Prints lines; a log file, once there is one, gets them all, each with its time."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._unwritten: list[str] = []
        self._progress: Any = None

    def open_log(self, path: Path) -> None:
        """Append to `path` from here on, beginning with the lines so far."""
        self._file = path.open("a", encoding="utf-8")
        self._write()

    def start_bar(self, total: int, *, done: int) -> None:
        """Show a bar of `total` iterations below the lines, on a terminal only."""
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._task = self._progress.add_task("", total=total, completed=done)
            self._progress.start()

    def line(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        self._unwritten += [f"{now}  {part}\n" for part in text.splitlines()]
        self._write()

    def _write(self) -> None:
        if self._file:
            self._file.writelines(self._unwritten)
            self._file.flush()
            self._unwritten.clear()

    def advance(self, iteration: int, loss: float) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=iteration, description=f"loss {loss:.4f}")

    def stop_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        self.stop_bar()
        if self._file:
            self._file.close()
