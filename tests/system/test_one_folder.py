"""Two programs in one experiment folder."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.system.conftest import environment, modelyard


def test_the_second_process_is_refused_and_the_first_goes_on(project: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-m", "modelyard", "train", "train.yaml", "training.train_iters=100000",
         "training.checkpoint.interval=null", "training.evaluators={}", "training.export={}"],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    try:
        assert first.stdout is not None
        while not first.stdout.readline().startswith("iteration 1/"):
            pass
        second = modelyard("train", "train.yaml", "model.distributed.seed=9", cwd=project)
        assert second.status == 2
        assert second.err == "error: another process is training in run at this moment\n"
        assert second.out == ""
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGTERM)
        rest, _ = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from there" in rest
    # A dead process holds nothing: the next one goes on.
    iteration = max(int(path.name) for path in (project / "run" / "checkpoint").iterdir())
    third = modelyard(
        "train",
        "train.yaml",
        "optimizer.learning_rate.decay_iterations=12",
        f"training.train_iters={iteration}",
        cwd=project,
    )
    assert third.status == 0, third.err
    assert f"resuming from run/checkpoint/{iteration}" in third.out
