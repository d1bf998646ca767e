"""Run as a program: `prepare` in forked processes that are killed (-9), then gone on with by others.

    python killing.py CONFIG operations STEP     for n = 1, 1 + STEP, …: one process that kills itself just before its
                                                 n-th operation that makes something durable (sync, rename, removal),
                                                 another that finishes; until n is more than there are
    python killing.py CONFIG seconds S…          one process after the other, each killed after S seconds, one that finishes

CONFIG is a prepare config as JSON; its output folder gets the number of the series. 1 and 2 workers take turns. A line of
JSON comes out for each process: the series, whether it was killed, its exit status, its lines.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import sys
import threading
import time

import modelyard.data.prepare as prepare_module
from modelyard.config.prepare import PrepareConfig
from modelyard.data import ranks as ranks_module
from modelyard.data import sources
from modelyard.data import stores as stores_module

OPERATIONS = {
    os: ("fsync", "rename", "replace"),
    pathlib.Path: ("rename", "unlink"),
    shutil: ("rmtree",),
}


def kill_before(number: int) -> None:
    """Kill this process just before its `number`-th operation, counted over all threads."""
    lock = threading.Lock()
    calls = 0

    def counted(name, function):
        def call(*arguments, **options):
            nonlocal calls
            with lock:
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            # What is killed is the process, not the machine: the syncs need not reach the disk, which takes 10 ms each.
            return None if name == "fsync" else function(*arguments, **options)

        return call

    for place, names in OPERATIONS.items():
        for name in names:
            setattr(place, name, counted(name, getattr(place, name)))


def run(
    config: PrepareConfig, series: int, turn: int, *, operation: int | None = None, seconds: float = 0.0
) -> bool:
    """One process; returns whether it was killed: before an operation by itself, or after some seconds."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        ranks_module.available_cores = lambda: 2
        stores_module.SAVE_SECONDS = 0.05 if operation is None else 0.0
        sources.CHUNK_BYTES = 4000
        if operation is not None:
            kill_before(operation)
        update = {"tokenize_workers": 1 + turn % 2, "output_path": config.output_path / str(series)}
        lines: list[str] = []
        status = 1
        try:
            prepare_module.prepare(config.model_copy(update=update), report=lines.append, terminal=False)
            status = 0
        except Exception as error:
            lines.append(f"{type(error).__name__}: {error}")
        finally:
            os.write(write_end, json.dumps(lines).encode())
            os._exit(status)
    os.close(write_end)
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.set_blocking(read_end, False)  # workers of a killed process keep it open for a moment
    try:
        lines = os.read(read_end, 1 << 16)
    except BlockingIOError:
        lines = b""
    os.close(read_end)
    killed = status == -signal.SIGKILL
    facts = {
        "series": series,
        "killed": killed,
        "status": status,
        "there": (config.output_path / str(series)).exists(),
        "lines": json.loads(lines or b"[]"),
    }
    print(json.dumps(facts), flush=True)
    return killed


def main() -> None:
    config = PrepareConfig.model_validate(json.loads(sys.argv[1]))
    if sys.argv[2] == "seconds":
        for turn, seconds in enumerate(sys.argv[3:]):
            run(config, 0, turn, seconds=float(seconds))
        run(config, 0, len(sys.argv))
        return
    number, step = 1, int(sys.argv[3])
    while run(config, number, number, operation=number):
        run(config, number, number + 1, operation=0)
        number += step


if __name__ == "__main__":
    main()
