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

from modelyard.launch.process import end_with_parent, on_farewell, output_to
from modelyard.parallel.rank import rank

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that are passed on to the ranks."""


def main() -> int:
    folder, parent, module, *words = sys.argv[1:]
    end_with_parent(int(parent))
    files = RankFiles(Path(folder), rank())
    if rank():
        output_to(files.output)
    sys.argv = [module, *words]
    on_farewell(files.say_farewell)
    files.say_hello()
    if signum := files.stopped_by():
        status = 128 + signum  # it came before there was anybody to pass it on to
    else:
        status = _run(module)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = status or 2
    files.say_farewell(status)
    # torchrun kills the others as soon as one fails. A rank that leaves because it was told to has not failed, and
    # another may be writing the checkpoint still.
    return 0 if status == 128 + files.stopped_by() else status


def _run(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class RankFiles:
    """What a rank and the process that started it tell each other in a folder."""

    def __init__(self, folder: Path, rank: int):
        self.folder = folder
        self.output = folder / f"rank-{rank}.txt"
        self._pid, self._status = folder / f"{rank}.pid", folder / f"{rank}.status"

    def say_hello(self) -> None:
        _write(self._pid, str(os.getpid()))

    def say_farewell(self, status: int) -> None:
        _write(self._status, json.dumps([status, time.time()]))

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

    def farewell(self) -> tuple[int, float] | None:
        """(exit status, when); None for a rank that was killed."""
        if not self._status.exists():
            return None
        status, when = json.loads(self._status.read_text())
        return status, when

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
