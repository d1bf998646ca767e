"""The program in several processes, as a user starts it, against the program in one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import Result, environment, modelyard

EXACT = ("model.distributed.training_dtype=float64", "training.compile=no", "batch.micro_batch_size=null")
EVALUATORS = """\
training:
  evaluators:
    everything: {interval: 6, evaluator: {type: loss, dataset_name: validation}}
    texts: {interval: 6, evaluator: {type: samples, prompts: ["def ", "import json"], max_new_tokens: 12, temperature: 0.8}}
"""
FAULTS = """\
import os, signal, sys, time
from modelyard.cli import main
from modelyard.train import state

kind, count, true_step = os.environ["FAULT"], 0, state.train_step


def step(*args, **kwargs):
    global count
    count += 1
    if count == 5 and os.environ["RANK"] == "1":
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stall":
            time.sleep(1000)
        raise ValueError("something of ours")
    return true_step(*args, **kwargs)


state.train_step = step
raise SystemExit(main())
"""


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def torchrun(*words: object, cwd: Path, fault: str = "") -> Result:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--monitor-interval",
            "0.1",
            *map(str, words),
        ],
        cwd=cwd,
        env={**environment(), "FAULT": fault},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def differences(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    """What differs of the records of two runs, but for times and speeds; losses and norms by more than 1e-9."""
    found = []
    assert [(r["iteration"], r.get("evaluator")) for r in mine] == [
        (r["iteration"], r.get("evaluator")) for r in theirs
    ]
    for one, other in zip(mine, theirs, strict=True):
        for key in ("loss", "loss_mean", "grad_norm"):
            if key in one and abs(one[key] - other[key]) > 1e-9 * abs(one[key]):
                found.append(f"{key} of {one['iteration']}: {one[key]}, {other[key]}")
        for key in ("learning_rate", "tokens", "targets", "samples", "skipped_steps"):
            if one.get(key) != other.get(key):
                found.append(f"{key} of {one['iteration']}: {one.get(key)}, {other.get(key)}")
    return found


def test_a_run_goes_through_layouts_as_through_one_process(project: Path) -> None:
    """Started on two processes with shards, gone on with split matrices, then with split layers: the same losses,
    evaluations, texts and exported bytes as of one process that was never stopped."""
    (project / "evaluators.yaml").write_text(EVALUATORS)
    words = ("train", "train.yaml", "evaluators.yaml", *EXACT)
    alone = modelyard(*words, "run.experiment_dir=one", cwd=project)
    assert alone.status == 0, alone.err
    until = "training.shutdown={interval: 3, offset: %d}"

    sharded = torchrun("-m", "modelyard", *words, "model.multi_stage.zero_stage=3", until % 0, cwd=project)
    assert sharded.status == 0, sharded.err
    assert "processes: 2 = 2 data\n" in sharded.out
    assert sharded.out.endswith("shutdown after iteration 3, as training.shutdown says\n")

    matrices = "model.distributed={tensor_parallel: 2, sequence_tensor_parallel: yes}"
    split = modelyard(*words, matrices, "training.shutdown={interval: 6}", "--nproc", 2, cwd=project)
    assert split.status == 0, split.err
    assert "resuming from run/checkpoint/3\n" in split.out
    assert (
        "it was on 2 processes = 2 data, zero_stage 3; now it is on 2 processes = 2 tensor, zero_stage 1, with the same 4 rows"
        in split.out
    )
    assert split.out.endswith("shutdown after iteration 6, as training.shutdown says\n")

    layers = ("model.distributed.pipeline_parallel=2", "batch.micro_batch_size=1")
    piped = modelyard(*words, *layers, "--nproc", 2, cwd=project)
    assert piped.status == 0, piped.err
    assert "resuming from run/checkpoint/6\n" in piped.out
    assert "finished 12 iterations, 1,536 tokens\n" in piped.out

    one, run = project / "one", project / "run"
    assert differences(records(one), records(run)) == []
    for export in ("6", "12"):
        weights = Path("export/llama") / export / "model.safetensors"
        assert (run / weights).read_bytes() == (one / weights).read_bytes()
    logged = (run / "logs" / "rank-1.txt").read_text()
    assert [f"iteration {n}/12 | loss" in logged for n in (1, 12)] == [True, True]

    evaluated = modelyard(
        "evaluate", "train.yaml", "evaluators.yaml", *EXACT, "--json", "--nproc", 2, cwd=project
    )
    assert evaluated.status == 0, evaluated.err
    at_the_end = {r["evaluator"]: r for r in records(one) if r["iteration"] == 12 and "evaluator" in r}
    answers = [json.loads(line) for line in evaluated.out.splitlines()]
    assert [answer["evaluator"] for answer in answers] == list(at_the_end)
    for answer in answers:
        expected = at_the_end[answer["evaluator"]]
        assert answer.get("samples") == expected.get("samples")
        assert answer.get("loss", 0) == pytest.approx(expected.get("loss", 0), rel=1e-9)


@pytest.mark.parametrize(
    ("fault", "lines"),
    [
        ("kill", ["rank 0: lost contact in forward of iteration 5 ("]),
        pytest.param(
            "raise",
            [
                "rank 1: ValueError in other of iteration 5: something of ours; traceback in run/logs/rank-1.txt",
                "rank 0: lost contact in forward of iteration 5 (",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "stall",
            ["rank 1: no progress for ", "rank 0: lost contact in forward of iteration 5 (Timed out waiting"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_fails_is_named_and_no_process_stays(project: Path, fault: str, lines: list[str]) -> None:
    (project / "faults.py").write_text(FAULTS)
    done = torchrun(
        "faults.py",
        "train",
        "train.yaml",
        "training.compile=no",
        "training.checkpoint.asynchronous=no",  # it is there before the fault
        "model.distributed.timeout=5",
        cwd=project,
        fault=fault,
    )
    assert done.status == 1
    for line in lines:
        assert any(said.startswith(line) for said in done.err.splitlines()), done.err
    if fault == "stall":
        stacks = (project / "run/logs/rank-1.txt").read_text()
        assert 'File "' in stacks
        assert "faults.py" in stacks
    assert not _processes_in(project)
    assert [path.name for path in (project / "run/checkpoint").iterdir()] == ["3"]


def _processes_in(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder.resolve():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_what_is_wrong_for_all_is_said_once(project: Path) -> None:
    done = torchrun("-m", "modelyard", "train", "train.yaml", "optimizer.weight_decay=x", cwd=project)
    said = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(said) == 1, done.err
    assert "optimizer.weight_decay" in said[0]
    assert done.out == ""
    # Not in the config, but in what it names: found when the processes have met already.
    (project / "data").unlink()
    done = modelyard("train", "train.yaml", "--nproc", 2, cwd=project)
    assert (done.status, done.out) == (2, "")
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("error: ")
    assert not (project / "run").exists()
