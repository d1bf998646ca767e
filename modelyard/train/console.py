"""What a run says: plain lines to standard output and to a file; on a terminal, a progress bar below them."""

from __future__ import annotations

import errno
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from modelyard.files import leave_stdout
from modelyard.train.appending import AppendedFile


class Console:
    """Prints lines; a log file, once there is one, gets them all, each with its time.

    Where it does not `speak` (every process but the main one) the log file is all.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self._speaks = speaks
        self.path: Path | None = None
        """Of the log file, once there is one."""
        self._file: AppendedFile | None = None
        self._early = ""
        self._progress: Any = None
        self._gone = False

    def open_log(self, path: Path) -> None:
        """Append to `path` from here on, beginning with the lines so far."""
        self._file, self.path = AppendedFile(path, self.line), path
        self._file.write(self._early)

    def start_bar(self, total: int, *, done: int) -> None:
        """Show a bar of `total` iterations below the lines, on a terminal only."""
        if self._speaks and sys.stdout.isatty():
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
        try:
            if self._progress is not None:
                self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            elif self._speaks and not self._gone:
                print(text, flush=True)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                self._reader_left()
            # Else standard output lies on a full disk; what is left in its buffer is tried again.
        self.keep(text)

    def keep(self, text: str) -> None:
        """As `line`, for the log file alone."""
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        lines = "".join(f"{now}  {part}\n" for part in text.splitlines())
        if self._file is None:
            self._early += lines
        else:
            self._file.write(lines)

    def _reader_left(self) -> None:
        """The pipe's reader (`| head`) or the terminal is gone: the run goes on, and what follows is in the log."""
        self._gone = True
        leave_stdout()
        self.stop_bar()
        self.line("standard output is gone; what follows is said here alone")

    def advance(self, iteration: int, loss: float) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=iteration, description=f"loss {loss:.4f}")

    def stop_bar(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            try:
                progress.stop()
            except OSError:
                self._reader_left()

    def close(self) -> None:
        self.stop_bar()
        if self._file is not None:
            self._file.close()
            self._file = None
        try:
            sys.stdout.flush()
        except OSError:  # the disk under it stayed full
            leave_stdout()
