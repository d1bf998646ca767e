"""A run in several processes as `benchmarks/faults_ranks.py` sees it, from outside: its phases, its processes, their end."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults_kills import ROOT

DISTRIBUTED, STAGES = "model.distributed", "model.multi_stage"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "ZeRO 1 on 2": (2, []),
    "ZeRO 2 on 2": (2, [f"{STAGES}.zero_stage=2"]),
    "ZeRO 3 on 2": (2, [f"{STAGES}.zero_stage=3"]),
    "2 replicas x 2 shards": (4, [f"{STAGES}.zero_stage=2", f"{DISTRIBUTED}.data_parallel_replicas=2"]),
    "tensor 2 with sequence parallelism": (
        2,
        [f"{DISTRIBUTED}.tensor_parallel=2", f"{DISTRIBUTED}.sequence_tensor_parallel=yes"],
    ),
    "pipeline 2 (1f1b)": (2, [f"{DISTRIBUTED}.pipeline_parallel=2"]),
    "contexts 2": (2, [f"{DISTRIBUTED}.sequence_data_parallel=2"]),
    "pipeline 2 x ZeRO 3 on 2": (4, [f"{DISTRIBUTED}.pipeline_parallel=2", f"{STAGES}.zero_stage=3"]),
    "ZeRO 2 on 2, offloaded": (2, [f"{STAGES}.zero_stage=2", f"{STAGES}.cpu_offload=yes"]),
}
"""Name → processes and overrides."""

PHASES = ("start", "load", "step", "save", "prune", "export")
"""`start` ends when rank 0 takes the run's lock, `load` with the first record; `save` and `export` are a `*.tmp` that is
newer than any complete folder, `prune` an older one; `step` is the rest, evaluations too."""
SECONDS_WITHOUT_SIGN = 300
SECONDS_TO_GO = 10
"""How long processes may be there yet after their launcher has gone."""
MARK = "FAULTS_RUN"
"""In the environment of all processes of a run: its folder."""


# What can be seen of a run from outside


class Sight:
    """Which phase a run is in, by the files in its folder."""

    def __init__(self, run: Path):
        self._run, self._metrics = run, run / "metrics.jsonl"
        self._unfinished = {"save": run / "checkpoint", "export": run / "export" / "llama"}
        self.begin()

    def begin(self) -> None:
        """There are new processes: what is there now is of those before."""
        self._since, self._locked, self._loaded = time.time(), self._lock(), False
        self._left = {place for place, _ in self._being_written()}

    def _lock(self) -> int:
        try:
            return (self._run / ".lock").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _being_written(self) -> Iterator[tuple[str, str]]:
        """(name, phase) of each unfinished folder."""
        for phase, folder in self._unfinished.items():
            try:
                names = os.listdir(folder)
            except FileNotFoundError:
                continue
            newest = max((int(name) for name in names if name.isdigit()), default=-1)
            for name in names:
                if name.endswith(".tmp"):
                    older = int(name.split(".")[0]) < newest
                    yield f"{phase}/{name}", "prune" if older else phase

    def iterations(self) -> int:
        """The last iteration that the processes of now have logged; 0: none."""
        try:
            with self._metrics.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4000))
                lines = file.read().splitlines()
            record = json.loads(lines[-1])
        except (FileNotFoundError, IndexError, ValueError):
            return 0
        return record["iteration"] if record["time"] > self._since else 0

    @property
    def loaded(self) -> bool:
        self._loaded = self._loaded or self.iterations() > 0
        return self._loaded

    @property
    def phase(self) -> str:
        written = list(self._being_written())
        self._left &= {name for name, _ in written}
        new = [phase for name, phase in written if name not in self._left]
        if new:
            return new[0]
        if self.loaded:
            return "step"
        return "load" if self._lock() != self._locked else "start"


def processes_of(folder: Path) -> list[int]:
    """Ids of all processes that were started for the run in `folder`."""
    mark, found = f"{MARK}={folder}".encode(), []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
            except OSError:  # gone, or not ours
                continue
    return found


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank → process id of the processes that a launcher has started and that are there."""
    found = {}
    try:
        tasks = list(Path(f"/proc/{launcher}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
        for child in children:
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            rank = next((word[5:] for word in variables if word.startswith(b"RANK=")), None)
            if b"modelyard.launch.rank" in words and rank is not None:
                found[int(rank)] = int(child)
    except OSError:
        return {}
    return found


def is_locked(run: Path) -> bool:
    """Whether a process holds the run's lock."""
    lock = run / ".lock"
    if lock.exists():
        with lock.open("r+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
    return False


# One run


class Hangs(Exception):
    """Nothing happens any more."""


@dataclass
class Job:
    """A run in `folder`, and the processes that it has at the moment."""

    folder: Path
    config: Path
    layout: str | None
    """One of `LAYOUTS`; None: one process without a launcher."""
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run = self.folder / "run"
        self.ranks: dict[int, int] = {}
        self.starts = self.launchers_killed = self.ranks_killed = 0
        (self.folder / "tmp").mkdir(parents=True)
        self.sight = Sight(self.run)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, restarts: int) -> None:
        words = [sys.executable, "-m", "modelyard", "train", str(self.config), *self.overrides]
        if self.layout is not None:
            processes, layout = LAYOUTS[self.layout]
            words += [*layout, "--nproc", str(processes), "--max-restarts", str(restarts)]
        self.starts, self.ranks_killed, self.ranks = self.starts + 1, 0, {}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with self.said.open("wb") as output:
            self.process = subprocess.Popen(
                words,
                cwd=self.folder,
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "OMP_NUM_THREADS": "1",
                    "TMPDIR": str(self.folder / "tmp"),
                    MARK: str(self.folder),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.meet()

    @property
    def said(self) -> Path:
        return self.folder / f"said-{self.starts}.txt"

    @property
    def ended(self) -> int | None:
        """The exit status, None while it lives."""
        assert self.process is not None
        return self.process.poll()

    def until(self, condition: Callable[[], object], what: str) -> bool:
        """Wait for it, looking every millisecond; False where the run ends before. Raises Hangs."""
        limit = time.monotonic() + SECONDS_WITHOUT_SIGN
        while not condition():
            if self.ended is not None:
                return False
            if time.monotonic() > limit:
                raise Hangs(f"{SECONDS_WITHOUT_SIGN} s of waiting for {what}")
            time.sleep(0.001)
        return True

    @property
    def newest(self) -> int:
        """Iteration of the newest checkpoint; -1 without any."""
        names = [path.name for path in (self.run / "checkpoint").glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=-1)

    def until_newer(self, iteration: int) -> bool:
        """Wait for a checkpoint of a later iteration; False where the run ends before."""
        return self.until(lambda: self.newest > iteration, "a checkpoint")

    def meet(self) -> bool:
        """Wait for (new) ranks; False where the run ends before."""
        before = set(self.ranks.values())
        assert self.process is not None
        if self.layout is None:
            self.ranks = {0: self.process.pid}
            self.sight.begin()
            return True
        launcher, processes = self.process.pid, LAYOUTS[self.layout][0]

        def are_there() -> bool:
            self.ranks = ranks_of(launcher)
            return len(self.ranks) == processes and before.isdisjoint(self.ranks.values())

        there = self.until(are_there, "the ranks to start")
        self.sight.begin()
        return there

    def reaches(self, aim: str, times: int) -> bool:
        """Wait until a phase begins for the n-th time; False where the run ends before."""
        if aim == "step":
            return self.until(lambda: self.sight.loaded, "the first record") and self._so_many_iterations(
                times
            )
        for number in range(times):
            if number and not self.until(lambda: self.sight.phase != aim, f"the end of {aim}"):
                return False
            if not self.until(lambda: self.sight.phase == aim, f"the beginning of {aim}"):
                return False
        return True

    def _so_many_iterations(self, number: int) -> bool:
        begin = self.sight.iterations()
        return self.until(lambda: self.sight.iterations() >= begin + number, "iterations")

    def kill(self, victim: str, rng: random.Random) -> str | None:
        """The phase in which it hit; None where the run was over."""
        assert self.process is not None
        chosen = sorted(self.ranks.values())
        if victim == "one rank":
            chosen = [rng.choice(chosen)]
        elif victim == "the launcher":
            chosen = [self.process.pid]
        hit = self.sight.phase
        if self.ended is not None or (victim != "the launcher" and ranks_of(self.process.pid) != self.ranks):
            return None
        with suppress(ProcessLookupError):
            for number in chosen:
                os.kill(number, signal.SIGKILL)
        if victim == "the launcher":
            self.launchers_killed += 1
            self.process.wait()
        else:
            self.ranks_killed += 1
        return hit

    def left_over(self) -> list[str]:
        """What of its processes, locks and temporary folders is there when there should be nothing."""
        limit, problems = time.monotonic() + SECONDS_TO_GO, []
        # A process on its way out loses what it is known by before it lets go of its files.
        while ((there := processes_of(self.folder)) or is_locked(self.run)) and time.monotonic() < limit:
            time.sleep(0.01)
        if there:
            problems.append(f"{len(there)} processes are there {SECONDS_TO_GO} s after their launcher")
            for number in there:
                os.kill(number, signal.SIGKILL)
        elif is_locked(self.run):
            problems.append("the run is still locked")
        return problems

    def end(self) -> list[str]:
        """Wait for the run to end by itself; what is wrong with how it ended."""
        self.until(lambda: False, "its end")
        problems = self.left_over()
        if status := self.ended:
            problems.append(f"ended with {status}")
        lines = self.said.read_text(errors="replace").splitlines()
        restarts = sum(line.startswith("restarting (") for line in lines)
        if restarts != self.ranks_killed:
            problems.append(f"{restarts} restarts after {self.ranks_killed} kills of ranks")
        unfinished = [str(path.relative_to(self.run)) for path in self.run.rglob("*.tmp")]
        if unfinished:
            problems.append(f"left unfinished: {unfinished}")
        # A launcher that was killed cannot take its folder for temporary files away; others do.
        there = [path.name for path in (self.folder / "tmp").glob("modelyard-*")]
        if len(there) > self.launchers_killed:
            problems.append(f"temporary files stay: {there}")
        return problems

    def stop(self) -> str:
        """End it with all its processes, after something went wrong; the last that was said."""
        for number in processes_of(self.folder):
            os.kill(number, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        files = [*sorted(self.folder.glob("said-*.txt")), *sorted((self.run / "logs").glob("rank-*.txt"))]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)
