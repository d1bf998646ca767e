"""What happened to a run, beside its numbers: `events.jsonl`, appended to and never cut."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from modelyard.train.appending import AppendedFile
from modelyard.train.console import Console

Happening = Literal[
    "started", "resumed", "skipped", "saved", "exported", "checkpoint_damaged", "save_failed", "stopped", "shutdown",
    "finished", "failed", "spike", "rolled_back", "diverged", "slow_rank", "zero_gradient", "overflow",
]  # fmt: skip


class EventLog:
    """Says what happens on the console and keeps it, one JSON line each; before `open` it is kept in memory."""

    def __init__(self, console: Console, *, kept: bool = True):
        """`kept` False: they are only said, because another process keeps the same."""
        self._console, self._kept = console, kept
        self._file: AppendedFile | None = None
        self._early = ""
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Called with each event that happens from here on."""

    def open(self, path: Path) -> None:
        """Append to `path` from here on, beginning with the events so far."""
        if not self._kept:
            return
        self._file = AppendedFile(path, self._console.line)
        if self._early:
            self._file.write(self._early)

    def add(self, event: Happening, iteration: int, text: str, *, say: bool = True, **facts: Any) -> None:
        """Keep `event` with the time [seconds since 1970]; `text` is for people, `facts` are further numbers."""
        if say:
            self._console.line(text)
        if not self._kept:
            return
        record = {
            "time": round(time.time(), 3),
            "iteration": iteration,
            "event": event,
            "text": text,
            **facts,
        }
        line = json.dumps(record, ensure_ascii=False) + "\n"
        if self._file is None:
            self._early += line
        else:
            self._file.write(line)
        for listener in self.listeners:
            listener(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
