"""From the options of `modelyard launch` to a job that can be written down, or all the reasons why there is none."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from modelyard.errors import UserError
from modelyard.launch.cluster import ClusterJob, memory, seconds
from modelyard.launch.slurm import Runtime, SlurmJob

if TYPE_CHECKING:
    from modelyard.config.loader import Loaded

Target = Literal["slurm", "kubeflow"]
TARGETS: tuple[Target, ...] = ("slurm", "kubeflow")

ONLY: dict[Target, tuple[str, ...]] = {
    "slurm": ("partition", "account", "qos", "log", "sbatch", "container_runtime", "max_idle_starts"),
    "kubeflow": ("namespace",),
}
"""Options that one kind of cluster alone has a use for."""

WRITTEN: dict[str, str] = {
    "job-name": "use --job-name",
    "nodes": "use --nodes",
    "ntasks": "use --nodes and --processes-per-node",
    "gpus": "use --gpus-per-node",
    "cpus-per-task": "use --cpus",
    "mem": "use --mem",
    "time": "use --time",
    "partition": "use --partition",
    "account": "use --account",
    "qos": "use --qos",
    "chdir": "call launch in that folder",
    "output": "use --log",
    "open-mode": "leave it out",
    "requeue": "use --max-idle-starts",
    "no-requeue": "use --max-idle-starts 1",
    "signal": "use --grace",
    "no-kill": "use --nodes MIN:MAX",
}
"""Options of sbatch that the script has already, or depends on, and what to do in place of them; `ntasks` and `gpus` stand for
`ntasks-per-node` and others too."""


def cluster_job(
    target: Target, options: argparse.Namespace, loaded: Loaded, files: list[Path], overrides: list[str]
) -> ClusterJob:
    """The job that is asked for. Raises UserError with a line for each reason why there is none."""
    problems = [
        f"--{name.replace('_', '-')} is for {other} alone"
        for other in TARGETS
        for name in ONLY[other]
        if other != target and getattr(options, name) is not None
    ]
    min_nodes, max_nodes = _nodes(options.nodes, loaded.kind, problems)
    processes, gpus = _processes(target, options, loaded.kind, problems)
    if options.cpus is not None:
        tasks = processes if loaded.kind == "prepare" else 1
        if not options.cpus or options.cpus % tasks:
            problems.append(f"--cpus: {options.cpus} CPUs of a node cannot be dealt to {tasks} processes")
    _limits(target, options, problems)
    volumes = [_pair("--volume", text, ":", "SOURCE:PATH", problems) for text in options.volume]
    env = [_pair("--env", text, "=", "NAME=VALUE", problems) for text in options.env]
    problems += [
        f"--env: '{name}' is no name of a variable"
        for name, _ in env
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)
    ]
    problems += [
        f"--volume: '{path}' is not an absolute path" for _, path in volumes if path and path[0] != "/"
    ]
    if target == "slurm":
        folder = Path.cwd()
        volumes = [(os.path.abspath(source), path) for source, path in volumes]
        if volumes and options.image is None:
            problems.append("--volume is mounted in an image, and there is none; name one with --image")
    else:
        folder = Path(volumes[0][1] if volumes else "/")
        if options.image is None:
            problems.append("--image: Kubeflow runs containers; name an image that has modelyard in it")
    keeps = loaded.train.run.experiment_dir if loaded.kind == "train" else loaded.prepare.output_path
    keeps = Path(os.path.normpath(folder / keeps))
    if all(path for _, path in volumes):
        problems += _not_kept(target, options, volumes, folder, keeps, loaded.kind)
    problems += _setup_problems(options.setup)
    if problems:
        raise UserError(*problems)
    return ClusterJob(
        kind=loaded.kind,
        name=options.job_name or re.sub(r"[^a-z0-9]+", "-", files[0].stem.lower()).strip("-") or loaded.kind,
        files=[Path(os.path.abspath(file)) for file in files],
        overrides=overrides,
        folder=folder,
        keeps=keeps,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        processes=processes,
        gpus=gpus,
        cpus=options.cpus,
        memory=options.mem,
        time=options.time,
        grace=options.grace,
        image=options.image,
        volumes=volumes,
        env=env,
        setup=options.setup,
        program=_program(options),
        max_restarts=3 if options.max_restarts is None else options.max_restarts,
    )


def slurm_job(options: argparse.Namespace, job: ClusterJob, script: Path | None) -> SlurmJob:
    """The same with what only Slurm is told; `script` is the file it is to be in. Raises UserError."""
    if not re.fullmatch(r"[\w.-]+", job.name, re.ASCII):
        raise UserError(f"--job-name: '{job.name}' has more than letters, digits, '.', '_' and '-'")
    if options.max_idle_starts == 0:
        raise UserError("--max-idle-starts: at least 1")
    runtime: Runtime | None = options.container_runtime
    if runtime is not None and job.image is None:
        raise UserError("--container-runtime runs an image, and there is none; name one with --image")
    image = job.image or ""
    if runtime is None:
        runtime = "apptainer" if image.endswith(".sif") or "://" in image else "pyxis"
    beside = Path.cwd() if script is None else script.parent
    log = Path(os.path.abspath(options.log)) if options.log else beside.absolute() / f"{job.name}-%j.out"
    lines = [line.strip().removeprefix("--") for line in options.sbatch or []]
    for line in lines:
        if not re.match(r"[a-zA-Z]", line) or "\n" in line:
            raise UserError(f"--sbatch: '{line}' is no option of sbatch, such as constraint=h100")
        name = re.split(r"[=\s]", line, maxsplit=1)[0]
        kind = "gpus" if line.startswith("gres=gpu") else re.sub(r"^(ntasks|gpus)-.*", r"\1", name)
        if kind in WRITTEN:
            raise UserError(f"--sbatch: '{line}': launch sets this itself; {WRITTEN[kind]}")
    return SlurmJob(
        job,
        log=log,
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        lines=lines,
        runtime=runtime,
        max_idle_starts=3 if options.max_idle_starts is None else options.max_idle_starts,
    )


def _nodes(text: str, kind: str, problems: list[str]) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if least > most:
        wrong = f"has MIN above MAX; write {most}:{least}" if match else "is neither N nor MIN:MAX, from 1 on"
        problems.append(f"--nodes: '{text}' {wrong}")
        return 1, 1
    if kind == "prepare" and least < most:
        problems.append(
            f"--nodes: {text}, but a preparation has one number of nodes from its start to its end"
        )
    return least, most


def _processes(
    target: Target, options: argparse.Namespace, kind: str, problems: list[str]
) -> tuple[int, int]:
    """Processes and GPUs of a node."""
    gpus, processes = options.gpus_per_node, options.processes_per_node
    if processes == 0:
        problems.append("--processes-per-node: at least 1")
    if kind == "prepare":
        if gpus:
            problems.append("--gpus-per-node: a preparation has no use for GPUs; leave it out")
        if target == "kubeflow" and (processes or 1) > 1:
            problems.append(
                "--processes-per-node: Kubeflow starts one process a pod; write more --nodes, or tokenize_workers"
            )
        return processes or 1, 0
    if gpus is None:
        problems.append("--gpus-per-node N is missing; on CPUs: --gpus-per-node 0 --processes-per-node P")
    elif gpus and processes not in (None, gpus):
        problems.append(
            f"--processes-per-node: {processes}, but each of {gpus} GPUs has a process; leave it out"
        )
    return gpus or processes or 1, gpus or 0


def _limits(target: Target, options: argparse.Namespace, problems: list[str]) -> None:
    try:
        if options.time is not None and seconds(options.time) <= options.grace:
            problems.append(f"--time: {options.time} leaves nothing before the {options.grace} s of --grace")
        if options.mem is not None and not (target == "slurm" and options.mem == "0"):
            memory(options.mem)
    except UserError as error:
        problems += error.problems


def _pair(option: str, text: str, sign: str, form: str, problems: list[str]) -> tuple[str, str]:
    first, found, second = text.partition(sign)
    if not (first and found and (second or sign == "=")):
        problems.append(f"{option}: '{text}' is not {form}")
    return first, second


def _not_kept(
    target: Target,
    options: argparse.Namespace,
    volumes: list[tuple[str, str]],
    folder: Path,
    keeps: Path,
    kind: str,
) -> list[str]:
    """Why what is made would go with the container."""
    if options.image is None:
        return []
    places = [path for _, path in volumes] + ([str(folder)] if target == "slurm" else [])
    if any(keeps.is_relative_to(place) for place in places):
        return []
    key = "run.experiment_dir" if kind == "train" else "output_path"
    source = "CLAIM" if target == "kubeflow" else "FOLDER"
    return [f"{key}: {keeps} is on no --volume and would go with the container; add --volume {source}:PATH"]


def _setup_problems(lines: list[str]) -> list[str]:
    """What bash says against the lines of `--setup`, which stand in the script as they are; all else there is quoted."""
    if not lines or shutil.which("bash") is None:
        return []
    done = subprocess.run(
        ["bash", "-n"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
    )
    if not done.returncode and "here-document" not in done.stderr:
        return []
    said = done.stderr.strip().splitlines() or [f"bash -n left with status {done.returncode}"]
    return [f"--setup: {said[0].removeprefix('bash: ')}"]


def _program(options: argparse.Namespace) -> list[str]:
    if options.program is not None:
        try:
            words = shlex.split(options.program)
        except ValueError as error:
            raise UserError(f"--program: {error}") from None
        if not words:
            raise UserError("--program: nothing to start")
        return words
    # What is active here is what is there where the file system is shared.
    return ["modelyard"] if options.image or options.setup else [sys.executable, "-m", "modelyard"]
