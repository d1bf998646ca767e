"""What the command line does before it starts any process, and what it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.cli import main
from tests.config.helpers import TINY
from tests.conftest import ROOT

Started = list[tuple[int, str, list[str]]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """What is started in place of processes; in a folder with train.yaml."""
    calls: Started = []

    def launch(processes: int, module: str, words: list[str]) -> int:
        calls.append((processes, module, words))
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
    assert main(["evaluate", "train.yaml", "--nproc=2", "--checkpoint", "run/checkpoint/3", "--json"]) == 7
    assert main(["train", "train.yaml", "--nproc", "auto"]) == 7
    rest = ["gpt", "training.train_iters=3", "batch.batch_size=4", "--config", "train.yaml", "--force"]
    assert started == [
        (2, "modelyard", ["train", *rest]),
        (2, "modelyard", ["evaluate", "train.yaml", "--checkpoint", "run/checkpoint/3", "--json"]),
        (4, "modelyard", ["train", "train.yaml"]),
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
