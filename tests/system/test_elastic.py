"""Runs whose processes and nodes are killed: they go on by themselves, to the losses of the run that nobody touched."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import environment, modelyard
from tests.system.test_layouts import _processes_in, records

# `modelyard`, one of whose ranks has a fault before its n-th step, once; `SLOW` makes steps take so many seconds, and
# while there is a file `hold` none is begun.
PROGRAM = """\
import os, signal, sys, time
from pathlib import Path

from modelyard.cli import main
from modelyard.train import state

true_step, count = state.train_step, 0


def step(*args, **kwargs):
    global count
    count += 1
    fault, rank, when = os.environ.get("FAULT", "none 0 0").split()
    if rank == os.environ.get("RANK") and count == int(when) and not Path("fault").exists():
        Path("fault").touch()
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "raise":
            raise ValueError("something of ours")
    if "WORLD_SIZE" in os.environ:
        time.sleep(float(os.environ.get("SLOW", "0")))
    while Path("hold").exists():
        time.sleep(0.05)
    return true_step(*args, **kwargs)


state.train_step = step
if __name__ == "__main__":
    raise SystemExit(main())
"""
# The launching process starts `faulty` where it would start `modelyard`.
LAUNCH = """\
import sys
from modelyard.cli import main
from modelyard.launch import torchrun

true = torchrun.launch
torchrun.launch = lambda node, module, words: true(node, "faulty", words)
raise SystemExit(main(sys.argv[1:]))
"""
PLAIN = (
    "training.compile=no",
    "training.evaluators={}",
    "training.export.interval=null",
    "training.checkpoint.interval=2",
)


class Launcher:
    """A launching process with faulty ranks; what it and rank 0 write is in a file."""

    def __init__(
        self,
        project: Path,
        name: str,
        *words: object,
        module: tuple[str, ...] = ("launch.py",),
        **faults: object,
    ):
        (project / "faulty.py").write_text(PROGRAM)
        (project / "launch.py").write_text(LAUNCH)
        self.output = project / f"{name}.txt"
        more = {key: str(value) for key, value in faults.items()}
        more["PYTHONPATH"] = f"{environment()['PYTHONPATH']}:{project}"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *module, "train", "train.yaml", *PLAIN, *map(str, words)],
                cwd=project, env=environment() | more, stdout=output, stderr=output,
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.output.read_text()

    def until(self, words: str, *, after: str = "") -> None:
        deadline = time.monotonic() + 120
        while words not in (self.said.partition(after)[2] if after else self.said):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def end(self) -> int:
        return self.process.wait(180)


@pytest.fixture
def launch(project: Path) -> Iterator[Callable[..., Launcher]]:
    started = []

    def start(name: str, *words: object, **more: Any) -> Launcher:
        started.append(Launcher(project, name, *words, **more))
        return started[-1]

    yield start
    for launcher in started:
        launcher.process.kill()
        launcher.process.wait()


@pytest.fixture(scope="session")
def untouched(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of a run in one process that nobody touched."""
    folder = tmp_path_factory.mktemp("untouched")
    for name in ("tokenizer", "data", "train.yaml"):
        (folder / name).symlink_to(prepared / name)
    done = modelyard("train", "train.yaml", *PLAIN, cwd=folder)
    assert done.status == 0, done.err
    return records(folder / "run")


def same(run: Path, untouched: list[dict[str, Any]]) -> bool:
    """Whether a run has the records of the other, its losses within what order of sums does in fp32."""
    mine = records(run)
    assert [record["iteration"] for record in mine] == [record["iteration"] for record in untouched]
    for one, other in zip(mine, untouched, strict=True):
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-6), one["iteration"]
        assert (one["tokens"], one["learning_rate"]) == (other["tokens"], other["learning_rate"])
    return True


