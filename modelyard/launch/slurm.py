"""`modelyard launch slurm`: a job as a script for sbatch.

Who receives what (measured with Slurm 22.05): before the time limit the batch shell alone gets SIGUSR1 (`--signal=B:`) and
sends it to srun, which forwards it to every process of the step, launchers and ranks. `scancel JOB`, preemption and the
time limit itself send SIGTERM to every process, this shell and srun included; a preempted job that leaves within its grace
time counts as ended, so that it has to ask for its place in the queue itself.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from modelyard.launch.cluster import MARK, ClusterJob, memory

Runtime = Literal["pyxis", "apptainer"]


@dataclass(frozen=True)
class SlurmJob:
    """A job, and what only Slurm is told."""

    job: ClusterJob
    log: Path
    """What the job writes; `%j` becomes its number."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    lines: list[str] = field(default_factory=list)
    """More options of sbatch, each a line, without the dashes: `constraint=h100`."""
    runtime: Runtime = "pyxis"
    """What runs the image, where there is one."""
    max_idle_starts: int = 3
    """After so many starts in a row without a new checkpoint the job is not queued again."""


def script(slurm: SlurmJob) -> str:
    """The whole script for sbatch."""
    job = slurm.job
    parts = [
        f"#!/bin/bash\n# {MARK} slurm; submit it with sbatch. It may be changed by hand.\n{_options(slurm)}",
        _SIGNALS,
        _environment(job),
        _progress(slurm),
        _leave(slurm),
        _step(slurm),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _options(slurm: SlurmJob) -> str:
    job = slurm.job
    tasks = job.processes if job.kind == "prepare" else 1
    options: dict[str, object] = {
        "job-name": job.name,
        "nodes": f"{job.min_nodes}-{job.max_nodes}" if job.is_elastic else job.max_nodes,
        # With a number of tasks, Slurm gives a job of MIN to MAX nodes no more than MIN.
        "ntasks-per-node": None if job.is_elastic else tasks,
        "gpus-per-node": job.gpus or None,
        "cpus-per-task": job.cpus and job.cpus // tasks,
        "mem": job.memory and (job.memory if job.memory == "0" else "{}{}".format(*memory(job.memory))),
        "time": job.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "chdir": job.folder,
        "output": slurm.log,
    }
    lines = [f"{name}={quoted(str(value))}" for name, value in options.items() if value is not None]
    # Append: what was said before the job was queued again stays.
    lines += ["open-mode=append", "requeue", f"signal=B:USR1@{job.grace}"]
    lines += ["no-kill"] * job.is_elastic  # the loss of a node is not the end
    return "\n".join(f"#SBATCH --{line}" for line in [*lines, *slurm.lines])


def quoted(value: str) -> str:
    """A value for an #SBATCH line: quoted as for a shell, but a backslash escapes everywhere, and within quotes too."""
    if re.fullmatch(r"[\w@%+=:,./-]+", value, re.ASCII):
        return value
    return "'" + re.sub(r"(['\\])", r"\\\1", value) + "'"


def _environment(job: ClusterJob) -> str:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in job.env]
    if job.setup:
        lines = ["set -e", *job.setup, "set +e", *lines]
    return "\n".join(lines)


def _progress(slurm: SlurmJob) -> str:
    """What stops a job that is queued again and again and gets nowhere."""
    job, log = slurm.job, slurm.log
    kept = _outside(job, job.keeps)
    if job.kind == "train":
        checkpoints = shlex.quote(str(kept / "checkpoint"))
        found = (
            f"find {checkpoints} -mindepth 1 -maxdepth 1 -type d -name '[0-9]*' ! -name '*[!0-9]*' "
            "-printf '%f\\n' 2>/dev/null |\n        sort -n | tail -n 1"
        )
        what = "a new checkpoint"
    else:
        unfinished = " ".join(shlex.quote(f"{kept}.{ending}") for ending in ("tmp", "parts"))
        found = (
            f"find {unfinished} -type f ! -name '*.json' -printf '%s\\n' 2>/dev/null |\n"
            "        awk '{ bytes += $1 } END { print bytes + 0 }'"
        )
        what = "more on the disk"
    return f"""\
# A job that is started again and again without getting any further is stopped.
reached() {{
    {found}
}}
give_up() {{
    echo "modelyard: $1 starts in a row ended without {what}; the job is not queued again" >&2
    rm -f "$starts"
    exit 1
}}
max_idle={slurm.max_idle_starts}
starts={shlex.quote(str(log.parent))}/.modelyard-$SLURM_JOB_ID
begin=$(reached)
idle=0
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] && read -r before count 2>/dev/null <"$starts"; then
    [ "$before" != "${{begin:-nothing}}" ] || idle=$((count + 1))
    [ "$idle" -lt "$max_idle" ] || give_up "$idle"
fi
echo "${{begin:-nothing}} $idle" >"$starts\""""


