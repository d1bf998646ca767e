"""No space left: a line, the checkpoints before, nothing by halves, and the run stops or goes on as configured."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import modelyard.train.state as state_module
from modelyard.errors import RunFailed
from modelyard.train.checkpoint import Checkpoint
from modelyard.train.console import Console
from modelyard.train.run import train
from modelyard.train.step import train_step
from tests.conftest import ROOT
from tests.train.helpers import lines, loaded, losses, new_run

pytestmark = pytest.mark.usefixtures("tiny")

# 33,936 parameters: a checkpoint of 407,232 bytes and what describes it.
WIDE = ("model.base_model.vocab_size=512", "model.base_model.transformer.hidden_size=48")
NEEDED = 407_232
KEYS = ("training.train_iters=6", "training.checkpoint={interval: 2, offset: 0, keep: 1, asynchronous: no}")


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system of 2 MiB at `disk/`."""
    place = Path("disk").absolute()
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs, which is not given here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path, *, free: int) -> None:
    with (disk / "ballast").open("ab") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - free)))


def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], None]]) -> None:
    """Do something before the steps of these numbers, as another program would at that moment."""
    count = 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        actions.get(count, lambda: None)()
        return train_step(*args, **kwargs)

    monkeypatch.setattr(state_module, "train_step", step)


