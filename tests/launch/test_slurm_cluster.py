"""A Slurm of our own: what `benchmarks/slurm_run.py` tells for the docs, and that nothing of it stays."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.local_slurm import LocalSlurm, missing
from benchmarks.slurm_run import Story, shortened, tell
from modelyard.launch.slurm import quoted


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    if lacking := missing():
        pytest.skip(f"needs Slurm, and there is no {', '.join(lacking)} here")
    folder = Path(tempfile.mkdtemp(prefix="modelyard-slurm-"))  # a socket's path may have 107 characters
    cluster = LocalSlurm(folder)
    try:
        with cluster:
            yield cluster
        assert cluster.left_over() == []
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_the_quickstart(slurm: LocalSlurm, tmp_path: Path) -> None:
    """Prepared and trained by scripts that `launch` wrote; told, preempted and cancelled, and bit-equal in the end."""
    story = Story(tmp_path, slurm)
    found = dict(tell(story))
    assert len(found) == 5
    assert not any(found.values()), "\n".join(
        [f"{what}: {wrong}" for what, wrong in found.items() if wrong] + story.lines
    )
    log = "\n".join(story.lines)
    assert log.count("is queued again") == 2
    for words in (
        "SIGUSR1: saving after this iteration",
        "SIGTERM: saving after this iteration",
        "resuming from",
    ):
        assert words in log


@pytest.mark.slow
def test_sbatch_reads_our_quotes(slurm: LocalSlurm, tmp_path: Path) -> None:
    folder = tmp_path / """we "ird" it's #1 \\ ü"""
    folder.mkdir()
    name = """a b'c#d"e\\f%g"""
    options = {"job-name": name, "chdir": str(folder), "output": f"{tmp_path}/it's %j"}
    lines = "".join(f"#SBATCH --{option}={quoted(value)}\n" for option, value in options.items())
    script = tmp_path / "script"
    script.write_text(f'#!/bin/bash\n{lines}pwd; echo "$SLURM_JOB_NAME"\n')
    number = slurm.run("sbatch", "--parsable", str(script)).strip()
    log = tmp_path / f"it's {number}"
    slurm.wait(lambda: log.exists() and log.read_text().count("\n") == 2, 20, words="the job")
    assert log.read_text() == f"{folder}\n{name}\n"


def test_logs_are_shortened() -> None:
    lines = [
        "begin",
        *(f"iteration {i}/5 | loss" for i in range(1, 6)),
        "saved",
        "iteration 1/2 |",
        "iteration 2/2 |",
    ]
    assert shortened(lines) == [
        "begin", "iteration 1/5 | loss", "...", "iteration 5/5 | loss", "saved", "iteration 1/2 |", "iteration 2/2 |"
    ]  # fmt: skip
