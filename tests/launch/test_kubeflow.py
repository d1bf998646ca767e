"""The manifest that `modelyard launch kubeflow` writes: its fields, and what a container of it runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelyard.cli import main
from tests.launch.clusters import StandIns, launched, project, refused

Screen = pytest.CaptureFixture[str]
VOLUME = ["--image", "registry/yard:1", "--volume", "work:/work"]
GPUS = ["--gpus-per-node", "4", *VOLUME]
OPERATOR = {"PET_RDZV_ENDPOINT": "train-worker-0:23456", "PET_RDZV_ID": "train", "PET_NNODES": "2:2"}
"""What the training operator adds to a container's environment."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = project(tmp_path / "a project")
    monkeypatch.chdir(folder)
    return folder


def documents(capsys: Screen, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config, job = yaml.safe_load_all(launched(capsys, "kubeflow", *words))
    strict(config, CONFIG_MAP)
    strict(job, PYTORCH_JOB)
    return config, job


# Fields of PyTorchJob v1 and of what is used of Kubernetes' own: a type, a pattern, a list's or a map's item, or more fields
# (a name with ! has to be there).

QUANTITY = r"\d+(Ki|Mi|Gi|Ti)?"
LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
RESOURCES = {"nvidia.com/gpu": QUANTITY, "cpu": QUANTITY, "memory": QUANTITY}
CONTAINER = {
    "name!": "pytorch",
    "image!": str,
    "command": [str],
    "workingDir": "/.*",
    "env": [{"name!": r"[A-Za-z_][A-Za-z0-9_]*", "value": str}],
    "volumeMounts": [{"name!": LABEL, "mountPath!": "/.*", "readOnly": bool}],
    "resources": {"requests": RESOURCES, "limits": RESOURCES},
}
VOLUMES = {
    "name!": LABEL,
    "configMap": {"name!": LABEL},
    "emptyDir": {"medium": "Memory"},
    "persistentVolumeClaim": {"claimName!": LABEL},
}
REPLICAS = {
    "replicas": int,
    "restartPolicy": "Always|OnFailure|Never|ExitCode",
    "template!": {
        "spec!": {"terminationGracePeriodSeconds": int, "containers!": [CONTAINER], "volumes": [VOLUMES]}
    },
}
METADATA = {"name!": LABEL, "namespace": LABEL}
PYTORCH_JOB = {
    "apiVersion!": r"kubeflow\.org/v1",
    "kind!": "PyTorchJob",
    "metadata!": METADATA,
    "spec!": {
        "runPolicy": {"cleanPodPolicy": "None|Running|All", "activeDeadlineSeconds": int},
        "elasticPolicy": {
            "rdzvBackend": "c10d|etcd|etcd-v2", "rdzvId": str, "minReplicas": int, "maxReplicas": int, "maxRestarts": int
        },
        "pytorchReplicaSpecs!": {"Master": REPLICAS, "Worker": REPLICAS},
    },
}  # fmt: skip
CONFIG_MAP = {
    "apiVersion!": "v1",
    "kind!": "ConfigMap",
    "metadata!": METADATA,
    "data": (r"[-._a-zA-Z0-9]{1,253}", str),
}


def strict(value: Any, schema: Any, where: str = "") -> None:
    """Fail where a value is not as the schema says."""
    if isinstance(schema, type):
        assert type(value) is schema, where
    elif isinstance(schema, str):
        assert re.fullmatch(schema, str(value)), where
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            strict(item, schema[0], f"{where}[{i}]")
    elif isinstance(schema, tuple):
        for name, item in value.items():
            strict(name, schema[0], where)
            strict(item, schema[1], f"{where}.{name}")
    else:
        assert isinstance(value, Mapping), where
        fields = {name.removesuffix("!"): item for name, item in schema.items()}
        assert {name[:-1] for name in schema if name.endswith("!")} <= set(value), where
        for name, item in value.items():
            assert name in fields, f"{where}.{name}"
            strict(item, fields[name], f"{where}.{name}")


def test_the_check_itself() -> None:
    strict({"name": "a"}, METADATA)
    for wrong in ({}, {"name": "A"}, {"name": "a", "labels": {}}):
        with pytest.raises(AssertionError):
            strict(wrong, METADATA)


def container(job: dict[str, Any], replica: str = "Worker") -> dict[str, Any]:
    found = job["spec"]["pytorchReplicaSpecs"][replica]["template"]["spec"]["containers"]
    assert len(found) == 1
    return dict(found[0])


def expanded(text: str, env: Mapping[str, str]) -> str:
    """As Kubernetes replaces $(NAME) in a container's command and environment; $$ is a dollar."""
    return re.sub(
        r"\$(\$|\((.*?)\))", lambda m: "$" if m[1] == "$" else env.get(m[2], m[0]), text, flags=re.DOTALL
    )


def run(
    job: dict[str, Any], folder: Path, replica: str = "Worker", **operator: str
) -> tuple[list[str], dict[str, str]]:
    """The words and the environment that `modelyard` is started with in a container."""
    stand_ins = StandIns(folder)
    stand_ins.program("modelyard", "env -0; printf 'PPID=%s\\0' $PPID\n")
    there = container(job, replica)
    env = dict(operator)
    for entry in there.get("env", []):
        env[entry["name"]] = expanded(entry["value"], env)
    words = [expanded(word, env) for word in there["command"]]
    done = subprocess.run(
        words,
        env={**env, "PATH": f"{stand_ins.folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    (call,) = stand_ins.words("modelyard")
    return call, dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


def test_a_training(here: Path, capsys: Screen) -> None:
    config, job = documents(
        capsys, "train.yaml", "training.train_iters=5", "--nodes", "2", *GPUS, "--cpus", "32", "--mem", "64G", "--time", "2:00:00",
        "--grace", "600", "--namespace", "team", "--env", "NCCL_DEBUG=INFO",
    )  # fmt: skip
    assert config["metadata"] == {"name": "train-config", "namespace": "team"}
    assert config["data"] == {"train.yaml": Path("train.yaml").read_text()}
    assert job["metadata"] == {"name": "train", "namespace": "team"}
    spec = job["spec"]
    assert spec["runPolicy"] == {"cleanPodPolicy": "Running", "activeDeadlineSeconds": 7200}
    assert spec["elasticPolicy"] == {
        "rdzvBackend": "c10d", "rdzvId": "train", "minReplicas": 2, "maxReplicas": 2, "maxRestarts": 3
    }  # fmt: skip
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]
    workers = spec["pytorchReplicaSpecs"]["Worker"]
    assert (workers["replicas"], workers["restartPolicy"]) == (2, "ExitCode")
    pod, there = workers["template"]["spec"], container(job)
    assert pod["terminationGracePeriodSeconds"] == 600
    assert pod["volumes"] == [
        {"name": "config", "configMap": {"name": "train-config"}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        {"name": "volume-0", "persistentVolumeClaim": {"claimName": "work"}},
    ]
    assert there["volumeMounts"] == [
        {"name": "config", "mountPath": "/etc/modelyard", "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "volume-0", "mountPath": "/work"},
    ]
    resources = {"nvidia.com/gpu": 4, "cpu": 32, "memory": "64Gi"}
    assert there["resources"] == {"requests": resources, "limits": resources}
    assert (there["image"], there["workingDir"]) == ("registry/yard:1", "/work")
    words, env = run(job, here, **OPERATOR)
    assert words == [
        "train", "/etc/modelyard/train.yaml", "training.train_iters=5", "--nproc", "4", "--max-restarts", "3", "--nnodes", "2",
        "--rdzv-endpoint", "train-worker-0:23456", "--rdzv-id", "train",
    ]  # fmt: skip
    assert env["NCCL_DEBUG"] == "INFO"


def test_one_node_and_fewer_than_there_were(here: Path, capsys: Screen) -> None:
    _, job = documents(capsys, "train.yaml", "--gpus-per-node", "0", "--processes-per-node", "2", *VOLUME)
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == 1
    assert "resources" not in container(job)
    words, _ = run(job, here, **OPERATOR)
    assert words == ["train", "/etc/modelyard/train.yaml", "--nproc", "2", "--max-restarts", "3"]
    _, job = documents(capsys, "train.yaml", "--nodes", "1:2", *GPUS, "--max-restarts", "0")
    elastic = job["spec"]["elasticPolicy"]
    assert (elastic["minReplicas"], elastic["maxReplicas"], elastic["maxRestarts"]) == (1, 2, 0)
    (here / "again").mkdir()
    words, _ = run(job, here / "again", **OPERATOR)
    assert words[2:6] == ["--nproc", "4", "--nnodes", "1:2"]


def test_a_preparation(here: Path, capsys: Screen) -> None:
    """With a master the operator gives each pod RANK and WORLD_SIZE, which is all that a preparation needs."""
    _, job = documents(capsys, "prepare.yaml", "--nodes", "3", *VOLUME)
    spec = job["spec"]
    assert "elasticPolicy" not in spec
    replicas = spec["pytorchReplicaSpecs"]
    assert {name: item["replicas"] for name, item in replicas.items()} == {"Master": 1, "Worker": 2}
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    words, env = run(job, here, "Master", RANK="0", WORLD_SIZE="3")
    assert words == ["prepare", "/etc/modelyard/prepare.yaml"]
    assert (env["RANK"], env["WORLD_SIZE"]) == ("0", "3")
    _, job = documents(capsys, "prepare.yaml", *VOLUME)
    assert list(job["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def test_anything_may_be_in_a_word(here: Path, capsys: Screen) -> None:
    odd = """it's a "$HOME" $(PET_RDZV_ID) $$(A) $$ `x` \\ {#} ü"""
    two = here / "more of it.yaml"
    two.write_text("training: {train_iters: 7}\n")
    config, job = documents(
        capsys, "train.yaml", "more of it.yaml", *GPUS, f"run.experiment_dir={odd}", "--env", f"ODD={odd}", "--setup", "export SET=up; set -u",
    )  # fmt: skip
    assert list(config["data"]) == ["train.yaml", "more-of-it.yaml"]
    words, env = run(job, here, **OPERATOR, HOME="/root")
    files = ["/etc/modelyard/train.yaml", "/etc/modelyard/more-of-it.yaml"]
    assert words[:4] == ["train", *files, f"run.experiment_dir={odd}"]
    assert (env["ODD"], env["SET"]) == (odd, "up")
    # No shell in between, which would keep SIGTERM to itself (some shells see to that themselves).
    assert env["PPID"] == str(os.getpid())
    assert container(job)["command"][2].splitlines()[-1].startswith("exec modelyard ")


def test_files_of_the_same_name(here: Path, capsys: Screen) -> None:
    (here / "b").mkdir()
    (here / "b" / "train.yaml").write_text("training: {train_iters: 7}\n")
    config, job = documents(capsys, "train.yaml", "b/train.yaml", *GPUS)
    assert list(config["data"]) == ["0-train.yaml", "1-train.yaml"]
    assert "/etc/modelyard/0-train.yaml /etc/modelyard/1-train.yaml" in container(job)["command"][2]


def test_against_the_published_models(here: Path, capsys: Screen) -> None:
    """Types and fields as the operator's own Python package has them; what it does not know would be gone."""
    training = pytest.importorskip(
        "kubeflow.training",
        reason="needs the packages kubeflow-training and kubernetes (before 32), which are not here",
    )
    client = training.ApiClient()
    for words in (
        ["train.yaml", "--nodes", "1:2", *GPUS, "--cpus", "2", "--mem", "1G", "--time", "90", "--env", "A=1", "--namespace", "x"],
        ["prepare.yaml", "--nodes", "2", *VOLUME],
    ):  # fmt: skip
        for document, model in zip(documents(capsys, *words), ("V1ConfigMap", "KubeflowOrgV1PyTorchJob")):

            class Response:
                data = json.dumps(document)

            known = client.sanitize_for_serialization(client.deserialize(Response, model))
            assert texts(known) == texts(document)


def texts(value: Any) -> Any:
    """With numbers as texts: amounts may be either."""
    if isinstance(value, dict):
        return {name: texts(item) for name, item in value.items()}
    return [texts(item) for item in value] if isinstance(value, list) else str(value)


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["train.yaml", "--gpus-per-node", "1"], ["--image: Kubeflow runs containers; name an image that has modelyard in it"]),
        (
            ["train.yaml", "--gpus-per-node", "1", "--image", "x"],
            ["run.experiment_dir: /runs/tiny is on no --volume and would go with the container; add --volume CLAIM:PATH"],
        ),
        (["train.yaml", *GPUS, "--partition", "a", "--max-idle-starts", "2"], ["--partition is for slurm alone", "--max-idle-starts is for slurm alone"]),
        (["train.yaml", *GPUS, "--job-name", "A_1"], ["--job-name: 'A_1' is no name for Kubernetes: up to 50 small letters, digits and dashes, a letter first"]),
        (["train.yaml", *GPUS, "--namespace", "A"], ["--namespace: 'A' is no name for Kubernetes: up to 50 small letters, digits and dashes, a letter first"]),
        (["train.yaml", "--gpus-per-node", "4", "--image", "x", "--volume", "work"], ["--volume: 'work' is not SOURCE:PATH"]),
        (["train.yaml", "--gpus-per-node", "4", "--image", "x", "--volume", "My_Work:/w", "run.experiment_dir=/w/a"], ["--volume: 'My_Work' is no name of a claim in Kubernetes: small letters, digits, '-' and '.', a letter or digit first and last"]),
        (["train.yaml", *GPUS, "--mem", "0"], ["--mem: '0' is not a number with K, M, G or T, such as 64G (of 1024)"]),
        (["prepare.yaml", *VOLUME, "--processes-per-node", "2"], ["--processes-per-node: Kubeflow starts one process a pod; write more --nodes, or tokenize_workers"]),
        (
            ["train.yaml", *GPUS, "--nodes", "3"],
            ["train.yaml:2: batch.batch_size: 8 rows cannot be dealt evenly to 12 data-parallel processes; possible: batch_size 12, or --nproc 1, 2, 4, 8"],
        ),
    ],
)  # fmt: skip
def test_refused(here: Path, capsys: Screen, words: list[str], problems: list[str]) -> None:
    assert refused(capsys, "kubeflow", *words) == problems


def test_submit(here: Path, capsys: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["launch", "kubeflow", "train.yaml", *GPUS, "--submit"]
    stand_ins = StandIns(here)
    monkeypatch.setenv("PATH", f"{stand_ins.folder}:/usr/bin:/bin")
    stand_ins.program("kubectl", "echo pytorchjob.kubeflow.org/train created\n")
    assert main(words) == 0
    assert capsys.readouterr().out == ("wrote train.pytorchjob.yaml\npytorchjob.kubeflow.org/train created\n")
    assert stand_ins.words("kubectl") == [["apply", "-f", "train.pytorchjob.yaml"]]
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(words) == 2
    assert (
        "no kubectl on this machine; where there is one: kubectl apply -f train.pytorchjob.yaml"
        in capsys.readouterr().err
    )
