"""Run as a program: the ranks of a preparation as forked processes, one of which is killed (-9), and then the others.

    python rank_processes.py CONFIG RANK WORLD_SIZE… STEP     for n = 1, 1 + STEP, …: as many processes as the next of the
                                                              world sizes says, of which rank RANK kills itself just
                                                              before its n-th operation that makes something durable;
                                                              then as many as the one after says, none of which does;
                                                              until n is more than there are

CONFIG is a prepare config as JSON; its output folder gets n as its name. A line of JSON comes out for each start: n, whether
a process was killed, the exit statuses, and what all said.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from modelyard.config.prepare import PrepareConfig
from modelyard.data import assemble, ranks, sources, stores
from modelyard.data.prepare import prepare

from .killing import kill_before


def start(config: PrepareConfig, number: int, world_size: int, victim: int | None) -> bool:
    """One start of all ranks; returns whether one was killed."""
    with tempfile.TemporaryDirectory() as said:
        pids = [_rank(config, number, rank, world_size, victim, Path(said)) for rank in range(world_size)]
        statuses: dict[int, int] = {}
        killed = False
        while len(statuses) < world_size:
            pid, status = os.wait()
            statuses[pids.index(pid)] = os.waitstatus_to_exitcode(status)
            if -signal.SIGKILL in statuses.values() and not killed:
                killed = True
                for other in set(range(world_size)) - set(statuses):
                    os.kill(pids[other], signal.SIGKILL)  # as torchrun does, at whatever they are
        lines = [line for file in sorted(Path(said).iterdir()) for line in file.read_text().splitlines()]
    there = (config.output_path / str(number)).exists()
    facts = {"n": number, "killed": killed, "statuses": statuses, "there": there, "lines": lines}
    print(json.dumps(facts), flush=True)
    return killed


def _rank(
    config: PrepareConfig, number: int, rank: int, world_size: int, victim: int | None, said: Path
) -> int:
    pid = os.fork()
    if pid:
        return pid
    kill_before(number if rank == victim else 0)
    place = config.distributed.model_copy(update={"rank": rank, "world_size": world_size})
    cfg = config.model_copy(update={"output_path": config.output_path / str(number), "distributed": place})
    status = 1
    with (said / str(rank)).open("w", buffering=1) as file:
        try:
            prepare(cfg, report=lambda line: print(line, file=file), terminal=False)
            status = 0
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=file)
        finally:
            file.flush()
            os._exit(status)


def main() -> None:
    config = PrepareConfig.model_validate(json.loads(sys.argv[1]))
    victim, *world_sizes, step = map(int, sys.argv[2:])
    sources.CHUNK_BYTES, sources.PART_CHUNKS = 500, 2
    stores.SAVE_SECONDS = assemble.BEAT_SECONDS = ranks.BEAT_SECONDS = 0.0
    assemble.POLL_SECONDS = 0.001
    sizes = itertools.cycle(world_sizes)
    number = 1
    while start(config, number, next(sizes), victim):
        start(config, number, next(sizes), None)
        number += step


if __name__ == "__main__":
    main()
