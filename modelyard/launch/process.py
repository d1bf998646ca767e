"""A process that torchrun has started, and what belongs to it: its end, and what it writes. No torch."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def end_with_parent(parent: int | None = None) -> None:
    """Have the system kill this process when its parent goes, so that no rank outlives a killed torchrun (Linux alone).

    `parent` is its id (default: whoever it is now); it may be gone already.
    """
    if sys.platform != "linux":
        return
    import ctypes

    parent = os.getppid() if parent is None else parent
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


_output: Path | None = None
_farewell: Callable[[int], object] | None = None


def keep_output(path: Path) -> None:
    """What this process writes, and nobody sees, is from now on appended to `path`; nothing where somebody does."""
    if _output is not None:
        output_to(path)


def on_farewell(say: Callable[[int], object]) -> None:
    """What a process that ends itself in the midst of things (`os._exit`) is to tell who started it: its exit status."""
    global _farewell
    _farewell = say


def say_farewell(status: int) -> None:
    """Before `os._exit(status)`."""
    if _farewell is not None:
        _farewell(status)


_mendable = False


def a_restart_may_mend() -> None:
    """Called before a failure that all processes have alike, and that may yet not come again: the launcher restarts then."""
    global _mendable
    _mendable = True


def may_be_mended() -> bool:
    """Whether `a_restart_may_mend` was called."""
    return _mendable


def output_to(path: Path) -> None:
    """Append what this process writes to standard output and error, libraries' and crashes' words included, to `path`.

    Called again with another path, that one gets what was written before, too.
    """
    global _output
    sys.stdout.flush()
    sys.stderr.flush()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        if _output is not None:
            file.write(_output.read_bytes())
            _output.unlink()
            _output.symlink_to(path.absolute())  # whoever started this process looks there
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _output = path
