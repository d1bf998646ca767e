"""The processes that prepare together: which of them this is, and what they know of each other.

They meet in the folder of parts (`parts.py`) alone: each keeps a small file `rank-<n>.json` there that it writes anew every few
seconds, its sign of life; `division.json` has how many they are, `failed.json` that what is there is of no use. Mistakes are
found here and said; that the data is right does not depend on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.config.prepare import PrepareConfig
from modelyard.data.output import differences, in_the_input
from modelyard.data.parts import PartFolder, read_json, replace_json
from modelyard.data.workers import Stopped, available_cores
from modelyard.errors import UserError
from modelyard.parallel import rank as environment

BEAT_SECONDS = 5.0
"""How often a process gives a sign of life."""
WATCH_SECONDS = 3 * BEAT_SECONDS
"""How long one on another machine is watched for a sign of life before it is taken for gone."""
END_POLL_SECONDS = 2.0
DIVISION = "division.json"
IDENTITY = "identity.json"
FAILED = "failed.json"


class PutTogether(Exception):
    """The folder of parts is gone: rank 0 has what it needs."""


@dataclass(frozen=True)
class Rank:
    """One of `world_size` processes."""

    number: int = 0
    world_size: int = 1

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    def owns(self, part: int) -> bool:
        """Whether a part is this one's to make. By turns, so that all come to the end of the source at about the same time."""
        return part % self.world_size == self.number


def own_rank(config: PrepareConfig) -> Rank:
    """Which of how many processes this is, by the config or else by the environment that torchrun makes.

    Raises:
        UserError: they differ, or do not say which one this is.
    """
    given = config.distributed
    if "WORLD_SIZE" not in os.environ:
        if "RANK" in os.environ and given.world_size is None:
            raise UserError(
                f"the environment has RANK={os.environ['RANK']} and no WORLD_SIZE to say how many processes there are; set it "
                "too, or unset RANK"
            )
        if (given.world_size or 1) > 1 and given.rank is None:
            raise UserError(
                f"distributed.world_size: {given.world_size} processes, and nothing says which of them this is: set "
                "distributed.rank, or start them with torchrun"
            )
        return Rank(given.rank or 0, given.world_size or 1)
    found = Rank(environment.rank(), environment.number_of_processes())
    if not found.alone and "RANK" not in os.environ:
        raise UserError(
            f"the environment has WORLD_SIZE={found.world_size} and no RANK to say which process this is"
        )
    for key, value, there in (
        ("world_size", given.world_size, found.world_size),
        ("rank", given.rank, found.number),
    ):
        if value is not None and value != there:
            variable = "WORLD_SIZE" if key == "world_size" else "RANK"
            raise UserError(
                f"distributed.{key}: {value}, but the environment has {variable}={there}; leave one of the two out"
            )
    return found


def cores_of_rank(rank: Rank) -> int:
    """Cores for the worker processes of this one: torchrun starts several on a machine and leaves all cores to each."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    return available_cores() if rank.alone else max(1, available_cores() // max(1, local))


def parts_root(output: Path) -> Path:
    """The folder beside `output` with the folders of parts, one for each thing they may be made from."""
    return output.with_name(output.name + ".parts")


def parts_folder(
    output: Path, identity: dict[str, Any], overwrite: bool, *, clear: bool
) -> tuple[Path, bool]:
    """Where the parts go that are made from `identity`; and whether there are others, of no use.

    Those of no use (`overwrite`, or their input had an error) are removed with `clear`.

    Raises:
        UserError: there are parts made from something else.
    """
    root = parts_root(output)
    own = root / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    useless = []
    with suppress(FileNotFoundError, NotADirectoryError):  # rank 0 may be removing it
        useless = [folder for folder in root.iterdir() if folder != own]
    for folder in useless:
        made_from = read_json(folder / IDENTITY)
        if made_from is not None and not overwrite and not (folder / FAILED).exists():
            raise UserError(
                f"{folder} holds unfinished work on something else ({differences(made_from, identity)}): set that back to go "
                "on with it, or start over (--overwrite). Processes that prepare together must find the same files"
            )
    for folder in useless if clear else ():
        shutil.rmtree(folder, ignore_errors=True)
    return own, bool(useless)


def join(
    folder: Path,
    identity: dict[str, Any],
    rank: Rank,
    dtype: str,
    timeout: float,
    report: Callable[[str], None],
) -> Team:
    """Become one of those who work in `folder`; raises as `Attendance.enter` does."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / IDENTITY).exists():
        replace_json(folder / IDENTITY, identity, durable=True)
    attendance = Attendance(folder, rank, report)
    attendance.enter()
    if not rank.number:
        (folder / FAILED).unlink(missing_ok=True)
    return Team(rank, PartFolder(folder, dtype), attendance, timeout)


@dataclass
class Team:
    """Where this process is one of several, or several have been at the same work before."""

    rank: Rank
    parts: PartFolder
    attendance: Attendance
    timeout: float
    """Seconds of silence after which rank 0 does another's share."""

    def leave(self, error: BaseException) -> None:
        """Say what this process ends with."""
        if isinstance(error, UserError):
            self.attendance.leave("failed", "; ".join(error.problems))
        if in_the_input(error):
            with suppress(OSError):
                replace_json(self.parts.path / FAILED, {"rank": self.rank.number, "problem": str(error)})

    def wait_for_the_end(self) -> None:
        """Where torchrun has started several machines, stay until rank 0 is done; if it is lost, torchrun ends this one too.

        Torchrun's agents wait five minutes for each other, and then the one that holds the meeting point may leave, which
        ends the others.
        """
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            return
        with suppress(PutTogether):
            while self.parts.path.exists():
                time.sleep(END_POLL_SECONDS)
                self.attendance.beat("done")


