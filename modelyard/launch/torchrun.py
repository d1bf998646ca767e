"""`--nproc N`: N processes of this program on this machine, started and watched by torchrun's agent."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from modelyard.errors import RunFailed
from modelyard.launch.rank import STOPS, RankFiles


def automatic() -> int:
    """Processes that `--nproc auto` means: one for each GPU, or one."""
    import torch

    return max(1, torch.cuda.device_count())


def launch(processes: int, module: str, words: Sequence[str]) -> int:
    """Run `python -m module words` in so many processes; the exit status of the first that failed (128 + n for signal n).

    Rank 0 has this process's output. SIGINT, SIGTERM and SIGHUP are passed on, and the ranks decide; if this process is
    killed, so are they (on Linux). Raises RunFailed where the processes cannot be started.
    """
    folder = Path(tempfile.mkdtemp(prefix="modelyard-"))
    ranks = [RankFiles(folder, rank) for rank in range(processes)]
    before = _pass_signals_on(folder, ranks)
    try:
        failures = _run_agent(processes, [str(folder), str(os.getpid()), module, *words], folder)
        return _status(ranks, failures)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        shutil.rmtree(folder, ignore_errors=True)


def _pass_signals_on(folder: Path, ranks: list[RankFiles]) -> dict[int, Any]:
    """From now on; returns the handlers that were there."""

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        first = folder / "signal"
        if not first.exists():
            first.write_text(str(int(signum)))
        for files in ranks:
            files.pass_on(signum)

    handler: Callable[[int, FrameType | None], None] = pass_on
    # What is ignored here (nohup) is ignored there.
    return {
        signum: signal.signal(signum, handler)
        for signum in STOPS
        if signal.getsignal(signum) != signal.SIG_IGN
    }


def _run_agent(processes: int, arguments: list[str], folder: Path) -> dict[int, int]:
    """The ranks from their start to their end. Returns the exit codes of those that failed, -n for signal n."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    # The ranks' store is their own: one that they share with the agent outlives a restart, with the addresses of the dead
    # (https://github.com/pytorch/pytorch/issues/135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What it says about processes that end, `_status` says in a line.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        signals_to_handle="SIGQUIT",  # it would stop the ranks at the others, and count to 30
    )
    try:
        elastic_launch(config, sys.executable)("-m", "modelyard.launch.rank", *arguments)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except (OSError, RuntimeError) as error:
        raise RunFailed(f"{processes} processes cannot be started: {error}") from error
    return {}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _status(ranks: list[RankFiles], failures: dict[int, int]) -> int:
    """The exit status of the rank that failed first, having said what it did not say on the screen itself."""
    ends = [files.farewell() for files in ranks]
    if not failures:  # those that were told to leave have, and that is no failure to torchrun
        return next((end[0] for end in ends if end is not None and end[0]), 0)
    first = _first(ends, failures)
    end = ends[first]
    if end is None:
        code = failures[first]
        _say(first, _killed(-code) if code < 0 else f"left with status {code}", ranks[first])
        return 128 - code if code < 0 else code
    both_refuse = end[0] == 2 and ends[0] is not None and ends[0][0] == 2
    if first and not both_refuse:
        _say(first, f"ended with status {end[0]}", ranks[first])
    return end[0]


def _first(ends: list[tuple[int, float] | None], failures: dict[int, int]) -> int:
    """The rank that failed before the others did because of it.

    Torchrun ends the others with SIGTERM; one that was killed by anything else before it could take its leave has not
    followed another.
    """
    killed = [rank for rank, code in failures.items() if code < 0 and code != -signal.SIGTERM]
    left = {rank: end[1] for rank in failures if (end := ends[rank]) is not None and end[0]}
    if killed:
        return killed[0]
    return min(left, key=lambda rank: left[rank]) if left else next(iter(failures))


def _killed(signum: int) -> str:
    name = f"signal {signum}"
    with suppress(ValueError):
        name = signal.Signals(signum).name
    memory = ", perhaps because memory ran out" if signum == signal.SIGKILL else ""
    return f"was killed by {name}{memory}"


def _say(rank: int, how: str, files: RankFiles) -> None:
    last, log = files.last_line(), files.log
    if last.startswith(f"rank {rank}: "):
        line = last  # it has said all itself
    elif log is not None:
        line = f"rank {rank} {how}; what it wrote is in {os.path.relpath(log)}"
    else:
        line = f"rank {rank} {how}" + (f"; it last wrote: {last}" if last else "")
    print(f"error: {line}", file=sys.stderr, flush=True)
