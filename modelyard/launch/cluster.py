"""A job for a cluster, whichever kind: what is asked for, checked, and the words that its processes run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.config.layout import world_problems
from modelyard.errors import UserError
from modelyard.files import replace_text

if TYPE_CHECKING:
    from modelyard.config.loader import Loaded
    from modelyard.config.reading import Kind

MARK = "Written by modelyard launch"
"""In the first lines of every file from here: `--overwrite` replaces such a file, and no other."""

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_MEMORY = re.compile(r"(\d+)([KMGT])")


@dataclass(frozen=True)
class ClusterJob:
    """What both kinds of cluster are told, each in its own words."""

    kind: Kind
    name: str
    files: list[Path]
    """The config, absolute paths."""
    overrides: list[str]
    folder: Path
    """The working directory: relative paths of the config are meant from here."""
    keeps: Path
    """What has to outlive the job: `run.experiment_dir`, or `output_path` of a preparation; as the job sees it."""
    min_nodes: int
    max_nodes: int
    processes: int
    """On each node."""
    gpus: int = 0
    """On each node; each process of a training has one."""
    cpus: int | None = None
    """On each node; None: what the cluster gives."""
    memory: str | None = None
    """Of each node, `64G`; `0`: all there is (Slurm)."""
    time: str | None = None
    """Limit, as Slurm writes it: `MINUTES`, `HH:MM:SS`, `D-HH:MM:SS`."""
    grace: int = 300
    """Seconds for saving: before the time limit, and when the cluster wants its node back."""
    image: str | None = None
    volumes: list[tuple[str, str]] = field(default_factory=list)
    """What is mounted in the image, and where."""
    env: list[tuple[str, str]] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run before the program."""
    program: list[str] = field(default_factory=lambda: ["modelyard"])
    """The words that start this program there."""
    max_restarts: int = 3
    """How often the processes are started again within the job after one of them failed."""

    @property
    def is_elastic(self) -> bool:
        """Whether the job may go on with fewer nodes."""
        return self.min_nodes != self.max_nodes

    @property
    def nodes(self) -> str:
        """`N` or `MIN:MAX`."""
        return f"{self.min_nodes}:{self.max_nodes}" if self.is_elastic else str(self.max_nodes)

    def command(self, files: list[Path] | list[str], rendezvous: list[str]) -> list[str]:
        """The words to run on each node (to be quoted), of a preparation in each process.

        `files` is the config as the node sees it; `rendezvous` are ready shell words that make several nodes find each other.
        """
        words = [*self.program, self.kind, *map(str, files), *self.overrides]
        if self.kind == "prepare":
            return [shlex.quote(word) for word in words]
        words += ["--nproc", str(self.processes)]
        if self.max_restarts:
            words += ["--max-restarts", str(self.max_restarts)]
        quoted = [shlex.quote(word) for word in words]
        return quoted if self.max_nodes == 1 else [*quoted, "--nnodes", self.nodes, *rendezvous]


def skipped_nodes(loaded: Loaded, job: ClusterJob) -> list[int]:
    """Numbers of nodes from the least to the most with which the training cannot be laid out; the rest then stands by."""
    if loaded.kind == "prepare":
        return []
    return [
        nodes
        for nodes in range(job.min_nodes, job.max_nodes)
        if world_problems(loaded.train, nodes * job.processes)
    ]


def seconds(time: str) -> int:
    """What a time limit as Slurm writes it says, in seconds. Raises UserError."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time: '{time}' is none of MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM and D-HH:MM:SS")
    numbers = [int(match[name] or 0) for name in ("first", "second", "third")]
    if match["days"] is not None or match["third"] is not None:
        hours, minutes, rest = numbers
    else:
        hours, (minutes, rest) = 0, numbers[:2]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def memory(text: str) -> tuple[int, str]:
    """Number and unit (K, M, G, T, of 1024) of an amount of memory. Raises UserError."""
    match = _MEMORY.fullmatch(text)
    if match is None:
        raise UserError(f"--mem: '{text}' is not a number with K, M, G or T, such as 64G (of 1024)")
    return int(match[1]), match[2]


def write(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a script or manifest; raises UserError where something else is there (`overwrite`: something not from here)."""
    if path.exists():
        there = path.read_text(encoding="utf-8", errors="replace")
        if MARK not in there[:400]:
            raise UserError(
                f"{path} exists and is not from `modelyard launch`; name another file with --output"
            )
        if there != text and not overwrite:  # it may have been changed by hand
            raise UserError(
                f"{path} exists and differs; remove it, name another with --output, or replace it (--overwrite)"
            )
    replace_text(path, text)


def submit(command: list[str], path: Path) -> int:
    """Hand the file at `path` to the cluster's own program, whose words are printed. Raises UserError where it refuses."""
    tool, by_hand = command[0], shlex.join([*command, str(path)])
    if shutil.which(tool) is None:
        raise UserError(
            f"{path} is written, but there is no {tool} on this machine; where there is one: {by_hand}"
        )
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it left with status {done.returncode}"]
        raise UserError(*(f"{by_hand}: {line}" for line in said))
    print(done.stderr, end="", flush=True)
    return 0
