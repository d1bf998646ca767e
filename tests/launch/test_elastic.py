"""Several nodes on one machine, each a launching process of its own: they meet, end alike, come and go."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Ranks that agree and lose each other as those of a run do, by files in the working directory.
PROGRAM = """\
import os, signal, sys, time
from pathlib import Path

from modelyard.launch.process import say_farewell

rank, world, round = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["MASTER_PORT"]
stop = Path(f"stop-{round}")
for signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(signum, lambda signum, frame: stop.write_text(str(int(signum))))
Path(f"{round}-{rank}").write_text(str(os.getpid()))
print(f"rank {rank} of {world}", flush=True)
Path(f"at-work-{world}-{rank}-{round}").touch()


def is_gone(number):
    path = Path(f"{round}-{number}")
    return path.exists() and path.read_text() and not Path("/proc", path.read_text()).exists()


while not Path("finish").exists():
    time.sleep(0.05)
    if rank == 1 and Path("refuse").exists():
        print("error: something to change", file=sys.stderr)
        sys.exit(2)
    if rank == 1 and Path("die").exists():
        Path("die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if stop.exists() and stop.read_text():
        sys.exit(128 + int(stop.read_text()))
    if any(is_gone(number) for number in range(world)):
        say_farewell(1)
        os._exit(1)
"""
LAUNCH = """\
import sys
from modelyard.errors import RunFailed
from modelyard.launch.command import Node
from modelyard.launch.torchrun import launch
node = Node(1, eval(sys.argv[1]), sys.argv[2], restarts=2,
            conf={"last_call_timeout": 1, "keep_alive_interval": 1, "join_timeout": 60})
try:
    raise SystemExit(launch(node, "program", []))
except RunFailed as error:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(1)
"""


class Nodes:
    """Launching processes by name; the first started has the endpoint."""

    def __init__(self, folder: Path, possible: tuple[int, ...]):
        self.folder, self.possible = folder, possible
        (folder / "program.py").write_text(PROGRAM)
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
            self.endpoint = f"127.0.0.1:{trial.getsockname()[1]}"
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{self.folder}", "TMPDIR": str(self.folder)}
        with (self.folder / f"{name}.txt").open("wb") as output:
            self.started[name] = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(self.possible), self.endpoint],
                cwd=self.folder, env=environment, stdout=output, stderr=output,
            )  # fmt: skip
        self.until(lambda: "waiting for " in self.said(name))

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()

    def at_work(self, world: int) -> int:
        """How many ranks have begun among so many."""
        return len(list(self.folder.glob(f"at-work-{world}-*")))

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, {name: self.said(name) for name in self.started}
            time.sleep(0.05)

    def statuses(self) -> dict[str, int]:
        """Of those that were not killed."""
        return {
            name: status
            for name, process in self.started.items()
            if (status := process.wait(60)) != -signal.SIGKILL
        }


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Callable[..., Nodes]]:
    made = []

    def make(*possible: int) -> Nodes:
        made.append(Nodes(tmp_path, possible))
        return made[-1]

    yield make
    for process in (process for group in made for process in group.started.values()):
        process.kill()
        process.wait()


def test_what_one_node_refuses_ends_the_other(nodes: Callable[..., Nodes]) -> None:
    """With the same status and no restart; each says what it knows."""
    two = nodes(2)
    two.start("one")
    two.start("two")
    two.until(lambda: two.at_work(2) == 2)
    (two.folder / "refuse").touch()
    assert two.statuses() == {"one": 2, "two": 2}
    assert two.at_work(2) == 2
    first, second = (two.said(name).splitlines() for name in ("one", "two"))
    if "rank 0 is here, of 2" not in first:  # it is the order of their ids that counts
        first, second = second, first
    waiting = f"waiting for 2 nodes at {two.endpoint}"
    ended = "error: the job ended with status 2 on another node, which says why"
    assert [*first[:3], first[-1]] == [waiting, "rank 0 is here, of 2", "rank 0 of 2", ended]
    assert second == [
        waiting,
        "rank 1 is here, of 2; rank 0, which has the screen, is on 127.0.0.1",
        "error: rank 1 ended with status 2; it last wrote: error: something to change",
    ]


@pytest.mark.slow
def test_nodes_come_and_go(nodes: Callable[..., Nodes]) -> None:
    """One alone, a second that joins, a third that the layout cannot use, until the second is killed."""
    some = nodes(1, 2, 4)
    some.start("one")
    some.until(lambda: some.at_work(1) == 1)
    some.start("two")
    some.until(lambda: some.at_work(2) == 2)
    assert "another node is here: saving, then going on with it\n" in some.said("one")
    some.start("three")
    some.until(lambda: "stands by" in some.said("one") + some.said("two") + some.said("three"))
    some.until(lambda: some.at_work(2) == 4)
    # Whichever works, and has not the endpoint.
    victim, rest = ("three", "two") if "stands by" in some.said("two") else ("two", "three")
    some.started[victim].kill()
    some.until(lambda: some.at_work(2) == 6)
    text = some.said("one") + some.said(rest)
    assert "3 nodes are here, and the layout can use 2: this one stands by\n" in text
    assert "restarting (1 of 2): rank " in text
    (some.folder / "finish").touch()
    assert some.statuses() == {"one": 0, rest: 0}


@pytest.mark.slow
def test_a_rank_that_dies_restarts_all(nodes: Callable[..., Nodes]) -> None:
    two = nodes(2)
    two.start("one")
    two.start("two")
    two.until(lambda: two.at_work(2) == 2)
    (two.folder / "die").touch()
    two.until(lambda: two.at_work(2) == 4)
    (two.folder / "finish").touch()
    assert two.statuses() == {"one": 0, "two": 0}
    assert "restarting (1 of 2): rank 1 was killed by SIGKILL" in two.said("one") + two.said("two")


@pytest.mark.slow
def test_a_signal_to_one_node_ends_all(nodes: Callable[..., Nodes]) -> None:
    two = nodes(1, 2)
    two.start("one")
    two.start("two")
    two.until(lambda: two.at_work(2) == 2)
    two.started["two"].send_signal(signal.SIGUSR1)
    assert two.statuses() == {"one": 138, "two": 138}
    assert two.at_work(2) == 2
    assert "error" not in two.said("one") + two.said("two")


@pytest.mark.slow
def test_a_signal_while_nodes_are_awaited(nodes: Callable[..., Nodes]) -> None:
    two = nodes(2)
    two.start("one")
    time.sleep(1)
    two.started["one"].send_signal(signal.SIGINT)
    assert two.statuses() == {"one": 130}
    assert two.said("one") == f"waiting for 2 nodes at {two.endpoint}\n"


@pytest.mark.slow
def test_without_the_node_that_has_the_endpoint_nobody_meets(nodes: Callable[..., Nodes]) -> None:
    two = nodes(1, 2)
    two.start("one")
    two.start("two")
    two.until(lambda: two.at_work(2) == 2)
    two.started["one"].kill()
    assert two.statuses() == {"two": 1}
    assert two.said("two").splitlines()[-1] == (
        f"error: lost contact with {two.endpoint}, where the nodes meet: the node that has it must live as long as the run"
    )
