"""What torchrun starts for `--nproc`: `python -m modelyard.launch.rank FOLDER PARENT MODULE [WORD ...]`, one of the ranks.

FOLDER is where the launching process (PARENT, its id) finds this one's id, how it ended, and what it wrote.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from modelyard.launch.process import end_with_parent, may_be_mended, on_farewell, output_to
from modelyard.parallel.rank import rank

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that are passed on to the ranks, which save and leave with 128 and the signal's number."""


def main() -> int:
    folder, parent, module, *words = sys.argv[1:]
    end_with_parent(int(parent))
    files = RankFiles(Path(folder), rank())
    _leave_when_told(files)
    if rank():
        output_to(files.output)
    sys.argv = [module, *words]
    on_farewell(files.say_farewell)
    files.say_hello()
    if signum := files.stopped_by():
        status, answered = 128 + signum, True  # it came before there was anybody to pass it on to
    else:
        status, answered = _run(module)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = status or 2
    files.say_farewell(status, answered=answered and not may_be_mended())
    # torchrun kills the others as soon as one fails. A rank that leaves because it was told to has not failed, and
    # another may be writing the checkpoint still.
    return 0 if answered and status - 128 in STOPS else status


def _leave_when_told(files: RankFiles) -> None:
    """Until the program has handlers of its own, one of `STOPS` ends this process with 128 and its number, as an answer:
    there is nothing to save yet, and a process that is killed looks like one that crashed."""

    def leave(signum: int, _frame: FrameType | None) -> None:
        files.say_farewell(128 + signum, answered=True)
        os._exit(128 + signum)  # not 0: the others, which wait for this one, are ended then

    for signum in STOPS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup
            signal.signal(signum, leave)


def _run(module: str) -> tuple[int, bool]:
    """(exit status, whether that is the program's own answer and no accident)."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0, True
        print(leaving.code, file=sys.stderr)
        return 1, True
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, True
    except BaseException:
        traceback.print_exc()
        return 1, False
    return 0, True


class Farewell(NamedTuple):
    """How a rank ended that could say so."""

    status: int
    when: float
    """[seconds since 1970]"""
    final: bool
    """Whether it would end so again: 2 (the user has something to change), a signal, a failure that all ranks have alike."""


class RankFiles:
    """What a rank and the process that started it tell each other in a folder."""

    def __init__(self, folder: Path, rank: int):
        self.folder = folder
        self.output = folder / f"rank-{rank}.txt"
        self._pid, self._status = folder / f"{rank}.pid", folder / f"{rank}.status"

    def say_hello(self) -> None:
        _write(self._pid, str(os.getpid()))

    def say_farewell(self, status: int, *, answered: bool = False) -> None:
        """`answered`: this is what the program has to say, not one rank's accident."""
        _write(self._status, json.dumps([status, time.time(), answered or status != 1]))

    def leave_word(self, signum: int) -> None:
        """For every rank of this folder that is not there yet; the first signal counts."""
        path = self.folder / "signal"
        if not path.exists():
            _write(path, str(int(signum)))

    def stopped_by(self) -> int:
        """The signal that the launching process was sent; 0: none."""
        path = self.folder / "signal"
        return int(path.read_text()) if path.exists() else 0

    def pass_on(self, signum: int) -> None:
        """Send a signal to the rank, if it is there and has not taken its leave."""
        if self._pid.exists() and not self._status.exists():
            try:
                os.kill(int(self._pid.read_text()), signum)
            except ProcessLookupError:
                pass

    def farewell(self) -> Farewell | None:
        """None for a rank that was killed."""
        return Farewell(*json.loads(self._status.read_text())) if self._status.exists() else None

    @property
    def log(self) -> Path | None:
        """Where what the rank wrote stays."""
        return self.output.readlink() if self.output.is_symlink() else None

    def last_line(self) -> str:
        """The last thing that the rank wrote, where that is not on the screen."""
        if not self.output.exists():
            return ""
        with self.output.open("rb") as file:
            file.seek(max(0, self.output.stat().st_size - 4096))
            written = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return written[-1].strip() if written else ""


def _write(path: Path, text: str) -> None:
    """Whole or not at all, for somebody may be looking."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
