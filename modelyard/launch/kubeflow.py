"""`modelyard launch kubeflow`: a job as a PyTorchJob (kubeflow.org/v1) for the training operator.

What the operator sets in the environment of a container (its controller, `setPodEnv`): with an elasticPolicy and workers alone
PET_RDZV_ENDPOINT, PET_RDZV_ID and PET_NNODES, and no RANK or WORLD_SIZE, which would say that torchrun has started the
process; with a master RANK and WORLD_SIZE, counted in pods. The first fits a training, whose launchers find each other, the
second a preparation, whose processes need their number and nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from modelyard.errors import UserError
from modelyard.launch.cluster import MARK, ClusterJob, memory, seconds

CONTAINER = "pytorch"
"""The operator looks for a container of this name."""
CONFIG_FOLDER = "/etc/modelyard"
"""Where the config is in the container, from the ConfigMap beside the job."""
NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")
"""A DNS label, short enough for `-worker-1000` behind it."""
CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
"""A DNS subdomain (RFC 1123), as the names of claims are."""


def manifest(job: ClusterJob, *, namespace: str | None = None) -> str:
    """The config as a ConfigMap and the job, as YAML for `kubectl apply`. Raises UserError for a name that cannot be one."""
    for what, name in (("--job-name", job.name), ("--namespace", namespace)):
        if name is not None and not NAME.fullmatch(name):
            raise UserError(
                f"{what}: '{name}' is no name for Kubernetes: up to 50 small letters, digits and dashes, a letter first"
            )
    for claim, _ in job.volumes:
        if not CLAIM.fullmatch(claim):
            raise UserError(
                f"--volume: '{claim}' is no name of a claim in Kubernetes: small letters, digits, '-' and '.', a letter or "
                "digit first and last"
            )
    names = config_names(job.files)
    metadata = {"name": job.name} | ({} if namespace is None else {"namespace": namespace})
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata | {"name": f"{job.name}-config"},
        "data": {name: file.read_text(encoding="utf-8") for name, file in zip(names, job.files)},
    }
    pytorch_job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": metadata,
        "spec": _spec(job, names),
    }
    head = f"# {MARK} kubeflow; submit it with kubectl apply -f. It may be changed by hand.\n"
    return head + yaml.dump_all(
        [config, pytorch_job], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000
    )


def config_names(files: list[Path]) -> list[str]:
    """A key of the ConfigMap for each file, in their order."""
    safe = [re.sub(r"[^A-Za-z0-9._-]", "-", file.name) for file in files]
    return safe if len(set(safe)) == len(safe) else [f"{i}-{name}" for i, name in enumerate(safe)]


def _spec(job: ClusterJob, names: list[str]) -> dict[str, Any]:
    run_policy: dict[str, Any] = {"cleanPodPolicy": "Running"}  # what has ended stays, for its log
    if job.time is not None:
        run_policy["activeDeadlineSeconds"] = seconds(job.time)
    template = _template(job, names)
    if job.kind == "prepare":
        replicas = {"Master": _replicas(1, template)}
        if job.max_nodes > 1:
            replicas["Worker"] = _replicas(job.max_nodes - 1, template)
        return {"runPolicy": run_policy, "pytorchReplicaSpecs": replicas}
    elastic = {
        "rdzvBackend": "c10d",
        "rdzvId": job.name,
        "minReplicas": job.min_nodes,
        "maxReplicas": job.max_nodes,
        "maxRestarts": job.max_restarts,
    }
    return {
        "runPolicy": run_policy,
        "elasticPolicy": elastic,
        "pytorchReplicaSpecs": {"Worker": _replicas(job.max_nodes, template)},
    }


def _replicas(number: int, template: dict[str, Any]) -> dict[str, Any]:
    # Statuses from 128 on are signals: saved and left, or killed. Such a pod is made anew; after 1 or 2 the job has failed.
    return {"replicas": number, "restartPolicy": "ExitCode", "template": template}


def _template(job: ClusterJob, names: list[str]) -> dict[str, Any]:
    claims = list(dict.fromkeys(claim for claim, _ in job.volumes))
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": f"{job.name}-config"}},
        # Processes of a pod exchange tensors through shared memory, of which a container has 64 MiB otherwise.
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        *({"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": c}} for i, c in enumerate(claims)),
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        *({"name": f"volume-{claims.index(claim)}", "mountPath": path} for claim, path in job.volumes),
    ]
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": job.image,
        "command": ["bash", "-c", unexpanded(_script(job, names))],
        "workingDir": str(job.folder),
        "volumeMounts": mounts,
    }
    if job.env:
        container["env"] = [{"name": name, "value": unexpanded(value)} for name, value in job.env]
    if resources := _resources(job):
        container["resources"] = {"requests": resources, "limits": dict(resources)}
    spec = {
        "terminationGracePeriodSeconds": job.grace,
        "containers": [container],
        "volumes": volumes,
    }
    return {"spec": spec}


def _script(job: ClusterJob, names: list[str]) -> str:
    rendezvous = ["--rdzv-endpoint", '"$PET_RDZV_ENDPOINT"', "--rdzv-id", '"$PET_RDZV_ID"']
    command = " ".join(job.command([f"{CONFIG_FOLDER}/{name}" for name in names], rendezvous))
    # The program takes the shell's place, so that it is the one that SIGTERM comes to.
    return "\n".join([*(["set -e", *job.setup] if job.setup else []), f"exec {command}"]) + "\n"


def unexpanded(text: str) -> str:
    """Text in which Kubernetes, which replaces $(NAME) in commands and in the environment, finds nothing to replace."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def _resources(job: ClusterJob) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if job.gpus:
        resources["nvidia.com/gpu"] = job.gpus
    if job.cpus is not None:
        resources["cpu"] = job.cpus
    if job.memory is not None:
        resources["memory"] = "{}{}i".format(*memory(job.memory))
    return resources


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