def _leave(slurm: SlurmJob) -> str:
    lost = """
    elif [ "$status" -eq 1 ]; then # fewer nodes than MIN, perhaps
        case "$(scontrol show job "$SLURM_JOB_ID")" in
        *" NumNodes=$SLURM_JOB_NUM_NODES "*) ;;
        *" NumNodes="*) again=yes ;;
        esac"""
    return f"""\
# 138: saved and left because of SIGUSR1. What was cancelled by hand is not queued again.
leave() {{
    local status=$1 again=
    [ -z "$told" ] || [ "$status" -lt 128 ] || status=138
    if [ "$status" -ge 128 ]; then
        case "$status $(scontrol show job "$SLURM_JOB_ID")" in
        *Reason=TimeLimit* | *PreemptTime=[0-9]* | "138 "*JobState=RUNNING*) again=yes ;;
        esac{lost * slurm.job.is_elastic}
    fi
    if [ -z "$again" ]; then
        rm -f "$starts"
    elif [ "$(reached)" = "$begin" ] && [ $((idle + 1)) -ge "$max_idle" ]; then
        give_up $((idle + 1))
    else
        echo "modelyard: job $SLURM_JOB_ID is queued again, to go on from here" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}}"""


def _step(slurm: SlurmJob) -> str:
    job = slurm.job
    rendezvous: list[str] = []
    before = ""
    if job.kind == "train" and job.max_nodes > 1:
        # Below the ports that Linux gives to outgoing connections.
        before = "head=$(hostname)\nport=$((15000 + SLURM_JOB_ID % 15000))\n"
        rendezvous = ["--rdzv-endpoint", '"$head:$port"', "--rdzv-id", '"$SLURM_JOB_ID"']
    words = [*_srun(slurm), *_inside(slurm, job.command(job.files, rendezvous))]
    if job.kind == "prepare" and job.max_nodes * job.processes > 1:
        before += "# shellcheck disable=SC2016  # each process has its own\n"
    return f"""\
[ -z "$told" ] || leave 138 # it came while all this was made ready
{before}{_folded(words)} &
step=$!
while true; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || leave "$status" # else it was a signal that ended the waiting
done"""


def _srun(slurm: SlurmJob) -> list[str]:
    job = slurm.job
    words = ["srun", "--export=ALL"]
    if job.cpus is None:
        words.append("--cpu-bind=none")  # a task counts as one CPU then, and would be kept on it
    else:
        words.append('--cpus-per-task="$SLURM_CPUS_PER_TASK"')  # not inherited since Slurm 22.05
    if job.kind == "train":
        # The launchers themselves know what the end of one means for the others, which may be saving still.
        words += ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0", *["--no-kill"] * job.is_elastic]
    else:
        words.append("--kill-on-bad-exit=1")
    if job.image is not None and slurm.runtime == "pyxis":
        words += [
            f"--container-image={shlex.quote(job.image)}",
            f"--container-mounts={shlex.quote(_mounts(job))}",
            f"--container-workdir={shlex.quote(str(job.folder))}",
        ]
    return words


def _inside(slurm: SlurmJob, command: list[str]) -> list[str]:
    """The command in the image, if there is one; of a preparation with its number, which Slurm has in its own words."""
    job = slurm.job
    if job.kind == "prepare" and job.max_nodes * job.processes > 1:
        numbered = 'export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS"; exec "$@"'
        command = ["bash", "-c", shlex.quote(numbered), "prepare", *command]
    if job.image is None or slurm.runtime == "pyxis":
        return command
    gpus = ["--nv"] * bool(job.gpus)
    words = ["--bind", _mounts(job), "--pwd", str(job.folder), job.image]
    return ["apptainer", "exec", *gpus, *map(shlex.quote, words), *command]


def _mounts(job: ClusterJob) -> str:
    """Volumes, and what the words of the command name: working directory and config."""
    places = dict.fromkeys([job.folder, *(file.parent for file in job.files)])
    return ",".join([*(f"{place}:{place}" for place in places), *map(":".join, job.volumes)])


def _outside(job: ClusterJob, path: Path) -> Path:
    """A path of the image as the node itself has it."""
    for source, target in job.volumes:
        if path.is_relative_to(target):
            return Path(source) / path.relative_to(target)
    return path


def _folded(words: list[str]) -> str:
    """A long command over several lines."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) > 100:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n    ".join(lines)


_SIGNALS = """\
# Before the time limit this shell alone is told; srun sends it on to every process. SIGTERM they all get, and save.
told=
step=
trap 'told=USR1; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1
trap : TERM"""
