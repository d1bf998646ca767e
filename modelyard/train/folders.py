"""The numbered folders that a run writes, checkpoints and exports: room for them, and what is said when one was written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from modelyard.config.disk import size as in_words
from modelyard.config.training import KeptConfig, OnError
from modelyard.errors import RunFailed
from modelyard.files import DISK_FULL, Retention, prune, what_is_full
from modelyard.parallel.world import World
from modelyard.train.events import EventLog


def refuse_without_room(folder: Path, directory: Path, needed: int) -> None:
    """Raise OSError before the disk is filled in vain; `needed` in bytes. `directory` is made in the run's `folder`, which
    must still be there."""
    if not folder.is_dir():  # moved away, or its disk is gone: what is written now would not be found again
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    directory.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def folder_bytes(folder: Path) -> int:
    """What the files of a folder take."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


class NumberedFolders:
    """Says and keeps what became of the folders of one experiment; the main process does, and all call it alike."""

    def __init__(self, folder: Path, world: World, events: EventLog):
        self._folder, self._world, self._events = folder, world, events

    def prune(self, directory: Path, settings: KeptConfig, retention: Callable[[Path], Retention]) -> None:
        """Remove what is superfluous in `directory`. The others wait here, where they may wait long."""
        with self._world.together():
            if self._world.is_main:
                prune(directory, keep=settings.keep, retention=retention)

    def written(
        self,
        event: Literal["saved", "exported"],
        destination: Path,
        size: int,
        seconds: float,
        waited: float,
    ) -> None:
        """`destination` of `size` bytes is durable, after so many seconds, `waited` of which training stood still."""
        if not self._world.is_main:
            return
        text = f"{event} {destination} in {seconds:.1f} s"
        if waited < 0.9 * seconds:
            text += f" (training waited {waited:.1f} s)"
        facts: dict[str, Any] = {
            "seconds": round(seconds, 3),
            "waited": round(waited, 3),
            "bytes": size,
        }
        self._events.add(event, int(destination.name), text, **facts)

    def failed(
        self,
        verb: Literal["saved", "exported"],
        destination: Path,
        error: Exception,
        *,
        needed: int,
        on_error: OnError,
        stays: str,
    ) -> None:
        """`destination` could not be written, `needed` [bytes] as it is; raises RunFailed where that stops the run."""
        directory, iteration = destination.parent, int(destination.name)
        cause = error if isinstance(error, OSError) else error.__cause__
        free = shutil.disk_usage(self._folder).free if self._folder.exists() else 0
        reason = str(error)
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            room = f"{in_words(free)} free, " if cause.errno == errno.ENOSPC else ""
            reason = f"{what_is_full(cause)} in {directory} ({room}{in_words(needed)} needed)"
        text = f"iteration {iteration} is not {verb}: {reason}; {stays}"
        facts: dict[str, Any] = {"free_bytes": free, "needed_bytes": needed, "folder": str(directory)}
        self._events.add("save_failed", iteration, f"warning: {text}", say=on_error == "continue", **facts)
        if on_error == "stop":
            raise RunFailed(text)
