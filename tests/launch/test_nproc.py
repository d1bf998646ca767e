"""What the command line does before it starts any process, and what it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.cli import main
from modelyard.launch.command import Node
from tests.config.helpers import TINY
from tests.conftest import ROOT

Started = list[tuple[Node, str, list[str]]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """What is started in place of processes; in a folder with train.yaml."""
    calls: Started = []

    def launch(node: Node, module: str, words: list[str]) -> int:
        calls.append((node, module, words))
        return 7

    monkeypatch.setattr("modelyard.launch.torchrun.launch", launch)
    monkeypatch.setattr("modelyard.launch.torchrun.automatic", lambda: 4)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "train.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return calls


def test_the_same_words_in_each_process(started: Started) -> None:
    words = ["gpt", "--config", "train.yaml", "training.train_iters=3", "batch.batch_size=4"]
    assert main(["train", *words, "--nproc", "2", "--force"]) == 7
    evaluated = ["--checkpoint", "run/checkpoint/3", "--base", "models/a", "--json"]
    assert main(["evaluate", "train.yaml", "--nproc=2", *evaluated]) == 7
    assert main(["train", "train.yaml", "--nproc", "auto"]) == 7
    rest = ["gpt", "training.train_iters=3", "batch.batch_size=4", "--config", "train.yaml", "--force"]
    assert started == [
        (Node(2, run_id="runs/tiny"), "modelyard", ["train", *rest]),
        (Node(2, run_id="runs/tiny"), "modelyard", ["evaluate", "train.yaml", *evaluated]),
        (Node(4, run_id="runs/tiny"), "modelyard", ["train", "train.yaml"]),
    ]


def test_nodes_and_restarts(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the numbers of nodes those that the layout can use; the ranks hear nothing of all that."""
    there = ["--nproc", "1", "--rdzv-endpoint", "node1:29500"]
    conf = ["--rdzv-conf", "last_call_timeout=5,join_timeout=60"]
    assert main(["train", "train.yaml", *there, "--nnodes", "1:4", "--max-restarts", "3", *conf]) == 7
    assert main(["evaluate", "train.yaml", *there, "--nnodes", "2", "--rdzv-id", "mine"]) == 7
    assert main(["train", "train.yaml", "--nproc", "2", "--max-restarts", "1"]) == 7
    monkeypatch.setattr("modelyard.launch.torchrun.automatic", lambda: 1)
    assert main(["train", "train.yaml", "--nproc", "auto", "--nnodes=3:4", *there[2:]]) == 7  # one on each
    nodes = {"possible": (1, 2, 4), "endpoint": "node1:29500", "run_id": "runs/tiny"}
    seconds = {"last_call_timeout": 5, "join_timeout": 60}
    assert [node for node, _, _ in started] == [
        Node(1, **nodes, restarts=3, conf=seconds),  # type: ignore[arg-type]
        Node(1, (2,), "node1:29500", "mine"),
        Node(2, run_id="runs/tiny", restarts=1),
        Node(1, (4,), "node1:29500", "runs/tiny"),
    ]
    assert [words for _, _, words in started] == [
        [verb, "train.yaml"] for verb in ("train", "evaluate", "train", "train")
    ]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["--nproc", "3"],
            "train.yaml:2: batch.batch_size: 4 rows cannot be dealt evenly to 3 data-parallel processes; possible: batch_size 3 or 6, or --nproc 1, 2, 4",
        ),
        (
            ["model.distributed.sequence_data_parallel=2"],
            "override 1: model.distributed.sequence_data_parallel: sequence_data_parallel 2 needs a multiple of 2 processes, and "
            "there is 1; start it with --nproc 2, or torchrun --nproc_per_node=2",
        ),
        (
            ["--nproc", "2", "model.distributed.tensor_parallel=8"],
            "override 1: model.distributed.tensor_parallel: 8 processes cannot share num_attention_heads 4 evenly; sizes that "
            "work: 1",
        ),
        (["--nproc", "two"], "modelyard train: argument --nproc: 'two' is neither a whole number from 1 on nor auto (modelyard train --help lists them)"),
        (["--nproc", "0"], "modelyard train: argument --nproc: '0' is neither a whole number from 1 on nor auto (modelyard train --help lists them)"),
        (["--nproc", "1", "--nnodes", "3", "--rdzv-endpoint", "a:1"], "--nnodes 3 with --nproc 1: numbers of nodes that are possible: 1, 2, 4"),
        (["--nproc", "8", "--nnodes", "1:2", "--rdzv-endpoint", "a:1"], "--nnodes 1:2 with --nproc 8: no number of nodes up to 3 is possible with so many processes each"),
        (["--nproc", "1", "--nnodes", "2"], "--nnodes 2 needs --rdzv-endpoint HOST:PORT, the same on every node: one of them that the others reach, and a port that is free there (29500, say)"),
        (["--nproc", "1", "--rdzv-endpoint", "a:1"], "--rdzv-endpoint is where several nodes meet; add --nnodes N or MIN:MAX, or leave it out"),
        (["--nproc", "1", "--rdzv-id", "a"], "--rdzv-id is where several nodes meet; add --nnodes N or MIN:MAX, or leave it out"),
        (["--max-restarts", "3"], "--max-restarts needs --nproc N|auto, too: the processes that are started on each node"),
        (["--nproc", "1", "--nnodes", "4:2"], "modelyard train: argument --nnodes: '4:2' is neither a whole number of nodes from 1 on nor two as MIN:MAX, the smaller first (modelyard train --help lists them)"),
        (["--nproc", "1", "--nnodes", ":2"], "modelyard train: argument --nnodes: ':2' is neither a whole number of nodes from 1 on nor two as MIN:MAX, the smaller first (modelyard train --help lists them)"),
        (["--nproc", "1", "--rdzv-endpoint", "node1"], "modelyard train: argument --rdzv-endpoint: 'node1' is not HOST:PORT; write node1:29500, say (modelyard train --help lists them)"),
        (["--nproc", "1", "--rdzv-endpoint", "node1:x"], "modelyard train: argument --rdzv-endpoint: 'node1:x': the port is a number from 1 to 65535, not 'x' (modelyard train --help lists them)"),
        (["--nproc", "1", "--max-restarts", "-1"], "modelyard train: argument --max-restarts: '-1' is not a whole number from 0 on (modelyard train --help lists them)"),
        (["--nproc", "1", "--rdzv-conf", "join_timeot=3"], "modelyard train: argument --rdzv-conf: 'join_timeot' is none of join_timeout, last_call_timeout, keep_alive_interval, keep_alive_max_attempt, close_timeout, read_timeout; did you mean 'join_timeout'? (modelyard train --help lists them)"),
        (["--nproc", "1", "--rdzv-conf", "join_timeout"], "modelyard train: argument --rdzv-conf: 'join_timeout' is not join_timeout=NUMBER, a whole number from 1 on (modelyard train --help lists them)"),
        (
            ["model.multi_stage.cpu_offload=yes"],
            "override 1: model.multi_stage.cpu_offload: yes needs processes that torchrun starts, be it one: --nproc 1",
        ),
    ],
)  # fmt: skip
def test_nothing_is_started_for_what_is_impossible(
    started: Started, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    assert main(["train", "train.yaml", *words]) == 2
    assert f"error: {problem}" in capsys.readouterr().err.splitlines()
    assert started == []
    assert not Path("runs").exists()


def test_nproc_under_torchrun(
    started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "train.yaml", "--nproc", "2"]) == 2
    assert "torchrun has started" in capsys.readouterr().err
    # The number of processes is then torchrun's.
    assert main(["train", "train.yaml", "batch.batch_size=3"]) == 2
    assert "3 rows cannot be dealt evenly to 2 data-parallel processes" in capsys.readouterr().err
    assert started == []


