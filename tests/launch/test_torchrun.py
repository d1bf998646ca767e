"""`--nproc`: N processes that start, stop, fail and die as one, with programs that take no time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from modelyard.launch.command import Node
from modelyard.launch.rank import RankFiles
from modelyard.launch.torchrun import launch
from tests.conftest import ROOT

PROGRAM = """\
import os, signal, sys, time
from pathlib import Path

rank, what, start = int(os.environ["RANK"]), sys.argv[1], int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

def stop(signum, frame):
    time.sleep(1.0 * (rank == 0))  # the one that saves takes longer
    Path(f"stopped-{rank}").write_text(str(signum))
    sys.exit(128 + signum)

for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(signum) != signal.SIG_IGN:
        signal.signal(signum, stop)
Path(f"{rank}.id").write_text(str(os.getpid()))
print("rank", rank, "of", os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.environ["OMP_NUM_THREADS"], flush=True)
Path(f"{rank}.{start}").touch()
while rank and not Path(f"0.{start}").exists():
    time.sleep(0.01)
if what == "wait":
    while True:
        time.sleep(0.05)
if rank == 1 and what == "refuse":
    print("error: a line of my own", file=sys.stderr)
    sys.exit(2)
if rank == 1 and (what == "die" or (what == "die twice" and start < 2)):
    os.kill(os.getpid(), signal.SIGKILL)
if what == "mendable":
    from modelyard.launch.process import a_restart_may_mend
    a_restart_may_mend()
if what == "mendable" or (what == "fail" and (rank == 1 or os.environ["WORLD_SIZE"] == "1")):
    sys.exit(1)
if what in ("refuse", "die", "fail") or (what == "crash" and rank == 0) or (what == "die twice" and start < 2):
    time.sleep(30)
if what in ("crash", "raise"):
    raise ValueError("out of my hands")
"""
LAUNCH = """\
import sys
from modelyard.launch.command import Node
from modelyard.launch.torchrun import launch
raise SystemExit(launch(Node(2, run_id='runs/a b', restarts=int(sys.argv[1])), 'program', sys.argv[2:]))
"""


def started(folder: Path, what: str, prefix: str = "", restarts: int = 0) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-c", prefix + LAUNCH, str(restarts), what],
        cwd=folder,
        env=environment | {"PYTHONPATH": f"{ROOT}:{folder}", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith("modelyard-")]


def test_nothing_goes_wrong(tmp_path: Path) -> None:
    process = started(tmp_path, "nothing")
    out, err = process.communicate(timeout=60)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (process.returncode, out, err) == (0, f"rank 0 of 2 0 {threads}\n", "")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("what", "restarts", "status", "said"),
    [
        ("die twice", 3, 0, ["restarting (1 of 3): rank 1 was killed by SIGKILL", "restarting (2 of 3): rank 1 was killed by SIGKILL"]),
        ("die", 1, 137, ["restarting (1 of 1): rank 1 was killed by SIGKILL", "error: rank 1 was killed by SIGKILL, perhaps because memory ran out; it last wrote: rank 1 of 2 1 "]),
        ("crash", 1, 1, ["restarting (1 of 1): rank 1 ended with status 1; it last wrote: ValueError: out", "error: rank 1 ended with status 1; it last wrote: ValueError: out"]),
        ("refuse", 3, 2, ["error: rank 1 ended with status 2; it last wrote: error: a line of my own"]),
        ("fail", 3, 1, ["error: rank 1 ended with status 1; it last wrote: rank 1 of 2 1 "]),
    ],
)  # fmt: skip
def test_restarts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    what: str,
    restarts: int,
    status: int,
    said: list[str],
) -> None:
    """What a restart can mend is restarted; what the program answers, to the user or for all ranks alike, is not."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "1")  # and as it was afterwards
    assert launch(Node(2, restarts=restarts), "program", [what]) == status
    out, err = capfd.readouterr()
    assert out.count("rank 0 of 2 0 ") == len([line for line in said if line.startswith("restarting")]) + 1
    lines = err.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, said, strict=True)] == said
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
    process = started(tmp_path, "wait", restarts=3)
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
    assert (farewell.status, farewell.final) == (1, False)


def test_an_answer_that_a_restart_may_mend(tmp_path: Path) -> None:
    assert one_rank(tmp_path, "fail")[0] == 1
    farewell = RankFiles(tmp_path, 0).farewell()
    assert farewell is not None
    assert farewell.final
    assert one_rank(tmp_path, "mendable")[0] == 1
    farewell = RankFiles(tmp_path, 0).farewell()
    assert farewell is not None
    assert not farewell.final


def test_a_signal_before_there_are_ranks(tmp_path: Path) -> None:
    """It came while torch was imported: who starts afterwards leaves at once, and torchrun sees no failure."""
    (tmp_path / "signal").write_text("15")
    assert one_rank(tmp_path, "wait") == (0, "", "")
    files = RankFiles(tmp_path, 0)
    farewell = files.farewell()
    assert farewell is not None
    assert (farewell.status, farewell.final) == (143, True)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_a_rank_before_it_has_handlers(tmp_path: Path, signum: int) -> None:
    """It leaves with an answer, which no restart follows."""
    (tmp_path / "program.py").write_text("import time; print('here', flush=True); time.sleep(60)\n")
    words = [sys.executable, "-m", "modelyard.launch.rank", str(tmp_path), str(os.getpid()), "program"]
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    process = subprocess.Popen(
        words, cwd=tmp_path, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signum, "")
    farewell = RankFiles(tmp_path, 0).farewell()
    assert farewell is not None
    assert (farewell.status, farewell.final) == (128 + signum, True)


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
