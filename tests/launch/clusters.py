"""Projects to launch, and what the jobs that are written do with stand-ins for the cluster's programs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from modelyard.cli import main
from tests.config.helpers import TINY

PREPARE = """\
output_path: data
dataset: {path: texts.jsonl}
tokenizer: {path: tokenizer}
"""
WAIT = "trap 'echo told >told; exit 138' USR1\necho >waiting\nwhile :; do sleep 0.05; done\n"
"""A step that leaves with 138 when it is told to."""


def project(folder: Path) -> Path:
    """A folder with train.yaml and prepare.yaml; a batch has 8 rows, and a run's folder is `runs/tiny`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.yaml").write_text(TINY.replace("batch_size: 4", "batch_size: 8"))
    (folder / "prepare.yaml").write_text(PREPARE)
    (folder / "texts.jsonl").write_text('{"text": "a"}\n')
    (folder / "tokenizer").mkdir()
    return folder


def launched(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `modelyard launch WORDS` writes to the screen."""
    status = main(["launch", *words, "--output", "-"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines that `modelyard launch WORDS` refuses with, having written nothing."""
    before = sorted(Path().iterdir())
    assert main(["launch", *words]) == 2
    assert sorted(Path().iterdir()) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    return [line.removeprefix("error: ") for line in captured.err.splitlines() if line.startswith("error: ")]


class StandIns:
    """`srun`, `scontrol` and any other program in a folder that comes first in PATH; each notes its words."""

    def __init__(self, folder: Path):
        self.folder = folder / "stand-ins"
        self.folder.mkdir()
        self.state = "JobState=RUNNING Reason=None PreemptTime=None"
        self.program("scontrol", '[ "$1" != show ] || echo "$STATE"\n')

    def program(self, name: str, does: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/bash\n{{ printf "%s\\0" "$@"; echo; }} >>"$0.words"\n{does}')
        path.chmod(0o755)

    def words(self, name: str) -> list[list[str]]:
        """The words of each call."""
        path = self.folder / f"{name}.words"
        calls = path.read_text().split("\0\n") if path.exists() else []
        return [call.split("\0") for call in calls if call]

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": f"{self.folder}:{os.environ['PATH']}", "STATE": self.state, **more}

    def run(self, script: str, folder: Path, *, told: bool = False, **more: str) -> tuple[int, str]:
        """Run a script with them; (status, what it said). `told`: it gets SIGUSR1 as soon as its step waits."""
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 20
        while told and not (folder / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if told:
            process.send_signal(signal.SIGUSR1)
        said, _ = process.communicate(timeout=20)
        return process.returncode, said
