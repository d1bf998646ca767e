"""Ctrl-C while the program is still loading: one line, whatever library it comes upon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def started(program: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# A library that answers an interrupt during its import with an error of its own, as numpy does.
LIBRARY = """\
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt as error:
    raise ImportError("cannot be imported for reasons of my own") from error
"""


def test_an_interrupt_in_the_midst_of_an_import(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(LIBRARY)
    program = (
        "import modelyard.cli\n"
        "def slow(*_):\n    import library\n"
        "modelyard.cli._dispatch = slow\n"
        "from modelyard.__main__ import main\nraise SystemExit(main())\n"
    )
    process = started(program, tmp_path)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 128 + signal.SIGINT


def test_an_interrupt_at_work_lets_the_work_tidy_up(tmp_path: Path) -> None:
    program = (
        "import modelyard.cli, os, signal, time\n"
        "def work(*_):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
        "    finally:\n        print('tidied up')\n"
        "modelyard.cli._dispatch = work\n"
        "from modelyard.__main__ import main\nraise SystemExit(main())\n"
    )
    process = started(program, tmp_path)
    assert process.communicate(timeout=60) == ("tidied up\n", "interrupted\n")
    assert process.returncode == 130


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    program = (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "import modelyard.cli\nmodelyard.cli._dispatch = lambda words: 0\n"
        "from modelyard.__main__ import main\nassert main() == 0\n"
        "assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN\n"
    )
    process = started(program, tmp_path)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


@pytest.mark.slow
def test_ctrl_c_at_every_moment_of_the_start(tmp_path: Path) -> None:
    """A real run is interrupted at 20 moments of its first seconds; Python's own start, before ours, is left out."""
    import time

    (tmp_path / "train.yaml").write_text(
        "training: {train_iters: 100000, logs: {interval: null}}\nbatch: {sequence_length: 16, batch_size: 4}\n"
        "data: {datasets: {training: {type: random}}}\nmodel: {preset: smollm2-135m}\nrun: {experiment_dir: run}\n"
    )
    program = (
        "print('started', flush=True)\n"
        "import sys\nsys.argv[1:] = ['train', 'train.yaml']\n"
        "from modelyard.__main__ import main\n"
        "import signal\n"
        "raise SystemExit(main())\n"
    )
    for moment in range(20):
        process = started(program, tmp_path)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.1 + 0.15 * moment)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130, (moment, error)
        assert "Traceback" not in error, (moment, error)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["validate", "train.yaml"], ["--version"]])
def test_standard_output_on_a_full_disk_is_one_line(
    tmp_path: Path, words: list[str], unbuffered: str
) -> None:
    (tmp_path / "train.yaml").write_text(
        "training: {train_iters: 1}\nbatch: {sequence_length: 16, batch_size: 4}\nrun: {experiment_dir: run}\n"
        "data: {datasets: {training: {type: random}}}\nmodel: {preset: smollm2-135m}\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "modelyard", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")
