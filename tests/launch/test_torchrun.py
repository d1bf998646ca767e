"""`--nproc`: N processes that start, stop, fail and die as one, with programs that take no time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelyard.launch.rank import RankFiles
from modelyard.launch.torchrun import _first, _status
from tests.conftest import ROOT

PROGRAM = """\
import os, signal, sys, time
from pathlib import Path

rank, what = int(os.environ["RANK"]), sys.argv[1]

def stop(signum, frame):
    time.sleep(1.0 * (rank == 0))  # the one that saves takes longer
    Path(f"stopped-{rank}").write_text(str(signum))
    sys.exit(128 + signum)

for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(signum) != signal.SIG_IGN:
        signal.signal(signum, stop)
Path(f"{rank}.id").write_text(str(os.getpid()))
print("rank", rank, "of", os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.environ["OMP_NUM_THREADS"], flush=True)
if what == "wait":
    while True:
        time.sleep(0.05)
if rank == 1 and what == "refuse":
    print("error: a line of my own", file=sys.stderr)
    sys.exit(2)
if rank == 1 and what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what in ("refuse", "die"):
    time.sleep(30)
if what == "raise":
    raise ValueError("out of my hands")
"""
LAUNCH = "import sys; from modelyard.launch.torchrun import launch; raise SystemExit(launch(2, 'program', sys.argv[1:]))"


def started(folder: Path, what: str, prefix: str = "") -> subprocess.Popen[str]:
    (folder / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-c", prefix + LAUNCH, what],
        cwd=folder,
        env=environment | {"PYTHONPATH": f"{ROOT}:{folder}", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith("modelyard-")]


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("nothing", 0, ""),
        ("refuse", 2, "error: rank 1 ended with status 2; it last wrote: error: a line of my own\n"),
        ("die", 137, "error: rank 1 was killed by SIGKILL, perhaps because memory ran out; it last wrote: rank 1 of 2 1 "),
    ],
)  # fmt: skip
def test_statuses(tmp_path: Path, what: str, status: int, said: str) -> None:
    process = started(tmp_path, what)
    out, err = process.communicate(timeout=60)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (process.returncode, out) == (status, f"rank 0 of 2 0 {threads}\n"), err
    assert err.startswith(said)
    assert err.count("\n") == bool(said), err  # one line, and nothing of torchrun's
    assert left_over(tmp_path) == []


def ranks_of(folder: Path, process: subprocess.Popen[str]) -> list[int]:
    """The ids of both ranks, once they are there."""
    deadline = time.monotonic() + 60
    files = [folder / f"{rank}.id" for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def is_there(process: int) -> bool:
    """Whether a process runs; one that is dead and not yet reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_signal_is_passed_on_and_the_slower_rank_awaited(tmp_path: Path) -> None:
    process = started(tmp_path, "wait")
    ranks_of(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in range(2)] == ["2", "2"]
    assert left_over(tmp_path) == []


def test_what_is_ignored_stays_so_and_a_kill_leaves_nobody(tmp_path: Path) -> None:
    process = started(tmp_path, "wait", "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); ")
    ranks = ranks_of(tmp_path, process)
    process.send_signal(signal.SIGHUP)  # as under nohup
    time.sleep(0.3)
    assert process.poll() is None
    assert all(map(is_there, ranks))
    if sys.platform != "linux":
        pytest.skip("only Linux ends a process with its parent")
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while any(map(is_there, ranks)) and time.monotonic() < deadline:
        time.sleep(0.02)
    survivors = [rank for rank in ranks if is_there(rank)]
    for rank in survivors:
        os.kill(rank, signal.SIGKILL)
    assert survivors == [], "ranks outlive the process that started them"
    assert not list(tmp_path.glob("stopped-*"))


def one_rank(folder: Path, what: str) -> tuple[int, str, str]:
    """Rank 0 as torchrun starts it, with its exit code to torchrun."""
    (folder / "program.py").write_text(PROGRAM)
    words = [sys.executable, "-m", "modelyard.launch.rank", str(folder), str(os.getpid()), "program", what]
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "PYTHONPATH": f"{ROOT}:{folder}"}
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_an_exception_is_the_ranks_own(tmp_path: Path) -> None:
    code, _, err = one_rank(tmp_path, "raise")
    assert code == 1
    assert err.startswith("Traceback")
    assert err.endswith("ValueError: out of my hands\n")
    farewell = RankFiles(tmp_path, 0).farewell()
    assert farewell is not None
    assert farewell[0] == 1


def test_a_signal_before_there_are_ranks(tmp_path: Path) -> None:
    """It came while torch was imported: who starts afterwards leaves at once, and torchrun sees no failure."""
    (tmp_path / "signal").write_text("15")
    assert one_rank(tmp_path, "wait") == (0, "", "")
    files = RankFiles(tmp_path, 0)
    farewell = files.farewell()
    assert farewell is not None
    assert farewell[0] == 143
    assert _status([files], {}) == 143


def test_what_rank_0_has_said_too_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [RankFiles(tmp_path, rank) for rank in range(2)]
    ranks[1].output.write_text("error: the same line\n")
    for status, said in (
        (2, ""),
        (1, "error: rank 1 ended with status 1; it last wrote: error: the same line\n"),
    ):
        ranks[1].say_farewell(status)
        ranks[0].say_farewell(status)
        assert _status(ranks, {0: status, 1: status}) == status
        assert capsys.readouterr().err == said
    ranks[1].output.write_text("Traceback\nrank 1: no progress for 60 s in forward of iteration 3\n")
    assert _status(ranks, {0: 1, 1: 1}) == 1
    assert capsys.readouterr().err == "error: rank 1: no progress for 60 s in forward of iteration 3\n"


def test_the_rank_that_failed_first() -> None:
    """Of several: one that was killed; else the earliest; SIGTERM is what torchrun ends the others with."""
    late, early, gone = (1, 20.0), (3, 10.0), None
    assert _first([late, early, gone], {0: 1, 1: 3, 2: -9}) == 2
    assert _first([late, early, gone], {0: 1, 1: 3, 2: -15}) == 1
    assert _first([late, gone, gone], {1: -15, 2: -11, 0: 1}) == 2
    assert _first([late, gone, early], {0: 1, 1: 1, 2: 3}) == 2
    assert _first([(0, 1.0), gone], {1: -15}) == 1


def test_a_killed_rank_says_where_its_words_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ranks = [RankFiles(tmp_path, rank) for rank in range(2)]
    log = tmp_path / "run" / "logs" / "rank-1.txt"
    log.parent.mkdir(parents=True)
    log.write_text("begun\nIllegal instruction\n\n")
    ranks[1].output.symlink_to(log)
    ranks[0].say_farewell(1)
    assert _status(ranks, {0: 1, 1: -4}) == 132
    expected = "error: rank 1 was killed by SIGILL; what it wrote is in run/logs/rank-1.txt\n"
    assert capsys.readouterr().err == expected


def test_what_a_rank_writes_goes_to_a_file(tmp_path: Path) -> None:
    first, last = tmp_path / "first.txt", tmp_path / "logs" / "rank-1.txt"
    program = (
        "import os, sys; from pathlib import Path; from modelyard.launch.process import output_to\n"
        f"output_to(Path({str(first)!r})); print('one'); os.system('echo two')\n"
        f"output_to(Path({str(last)!r})); print('three', file=sys.stderr); os.write(1, b'four')\n"
    )
    (tmp_path / "logs").mkdir()
    last.write_text("of an earlier run\n")
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")
    assert last.read_text() == "of an earlier run\none\ntwo\nthree\nfour"
    assert first.read_text() == last.read_text()
