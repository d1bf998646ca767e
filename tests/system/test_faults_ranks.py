"""The short form of `benchmarks/faults.py --only ranks`, and what it sees and compares with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults_jobs
from benchmarks.bad_input import build_project
from benchmarks.faults_jobs import LAYOUTS, MARK, Job, Sight, is_locked, processes_of, ranks_of
from benchmarks.faults_marker import Marker
from benchmarks.faults_ranks import ALLOWED, furthest, plans, run_ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "layouts", "victims", "moved"),
    [
        (4, ["ZeRO 3 on 2", "contexts 2"], ["one rank", "the launcher", "all ranks", "one rank"], 0),
        (6, ["pipeline 2 (1f1b)"], ["one rank", "the launcher", "all ranks", "one rank", "one rank"], 1),
    ],
)
def test_nothing_is_lost(
    count: int, layouts: list[str], victims: list[str], moved: int, tmp_path: Path
) -> None:
    """Real runs, killed and started again: all bits the same; in another layout losses within rounding."""
    data = build_project(tmp_path / "project") / "data"
    kills = list(run_ranks(count, 0, tmp_path, data, layouts=layouts))
    assert [kill.number for kill in kills] == list(range(count))
    assert [kill.lost for kill in kills] == [None] * count
    assert [kill.victim for kill in kills] == victims + ["the launcher"] * moved
    assert list(dict.fromkeys(kill.layout for kill in kills))[: len(layouts)] == layouts
    moves = [kill for kill in kills if kill.moved_to]
    assert len(moves) == moved
    for kill in moves:
        assert kill.furthest is not None
        assert 0 < kill.furthest < ALLOWED
    assert list(tmp_path.glob("killed-*")) == []


def test_the_kills_of_a_seed() -> None:
    """Every victim in every phase, in every layout; the same each time."""
    by_layout, moves = plans(60, 0, tuple(LAYOUTS))
    staying = [plan for todo in by_layout.values() for plan in todo]
    assert list(by_layout) == list(LAYOUTS)
    assert len(LAYOUTS) >= 6
    assert {len(todo) for todo in by_layout.values()} == {5, 6}
    assert {(plan.victim, plan.aim) for plan in staying} == {
        (victim, aim)
        for victim in ("one rank", "all ranks", "the launcher")
        for aim in ("save", "load", "export", "step")
    }
    assert [len(todo) for todo in moves] == [5, 5]
    assert [plan.number for plan in [*staying, *moves[0], *moves[1]]] == list(range(60))
    assert (by_layout, moves) == plans(60, 0, tuple(LAYOUTS))
    assert by_layout != plans(60, 1, tuple(LAYOUTS))[0]


def test_the_phases_of_a_run_seen_from_outside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoints, exports = run / "checkpoint", run / "export" / "llama"
    for folder in (checkpoints / "6", checkpoints / "9.tmp", exports):
        folder.mkdir(parents=True)
    (run / ".lock").touch()
    os.utime(run / ".lock", (1, 1))
    old = {"iteration": 8, "time": time.time() - 5}
    (run / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    sight = Sight(run)
    phases = [sight.phase]  # what others left unfinished is no sign
    (run / ".lock").touch()
    phases.append(sight.phase)
    (checkpoints / "9.tmp").rmdir()
    phases.append(sight.phase)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 7, "time": time.time() + 1}) + "\n")
    phases.append(sight.phase)
    assert sight.iterations() == 7
    (checkpoints / "9.tmp").mkdir()
    phases.append(sight.phase)
    (checkpoints / "9.tmp").rename(checkpoints / "9")
    (checkpoints / "6").rename(checkpoints / "6.tmp")
    phases.append(sight.phase)
    (checkpoints / "6.tmp").rmdir()
    (exports / "7.tmp").mkdir()
    phases.append(sight.phase)
    assert phases == ["start", "load", "load", "step", "save", "prune", "export"]


@contextmanager
def process(*words: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process that says a word when it is ready."""
    started = subprocess.Popen(
        words, env={**os.environ, **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        yield started
    finally:
        started.kill()
        started.communicate()


def test_processes_are_found_by_their_run_and_by_their_launcher(tmp_path: Path) -> None:
    rank = (
        "import sys; sys.argv[1] == 'modelyard.launch.rank' and print('ready', flush=True); sys.stdin.read()"
    )
    launcher = (
        "import os, subprocess, sys\n"
        "words = [sys.executable, '-c', sys.argv[1], 'modelyard.launch.rank']\n"
        "subprocess.run(words, env={**os.environ, 'RANK': '1'}, stdin=sys.stdin)\n"
    )
    with process(sys.executable, "-c", launcher, rank, **{MARK: str(tmp_path)}) as started:
        found = ranks_of(started.pid)
        assert list(found) == [1]
        assert sorted(processes_of(tmp_path)) == sorted([started.pid, found[1]])
        assert processes_of(tmp_path / "another") == []
        os.kill(found[1], 9)
        started.wait(10)
    assert ranks_of(started.pid) == {}


def test_a_process_and_a_lock_that_stay_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults_jobs, "SECONDS_TO_GO", 0.05)
    job = Job(tmp_path, tmp_path / "kill.yaml", None)
    job.run.mkdir()
    (job.run / ".lock").touch()
    assert job.left_over() == []
    holds = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    with process(sys.executable, "-c", holds, str(job.run / ".lock")):
        assert is_locked(job.run)
        assert job.left_over() == ["the run is still locked"]
    with process(sys.executable, "-c", holds, str(job.run / ".lock"), **{MARK: str(tmp_path)}) as started:
        assert job.left_over() == ["1 processes are there 0.05 s after their launcher"]
        assert started.wait(10) == -9
    assert job.left_over() == []


def test_how_far_a_loss_is_from_another() -> None:
    record: dict[str, Any] = {"iteration": 1, "loss": 4.0, "grad_norm": 2.0, "tokens": 96}
    evaluation = {"iteration": 1, "evaluator": "validation", "loss": 5.0}
    assert furthest([record, evaluation], [record, evaluation]) == (0.0, [])
    near = [{**record, "grad_norm": 2.00001}, {**evaluation, "loss": 5.00001}]
    largest, problems = furthest(near, [record, evaluation])
    assert largest == pytest.approx(5e-6)
    assert problems == []
    assert furthest([{**record, "tokens": 97}], [record]) == (0.0, ["tokens of iteration 1: 97, not 96"])
    assert furthest([record, record], [record])[1] == ["other records: [(1, None), (1, None)]"]
    assert furthest([{**evaluation, "extra": 1}], [evaluation])[1][0].startswith("other keys")


def test_what_a_thread_does_beside_the_training_is_a_phase_of_its_own() -> None:
    """Of a run in one process (`faults_kills`): what a kill hit is what it was aimed at, or what was done beside."""
    marker, said = Marker(), []
    marker.clear()
    marker.begin("step")
    go_on, inside = threading.Event(), threading.Event()

    def write() -> None:
        inside.set()
        go_on.wait(10)

    thread = threading.Thread(target=marker.during("save", write))
    thread.start()
    inside.wait(10)
    said.append((marker.phases, marker.hit("save"), marker.hit("step"), marker.hit("export")))
    marker.back_in("between")
    said.append((marker.phases, marker.hit("between")))
    go_on.set()
    thread.join(10)
    said.append((marker.phases, marker.hit("between"), marker.times("save"), marker.times("seal")))
    assert said == [
        ({"step", "save"}, "save", "step", "save"),
        ({"between", "save"}, "save"),
        ({"between"}, "between", 1, 0),
    ]
