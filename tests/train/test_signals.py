from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import modelyard.train.state as state_module
from modelyard.data.stream import DataStream
from modelyard.errors import UserError
from modelyard.parallel.world import World
from modelyard.train.run import train
from modelyard.train.signals import StopSignal
from tests.parallel.processes import run_distributed
from tests.train.helpers import lines, loaded, losses


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_remembered_and_the_second_ends_the_process(signum: signal.Signals) -> None:
    program = (
        "import os, time\nfrom modelyard.train.signals import StopSignal\n"
        "with StopSignal() as stop:\n"
        f"    os.kill(os.getpid(), {signum.value})\n"
        "    print('first', bool(stop), stop.signum, flush=True)\n"
        f"    os.kill(os.getpid(), {signum.value})\n"
        "    time.sleep(1)\n"
        "print('not reached', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == f"first True {signum.value}\n"
    assert f"{signum.name}: saving after this iteration" in done.stderr
    assert done.returncode == 128 + signum


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_and_a_scheduler_save_however_often_they_come(name: str, ignored: bool) -> None:
    """A closing terminal sends it twice, by the shell and by the kernel, and standard error is gone with it; a scheduler
    sends SIGUSR1 early and SIGTERM later, which must not cut off the save."""
    program = (
        "import os, signal\nfrom modelyard.train.signals import StopSignal\n"
        f"signal.signal(signal.{name}, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "os.close(2)\n"
        "with StopSignal() as stop:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    print(stop.signum, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.signum, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('not reached', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    number = int(signal.Signals[name])
    expected = "None\n15\n" if ignored else f"{number}\n{number}\n"
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, expected)


def test_a_launcher_passes_on_what_the_ranks_got_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's scancel sends SIGTERM to every process of a job, the launching one among them; a person is slower."""
    now = [100.0]
    left: list[int] = []
    monkeypatch.setattr("modelyard.train.signals.time.monotonic", lambda: now[0])
    monkeypatch.setattr("modelyard.train.signals.os._exit", left.append)
    stop = StopSignal(World(1, 2, object()))
    for later in (0.0, 0.5, 1.4):
        now[0] += later
        stop._handle(signal.SIGTERM, None)
    assert (stop.heard, left) == (signal.SIGTERM, [])
    now[0] += 0.2
    stop._handle(signal.SIGTERM, None)
    assert left == [128 + signal.SIGTERM]


def stopped_while_data_is_late(hears: int | None, late: int, *keys: str) -> tuple[int, float]:
    """Train where the process `late` waits for its batch of iteration 4 for ever, and `hears` is sent SIGTERM then (None:
    the same). Exit status, and the seconds from the signal to the end."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    sent: list[float] = []

    def send() -> None:
        metrics = Path("run/metrics.jsonl")
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            time.sleep(0.01)
        time.sleep(0.3)  # the others are on their way into the step by then
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    read = DataStream.batch

    def batch(self: DataStream, index: int, share: Any = (0, 1)) -> Any:
        if index == 3 and self.name == "training":
            if rank == hears:
                threading.Thread(target=send, daemon=True).start()
            if rank == late:
                threading.Event().wait()
        return read(self, index, share)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataStream, "batch", batch)
        status = train(loaded(*keys))
    return status, time.monotonic() - sent[0] if sent else 0.0


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("hears", "late", "layout"),
    [(0, 1, ""), (1, 1, ""), (1, 0, "tensor_parallel"), (0, 1, "pipeline_parallel")],
)
def test_one_that_waits_for_data_stops_with_the_others(hears: int, late: int, layout: str) -> None:
    """Whoever hears the signal: iteration 3 is saved, and its checkpoint is gone on from as if nothing had been."""
    keys = ["training.train_iters=6", "training.checkpoint.interval=null"]
    keys += (
        [
            f"model.distributed.{layout}=2",
            "model.base_model.transformer={num_layers: 2, head_groups: 2}",
            "batch.micro_batch_size=2",
        ]
        if layout
        else []
    )
    found = run_distributed(stopped_while_data_is_late, 2, hears, late, *keys)
    assert [status for status, _ in found] == [143, 143]
    assert all(seconds < 5 for _, seconds in found)
    assert [path.name for path in Path("run/checkpoint").iterdir()] == ["3"]
    assert lines("run/events.jsonl")[-1]["event"] == "stopped"
    if layout:
        return
    assert run_distributed(trained, 2, *keys) == [0, 0]
    assert run_distributed(trained, 2, *keys, "run.experiment_dir=never") == [0, 0]
    assert losses("run") == losses("never")


def trained(*keys: str) -> int:
    return train(loaded(*keys))


@pytest.mark.usefixtures("tiny")
def test_alone_a_wait_for_data_is_no_reason_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    status, seconds = stopped_while_data_is_late(0, 0, "training.train_iters=6")
    assert status == 143
    assert seconds < 5
    assert Path("run/checkpoint/3").is_dir()


def evaluating(*keys: str) -> int:
    """Rank 1 is sent SIGUSR1 in the evaluation after iteration 2."""
    rank = torch.distributed.get_rank()
    read = DataStream.batch

    def batch(self: DataStream, index: int, share: Any = (0, 1)) -> Any:
        if self.name == "held_out" and index == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return read(self, index, share)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataStream, "batch", batch)
        return train(loaded(*keys))


@pytest.mark.usefixtures("tiny")
def test_a_signal_in_an_evaluation_is_heard_between_its_batches(capfd: pytest.CaptureFixture[str]) -> None:
    entry = "training.evaluators={held_out: {interval: 2, evaluator: {iterations: 1000}}}"
    assert run_distributed(evaluating, 2, entry, "training.checkpoint.interval=null") == [138, 138]
    assert "rank 1 got SIGUSR1: saving after this iteration, then leaving" in capfd.readouterr().out
    assert [path.name for path in Path("run/checkpoint").iterdir()] == ["2"]


@pytest.mark.usefixtures("tiny")
def test_a_run_that_is_not_saved_does_not_ask_to_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 + n would have a scheduler start it again, and again."""
    step = state_module.train_step

    def stopped(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return step(*args, **kwargs)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run")

    monkeypatch.setattr(state_module, "train_step", stopped)
    monkeypatch.setattr(state_module, "save_checkpoint", full)
    assert train(loaded("training.checkpoint={interval: null, on_error: continue}")) == 1
    assert lines("run/events.jsonl")[-1]["text"] == "stopped after iteration 1, which is not saved"


@pytest.mark.usefixtures("tiny")
def test_a_signal_in_the_last_test_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    read = DataStream.batch

    def batch(self: DataStream, index: int, share: Any = (0, 1)) -> Any:
        if self.name == "test" and index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, index, share)

    keys = ("training.train_iters=3", "training.test_iters=50", "data.datasets.test.type=random")
    with monkeypatch.context() as patch:
        patch.setattr(DataStream, "batch", batch)
        assert train(loaded(*keys)) == 143
    assert not [record for record in lines("run/metrics.jsonl") if record.get("evaluator") == "test"]
    assert train(loaded(*keys)) == 0
    assert len([record for record in lines("run/metrics.jsonl") if record.get("evaluator") == "test"]) == 1


@pytest.mark.usefixtures("tiny")
def test_a_refusal_by_another_path_takes_nothing_away() -> None:
    """`new/../run` is not there when the start is looked at, and is `run` a moment later."""
    assert train(loaded("training.train_iters=2")) == 0
    with pytest.raises(UserError, match=r"optimizer.learning_rate"):
        train(
            loaded(
                "training.train_iters=4", "run.experiment_dir=new/../run", "optimizer.learning_rate.base=1"
            )
        )
    assert Path("run/checkpoint/2").is_dir()
    assert not Path("new").exists()