@pytest.mark.parametrize("free", [100_000, NEEDED + 8_000], ids=["seen before", "found while writing"])
def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(
    disk: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    at_step(monkeypatch, {3: lambda: fill(disk, free=free)})
    with pytest.raises(RunFailed) as failure:
        train(loaded(*KEYS, *WIDE, "run.experiment_dir=disk/run"))
    text = str(failure.value)
    assert text.startswith("iteration 4 is not saved: no space left in disk/run/checkpoint (")
    assert "397.7 KiB needed); checkpoint disk/run/checkpoint/2 stays" in text
    assert "\n" not in text
    assert [path.name for path in (disk / "run/checkpoint").iterdir()] == ["2"]
    assert Checkpoint(disk / "run/checkpoint/2").iteration == 2
    failed = lines(disk / "run/events.jsonl")[-2:]
    assert [event["event"] for event in failed] == ["save_failed", "failed"]
    assert failed[0]["needed_bytes"] == NEEDED

    (disk / "ballast").unlink()
    assert train(loaded(*KEYS, *WIDE, "run.experiment_dir=disk/run")) == 0
    assert train(loaded(*KEYS, *WIDE)) == 0
    assert losses("disk/run") == losses("run")


def test_a_run_goes_on_over_a_full_disk_and_loses_no_record(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full to the last byte from step 5 to 15: records wait once their last block is full, the checkpoint of 8 is given up."""
    at_step(monkeypatch, {5: lambda: fill(disk, free=0), 15: (disk / "ballast").unlink})
    checkpoints = (
        "training.checkpoint={interval: 4, offset: 0, keep: 1, on_error: continue, asynchronous: no}"
    )
    keys = ("training.train_iters=16", checkpoints, *WIDE, "training.logs.tensorboard=yes")
    assert train(loaded(*keys, "run.experiment_dir=disk/run")) == 0
    out = capsys.readouterr().out
    assert "warning: iteration 8 is not saved: no space left in disk/run/checkpoint (" in out
    assert "warning: disk/run/metrics.jsonl cannot be written (No space left on device)" in out
    assert "disk/run/metrics.jsonl is written again, nothing of it is lost" in out
    assert sorted(path.name for path in (disk / "run/checkpoint").iterdir()) == ["16", "4"]
    assert list(losses("disk/run")) == list(range(1, 17))
    assert [e["event"] for e in lines(disk / "run/events.jsonl")] == [
        "started", "saved", "save_failed", "save_failed", "saved", "finished",
    ]  # fmt: skip
    logged = [line.split("  ", 1)[1] for line in (disk / "run/log.txt").read_text().splitlines()]
    assert logged == out.splitlines()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(disk / "run/tensorboard")).Reload()
    assert [event.step for event in board.Scalars("training/loss")] == list(range(1, 17))
    assert train(loaded(*keys)) == 0
    assert losses("disk/run") == losses("run")


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_last_save_that_fails_is_a_failure(on_error: str) -> None:
    """A limit on the size of a file, where no disk can be mounted: the write itself fails."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (NEEDED, hard))
    try:
        with pytest.raises(RunFailed) as failure:
            train(loaded("training.train_iters=3", *WIDE, f"training.checkpoint.on_error={on_error}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    if on_error == "stop":
        reason = "File too large (a limit on file size: ulimit -f) in run/checkpoint (397.7 KiB needed); "
        assert str(failure.value).startswith(f"iteration 1 is not saved: {reason}")
        assert str(failure.value).endswith("there is no earlier checkpoint")
    else:
        assert "the last iteration, 3, is not saved" in str(failure.value)
        assert [e["event"] for e in lines("run/events.jsonl")] == [
            "started", "save_failed", "save_failed", "failed",
        ]  # fmt: skip
    assert list(Path("run/checkpoint").iterdir()) == []


def test_a_shutdown_needs_its_checkpoint() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (NEEDED, hard))
    checkpoints = "training.checkpoint={interval: 2, offset: 0, on_error: continue}"
    try:
        with pytest.raises(RunFailed, match=r"iteration 2, at which training.shutdown leaves, is not saved"):
            train(loaded(*WIDE, checkpoints, "training.shutdown.interval=2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_standard_output_on_a_full_disk(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console()
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        console.open_log(tiny / "log.txt")
        console.line("one")
        monkeypatch.undo()
        console.close()
        with pytest.raises(OSError):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that it can be closed
    assert (tiny / "log.txt").read_text().endswith("  one\n")


def test_an_export_that_fails_is_as_configured(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, {2: lambda: fill(disk, free=30_000)})
    keys = (
        *WIDE,
        "training.train_iters=3",
        "training.checkpoint.interval=null",
        "run.experiment_dir=disk/run",
    )
    export = "training.export={interval: 2, format: llama}"
    with pytest.raises(
        RunFailed, match="iteration 2 is not exported: no space left in disk/run/export/llama"
    ):
        train(loaded(*keys, export))
    (disk / "ballast").unlink()
    at_step(monkeypatch, {2: lambda: fill(disk, free=30_000), 3: (disk / "ballast").unlink})
    assert train(loaded(*keys, export, "training.export.on_error=continue")) == 0
    assert [path.name for path in (disk / "run/export/llama").iterdir()] == ["3"]


def test_other_reasons_are_named(tiny: Path) -> None:
    if os.geteuid() == 0:
        (tiny / "run").mkdir()
        (tiny / "run" / "checkpoint").touch()  # a file where the folder should be, which stops even root
    else:
        (tiny / "run" / "checkpoint").mkdir(parents=True, mode=0o500)
    with pytest.raises(RunFailed, match=r"iteration 1 is not saved: .*run/checkpoint"):
        train(loaded("training.train_iters=1"))


def test_a_reader_that_leaves_costs_no_run(tiny: Path) -> None:
    """`train … | head -1`: the run goes on to its end, and log.txt has every line."""
    program = "from modelyard.cli import main\nraise SystemExit(main(['train', 'train.yaml']))\n"
    read, write = os.pipe()
    os.close(read)  # the reader is gone before the first line
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=write,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("run/checkpoint/12").is_dir()
    log = Path("run/log.txt").read_text()
    assert log.count("standard output is gone") == 1
    assert "finished 12 iterations" in log
    assert " parameters, " in log


def test_no_checkpoint_is_claimed_where_there_is_none() -> None:
    run = new_run("training.max_skipped_steps=1")
    with pytest.raises(RunFailed, match=r"there is no checkpoint yet$"):
        run._count_skip("the loss is nan")
    run.progress.iteration = 7
    run.folder.mkdir()
    run.save(wait=True)
    with pytest.raises(RunFailed, match=r"checkpoint run/checkpoint/7 is untouched$"):
        run._count_skip("the loss is nan")