class Attendance:
    """This process's file among those of the others.

    Args:
        folder: where the parts are.
        rank: which one this is.
        report: prints one line.

    Raises:
        Stopped: from `enter` and `beat`, when somebody else is this rank, or works with another number of processes.
        PutTogether: from `beat`, when the folder is gone.
    """

    def __init__(self, folder: Path, rank: Rank, report: Callable[[str], None]):
        self.folder = folder
        self.rank = rank
        self.report = report
        self._token = uuid.uuid4().hex
        self._beats = 0
        self._written = -BEAT_SECONDS
        self._watched: dict[int, tuple[dict[str, Any] | None, float]] = {}

    def enter(self) -> None:
        """Take this process's place; returns when it is known that nobody who works has it, or is one of another number."""
        number, world_size = self.rank.number, self.rank.world_size
        division = read_json(self.folder / DIVISION)
        if division is not None and division["world_size"] != world_size:
            files = [status for status in self._all() if status["world_size"] != world_size]
            if (other := self._at_work(files)) is not None:
                raise Stopped(
                    f"WORLD_SIZE is {world_size} here, and {other['world_size']} for {_who(other)}, which is at work on the "
                    "same output_path: start all processes with the same number"
                )
        mine = read_json(self._file(number))
        if mine is not None and self._at_work([mine]) is not None:
            raise Stopped(f"{_who(mine)} is at work on the same output_path already")
        replace_json(self.folder / DIVISION, {"world_size": world_size})
        if number == 0:
            # What those of an earlier start said last is not news. One that is there already writes its file again.
            for path in self.folder.glob("rank-*.json"):
                path.unlink(missing_ok=True)
        self._write("working")

    def beat(self, state: str = "working") -> None:
        """Call as often as you like: gives a sign of life when it is time."""
        if time.monotonic() - self._written < BEAT_SECONDS:
            return
        there = read_json(self._file(self.rank.number))
        if there is not None and there["token"] != self._token:
            raise Stopped(f"{_who(there)} has been started, so that this one leaves")
        division = read_json(self.folder / DIVISION)
        if division is not None and division["world_size"] != self.rank.world_size:
            raise Stopped(
                f"WORLD_SIZE is {self.rank.world_size} here, and a process that was started later says "
                f"{division['world_size']}: start all processes with the same number"
            )
        self._write(state)

    def leave(self, state: str, problem: str | None = None) -> None:
        """Say that this process is `done` or `failed`, and with what."""
        try:
            self._write(state, problem)
        except (OSError, PutTogether):
            pass  # then the others find out by its silence

    def failed(self) -> str | None:
        """What another process failed with, its rank before it."""
        for status in self._all():
            if status["state"] == "failed" and status["world_size"] == self.rank.world_size:
                return f"rank {status['rank']}: {status['problem']}"
        return None

    def gone(self, number: int, patience: float) -> str | None:
        """Why nothing is to be expected of a rank any more: it has left, or been silent for `patience` seconds."""
        status, now = read_json(self._file(number)), time.monotonic()
        before, since = self._watched.get(number, (None, now))
        if number not in self._watched or status != before:
            self._watched[number] = (status, now)
            since = now
        if status is not None and status["state"] == "done" and now - since >= WATCH_SECONDS:
            return f"{_who(status)} has left"
        if now - since >= patience:
            who = f"rank {number}" if status is None else _who(status)
            return f"nothing has been heard of {who} for {patience:,.0f} seconds"
        return None

    def _write(self, state: str, problem: str | None = None) -> None:
        self._beats += 1
        self._written = time.monotonic()
        status = {
            "rank": self.rank.number,
            "world_size": self.rank.world_size,
            "state": state,
            "problem": problem,
            "beat": self._beats,
            "token": self._token,
            "host": platform.node(),
            **_this_process(),
        }
        try:
            replace_json(self._file(self.rank.number), status)
        except FileNotFoundError:
            raise PutTogether from None

    def _file(self, number: int) -> Path:
        return self.folder / f"rank-{number}.json"

    def _all(self) -> list[dict[str, Any]]:
        found = [read_json(path) for path in sorted(self.folder.glob("rank-*.json"))]
        return [status for status in found if status is not None]

    def _at_work(self, statuses: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """One of these that works still. One of another machine has to be watched for that."""
        elsewhere = []
        for status in statuses:
            if status["state"] != "working":
                continue
            if status["machine"] != _machine():
                elsewhere.append(status)
            elif status["pid"] != os.getpid() and status["started"] == _started(status["pid"]) is not None:
                return status
        if not elsewhere:
            return None
        self.report(f"looking whether {_who(elsewhere[0])} is still at work, for {WATCH_SECONDS:.0f} seconds")
        until = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < until:
            time.sleep(min(1.0, WATCH_SECONDS / 10))
            for status in elsewhere:
                now = read_json(self._file(status["rank"]))
                if now is not None and now != status and now["state"] == "working":
                    return now
        return None


def _who(status: dict[str, Any]) -> str:
    return f"rank {status['rank']} (process {status['pid']} on {status['host']})"


def _machine() -> str:
    """What no other running machine has."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _started(pid: int) -> str | None:
    """When a process of this machine was started, on a clock of its own; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except OSError:
            return None
        return "?"
    # The third and the 22nd field of proc(5): Z is one that has ended and whose parent has not asked how.
    return None if fields[0] in "ZX" else fields[19]


def _this_process() -> dict[str, Any]:
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}
