"""The verb that writes jobs for clusters: launch."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.cli.arguments import Verb, count, files_and_overrides, load
from modelyard.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from modelyard.config.loader import Loaded
    from modelyard.launch.cluster import ClusterJob


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="slurm|kubeflow CONFIG|KEY=VALUE",
        help="where, YAML files and dotted overrides",
    )
    parser.add_argument("-c", "--config", action="append", default=[], metavar="CONFIG", help="a YAML file")
    add = parser.add_argument_group("processes").add_argument
    add(
        "--nodes", default="1", metavar="N|MIN:MAX", help="default: 1; MIN:MAX: a training goes on with fewer"
    )
    add("--gpus-per-node", type=count, metavar="G", help="with a process each; 0: on CPUs")
    add("--processes-per-node", type=count, metavar="P", help="on CPUs (default: 1)")
    add("--max-restarts", type=count, metavar="K", help="of failed processes, within the job (default: 3)")
    add = parser.add_argument_group("what a node gives").add_argument
    add("--cpus", type=count, metavar="N", help="CPUs (default: the cluster's)")
    add("--mem", metavar="SIZE", help="memory, 64G; 0: all of it (Slurm)")
    add("--time", metavar="TIME", help="limit: MINUTES, HH:MM:SS or D-HH:MM:SS")
    add(
        "--grace",
        type=count,
        default=300,
        metavar="S",
        help="seconds for saving, before the limit too (default: 300)",
    )
    add = parser.add_argument_group("what runs there").add_argument
    add(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="of shell, before the program; repeatable",
    )
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    add("--image", metavar="IMAGE", help="container to run in; Kubeflow needs one")
    add(
        "--volume",
        action="append",
        default=[],
        metavar="SOURCE:PATH",
        help="a folder (Slurm) or claim (Kubeflow), and where it is in the container; repeatable",
    )
    add(
        "--program",
        metavar="WORDS",
        help="what starts this program (default: modelyard; without --image and --setup this python's)",
    )
    add = parser.add_argument_group("the job").add_argument
    add("--job-name", metavar="NAME", help="default: as the config's file")
    add(
        "--output",
        metavar="FILE",
        help="to write; -: the screen (default: NAME.sbatch, NAME.pytorchjob.yaml)",
    )
    add("--overwrite", action="store_true", help="replace a file from here that differs, changes by hand too")
    add("--submit", action="store_true", help="hand it to sbatch or kubectl")
    add = parser.add_argument_group("Slurm only").add_argument
    for option in ("partition", "account", "qos"):
        add(f"--{option}", metavar="NAME")
    add(
        "--log",
        metavar="FILE",
        help="with %%j for the job's number (default: NAME-%%j.out beside the script)",
    )
    add(
        "--sbatch",
        action="append",
        metavar="OPTION",
        help="any other of sbatch's: constraint=h100; repeatable",
    )
    add(
        "--container-runtime",
        choices=("pyxis", "apptainer"),
        help="default: apptainer for IMAGE.sif and X://IMAGE, else pyxis",
    )
    add(
        "--max-idle-starts",
        type=count,
        metavar="N",
        help="queued again no more after so many starts in a row without a new checkpoint (default: 3)",
    )
    add = parser.add_argument_group("Kubeflow only").add_argument
    add("--namespace", metavar="NAME")


def _launch(options: argparse.Namespace) -> int:
    from modelyard.launch.asked import TARGETS, cluster_job, slurm_job
    from modelyard.launch.cluster import submit, write

    word = options.words[0] if options.words else ""
    target = next((name for name in TARGETS if name == word), None)
    if target is None:
        raise UserError(
            f"'{word}' is none of {', '.join(TARGETS)}{did_you_mean(word, TARGETS)}; as in `{options.example}`"
        )
    options.words = options.words[1:]
    if options.output == "-" and options.submit:
        raise UserError("--submit needs a file, and --output - makes none; leave one of the two out")
    files, overrides = files_and_overrides(options)
    loaded = load(options, None, keep_problems=True)
    job = cluster_job(target, options, loaded, files, overrides)
    ending = {"slurm": "sbatch", "kubeflow": "pytorchjob.yaml"}[target]
    path = None if options.output == "-" else Path(options.output or f"{job.name}.{ending}")
    if target == "slurm":
        from modelyard.launch.slurm import script

        slurm = slurm_job(options, job, path)
        text, log = script(slurm), slurm.log
    else:
        from modelyard.launch.kubeflow import manifest

        text, log = manifest(job, namespace=options.namespace), None
    _check(options, loaded, job, data_is_here=target == "slurm" and job.image is None)
    if path is None:
        print(text, end="")
        return 0
    write(path, text, overwrite=options.overwrite)
    if log is not None:
        log.parent.mkdir(
            parents=True, exist_ok=True
        )  # sbatch does not, and the job would fail without a word
    print(f"wrote {os.path.relpath(path)}")
    if not options.submit:
        return 0
    return submit(["sbatch"] if target == "slurm" else ["kubectl", "apply", "-f"], path)


def _check(options: argparse.Namespace, loaded: Loaded, job: ClusterJob, *, data_is_here: bool) -> None:
    """Raise UserError where the config cannot run on so many processes, and say what there is to say about it.

    Where `data_is_here` is no, data and weights are where the job will be.
    """
    from modelyard.launch.cluster import skipped_nodes
    from modelyard.plan.summary import summarise

    _, problems, warnings = summarise(loaded, job.max_nodes * job.processes)
    if problems:
        raise UserError(*problems)
    said = [f"warning: {warning}" for warning in warnings if data_is_here]
    if skipped := skipped_nodes(loaded, job):
        numbers = ", ".join(map(str, skipped))
        said.append(f"note: {numbers} of {job.nodes} nodes cannot share the work; then some stand by")
    if data_is_here and job.gpus and job.cpus is None:
        said.append("note: without --cpus a node gives as many CPUs as Slurm is configured to, often one")
    for line in said:
        print(line, file=sys.stderr)


VERBS: dict[str, Verb] = {
    "launch": Verb(
        "Write a config as a job for a cluster: a script for Slurm, or a PyTorchJob for Kubeflow.",
        """\
A training config is trained, a preparation config prepared. The config is checked for so many processes first.
examples:
  modelyard launch slurm train.yaml --nodes 2 --gpus-per-node 8 --cpus 96 --time 24:00:00 --submit
  modelyard launch slurm prepare.yaml --nodes 4 --cpus 32 --partition cpu
  modelyard launch kubeflow train.yaml --nodes 2 --gpus-per-node 8 --image registry/modelyard:1 --volume work:/work""",
        _launch_arguments,
        _launch,
    ),
}
