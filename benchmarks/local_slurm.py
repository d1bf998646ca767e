"""A Slurm of this user's own, on this machine, for as long as it is needed: munged, slurmctld and two slurmd.

Needs Debian's slurm-wlm and munge, or the like with support for several slurmd on one host. No systemd, no cgroups, no
accounting; everything is in one folder. Nodes are named n1, n2; `main` is the default partition, jobs of `urgent` preempt
those of `main`.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from modelyard.launch.process import end_with_parent

DAEMONS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
GRACE = 20
"""Seconds that a preempted or cancelled job has."""


def missing() -> list[str]:
    """The programs of Slurm that are not on this machine."""
    return [name for name in DAEMONS if shutil.which(name, path=PATH) is None]


class LocalSlurm:
    """Runs while entered. Every process that it started, jobs included, is gone afterwards, whatever happened."""

    def __init__(self, folder: Path, *, nodes: int = 2, cpus: int = 2):
        self.folder, self.nodes, self.cpus = folder, nodes, cpus
        self.config = folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """For the commands that are to talk to this Slurm, and to no other."""
        ours = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        return ours | {"SLURM_CONF": str(self.config), "PATH": PATH}

    def __enter__(self) -> LocalSlurm:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, *words: str, cwd: Path | None = None, check: bool = True) -> str:
        """A command of Slurm's, as `squeue`; what it printed."""
        done = subprocess.run(
            words, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=30, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What Slurm knows of a job: `JobState`, `Restarts`, `ExitCode`, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, what: Callable[[], Any], seconds: float = 60.0, *, words: str) -> Any:
        """Until `what()` is true, which is returned; raises TimeoutError with the daemons' last words."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"{path.name}: {path.read_text(errors='replace')[-1500:]}"
                    for path in self.folder.glob("*.log")
                )
                raise TimeoutError(f"{words}: not within {seconds:g} s\n{logs}")
            time.sleep(0.1)
        return found

    def _start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(parents=True, mode=0o700)
        for name in ("state", *(f"spool-n{i + 1}" for i in range(self.nodes))):
            (self.folder / name).mkdir()
        self.config.write_text(self._configuration(munge / "socket"))
        self.run("mungekey", "--create", "--keyfile", str(munge / "key"))
        files = {
            name: munge / name for name in ("key-file", "socket", "log-file", "pid-file", "seed-file")
        } | {"key-file": munge / "key"}
        # Forced: it wants a folder that everybody can enter, and this one is for one user.
        self._daemon(
            "munged", "--foreground", "--force", "--num-threads=10", *(f"--{o}={p}" for o, p in files.items())
        )
        self.wait((munge / "socket").exists, 10, words="munged")
        self._daemon("slurmctld", "-D", "-i")
        for i in range(self.nodes):
            self._daemon("slurmd", "-D", "-N", f"n{i + 1}")
        idle = ["sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N"]
        self.wait(
            lambda: len(self.run(*idle, check=False).split()) == self.nodes, 30, words="nodes that are idle"
        )

    def _configuration(self, munge_socket: Path) -> str:
        host, folder, user = socket.gethostname(), self.folder, getpass.getuser()
        first, *others = _free_ports(1 + self.nodes)
        lines = f"""\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={first}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={munge_socket}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
KillWait={GRACE}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
""".splitlines()
        names = [f"n{i + 1}" for i in range(self.nodes)]
        for name, port in zip(names, others):
            lines.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} RealMemory=1000"
            )
        everywhere = f"Nodes={','.join(names)} State=UP"
        lines.append(f"PartitionName=main {everywhere} Default=YES PriorityTier=1 GraceTime={GRACE}")
        lines.append(f"PartitionName=urgent {everywhere} PriorityTier=2")
        return "\n".join(lines) + "\n"

    def _daemon(self, *words: str) -> None:
        parent = os.getpid()
        with (self.folder / f"{words[0]}-{len(self._daemons)}.out").open("wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    words,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for the one who started all this
                    preexec_fn=lambda: end_with_parent(parent),
                )
            )

    def _stop(self) -> None:
        with suppress(Exception):
            self.run("scancel", "--full", "--user", getpass.getuser(), "--signal=KILL")
            queue = ["squeue", "--noheader"]
            self.wait(lambda: not self.run(*queue).strip(), 10, words="an empty queue")
        for daemon in reversed(self._daemons):  # the nodes, the controller, munged
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.left_over():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def left_over(self) -> list[int]:
        """Processes of jobs: they and nobody else have this configuration in their environment."""
        mark = f"SLURM_CONF={self.config}".encode()
        found = []
        for place in Path("/proc").iterdir():
            if place.name.isdecimal() and int(place.name) != os.getpid():
                with suppress(OSError):
                    if mark in (place / "environ").read_bytes().split(b"\0"):
                        found.append(int(place.name))
        return found


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