def events(project: Path, name: str) -> list[dict[str, Any]]:
    lines = (project / "run" / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == name]


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("kill 1 6", "rank 1 was killed by SIGKILL, perhaps because memory ran out; what it wrote is in run/logs/rank-1.txt\n"),
        pytest.param("kill 0 6", "rank 0 was killed by SIGKILL, perhaps because memory ran out\n", marks=pytest.mark.slow),
        pytest.param("raise 1 6", "rank 1: ValueError in other of iteration 6: something of ours; traceback in run/logs/rank-1.txt\n", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_run_survives_its_ranks(
    project: Path, launch: Callable[..., Launcher], untouched: list[dict[str, Any]], fault: str, line: str
) -> None:
    run = launch("out", "--nproc", 2, "--max-restarts", 1, FAULT=fault)
    assert run.end() == 0, run.said
    assert f"\nrestarting (1 of 1): {line}" in run.said
    begin, _, rest = run.said.partition("restarting")
    assert "iteration 5/12" in begin
    assert "resuming from run/checkpoint/" in rest
    assert "another process is training" not in run.said
    [resumed] = events(project, "resumed")
    assert resumed["restart"] == 1
    assert resumed["iteration"] in (2, 4)  # the last that was saved: in the background
    assert same(project / "run", untouched)
    assert not list((project / "run" / "checkpoint").glob("*.tmp"))
    assert not _processes_in(project)


@pytest.mark.slow
def test_a_config_that_cannot_run_is_not_started_again(
    project: Path, launch: Callable[..., Launcher]
) -> None:
    run = launch("out", "--nproc", 2, "--max-restarts", 5, "data.datasets.training.path=nowhere.yaml")
    assert run.end() == 2
    assert "restarting" not in run.said
    run = launch(
        "again",
        "--nproc",
        2,
        "--max-restarts",
        5,
        "optimizer.learning_rate.base=1e30",
        "training.max_skipped_steps=2",
    )
    assert run.end() == 1
    assert "2 steps in a row were skipped" in run.said
    assert "restarting" not in run.said


@pytest.mark.slow
def test_a_run_that_was_asked_to_stop_stays_stopped(project: Path, launch: Callable[..., Launcher]) -> None:
    run = launch("out", "--nproc", 2, "--max-restarts", 5, SLOW=0.1)
    run.until("iteration 3/12")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 143
    assert "restarting" not in run.said
    assert "the same command goes on from there" in run.said


@pytest.mark.slow
def test_torchrun_restarts_it_as_well(
    project: Path, launch: Callable[..., Launcher], untouched: list[dict[str, Any]]
) -> None:
    """Started by hand, with its default store, which keeps the addresses of the dead."""
    words = "-m torch.distributed.run --nproc_per_node 2 --max-restarts 2 --monitor-interval 0.1 -m faulty"
    run = launch("out", module=tuple(words.split()), FAULT="kill 1 6")
    assert run.end() == 0, run.said
    assert "resuming from run/checkpoint/" in run.said
    assert same(project / "run", untouched)


@pytest.mark.slow
def test_a_run_survives_its_nodes(
    project: Path, launch: Callable[..., Launcher], untouched: list[dict[str, Any]]
) -> None:
    """Two nodes, one killed with all its ranks; the other goes on alone, and with it again when it comes back."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{trial.getsockname()[1]}"
    words = (
        "--nproc",
        1,
        "--nnodes",
        "1:2",
        "--rdzv-endpoint",
        endpoint,
        "--max-restarts",
        3,
        "training.train_iters=12",
    )
    patience = ("--rdzv-conf", "last_call_timeout=3,keep_alive_interval=1")
    one = launch("one", *words, *patience, SLOW=0.3)
    one.until("waiting for 1 or 2 nodes")
    two = launch("two", *words, *patience, SLOW=0.3)
    deadline = time.monotonic() + 120
    while "iteration 4/12" not in one.said + two.said:
        assert time.monotonic() < deadline, one.said + two.said
        time.sleep(0.05)
    two.process.kill()
    alone = "now it is on 1 process, with the same 4 rows a step\n"
    one.until("iteration 5/12", after=alone)
    (project / "hold").touch()
    back = launch("back", *words, *patience, SLOW=0.3)
    one.until("another node is here: saving, then going on with it\n", after=alone)
    (project / "hold").unlink()
    assert (one.end(), back.end()) == (0, 0), one.said + back.said
    text = one.said + back.said
    assert "restarting (1 of 3): " in text
    assert (
        "it was on 2 processes = 2 data, zero_stage 1; now it is on 1 process, with the same 4 rows a step\n"
        in text
    )
    assert "another node is here: saving, then going on with it\n" in text
    assert "\nstopped after iteration " in text  # and so nothing is done twice
    assert (
        "it was on 1 process; now it is on 2 processes = 2 data, zero_stage 1, with the same 4 rows a step\n"
        in text
    )
    assert same(project / "run", untouched)
    assert not _processes_in(project)