def test_torchruns_store_on_several_nodes(
    started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node that comes back would not find the others: said before it happens."""
    monkeypatch.setattr("modelyard.launch.command.end_with_parent", lambda: None)
    there = {
        "TORCHELASTIC_RUN_ID": "a",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "3",
    }
    for name, value in {**there, "GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "8", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    warning = "warning: restarts on several nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment"
    assert main(["train", "train.yaml"]) == 2  # no layout on 8 processes
    assert capsys.readouterr().err.startswith(warning)
    for name, value in (
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),
        ("TORCHELASTIC_MAX_RESTARTS", "0"),
        ("GROUP_WORLD_SIZE", "1"),
    ):
        with monkeypatch.context() as other:
            other.setenv(name, value)
            assert main(["train", "train.yaml"]) == 2
        assert warning not in capsys.readouterr().err


def test_validate_shows_the_layout(started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.yaml", "model.distributed.pipeline_parallel=2", "batch.micro_batch_size=1"]
    assert main(["validate", *words, "--nproc", "4"]) == 0
    text = capsys.readouterr().out
    assert "  processes  4 = 2 data x 2 pipeline (2, 4 processes are possible)\n" in text
    assert main(["validate", *words]) == 0
    assert "  processes  2 = 2 pipeline (2, 4 processes are possible)\n" in capsys.readouterr().out
    assert main(["validate", *words, "--nproc", "3"]) == 2
    captured = capsys.readouterr()
    assert (
        "override 1: model.distributed.pipeline_parallel: pipeline_parallel 2 needs a multiple of 2"
        in captured.err
    )
    assert "  processes  3 cannot be laid out so\n" in captured.out
    assert main(["train", "-v", *words, "--nproc", "1", "--nnodes", "1:4", "--rdzv-endpoint", "a:1"]) == 0
    assert "  processes  4 = 2 data x 2 pipeline" in capsys.readouterr().out
    assert started == []


def test_torchrun_started_by_hand(tmp_path: Path) -> None:
    """The guides' form; bad input is one line, not one of each process."""
    (tmp_path / "train.yaml").write_text(TINY)
    (tmp_path / "modelyard").write_text(f'#!/bin/sh\nexec {sys.executable} -m modelyard "$@"\n')
    (tmp_path / "modelyard").chmod(0o755)
    words = [
        "--standalone",
        "--nproc_per_node=2",
        "--no_python",
        "./modelyard",
        "train",
        "gpt",
        "--config",
        "train.yaml",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, "model.distributed.sequence_data_parallel=4"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: override 1: model.distributed.sequence_data_parallel: sequence_data_parallel 4 needs a multiple of 4 "
        "processes, and there are 2; nearest that are: 4"
    ]
    assert done.returncode == 1
