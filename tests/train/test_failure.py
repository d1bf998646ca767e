"""What is said of a process that lost the others or stands still."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from modelyard.errors import UserError
from modelyard.parallel.world import World
from modelyard.train.console import Console
from modelyard.train.failure import lost_contact, on_its_own, position

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29609. This is "
    "typically caused by a remote worker crashing. Check the logs."
)


def test_errors_of_the_connection_are_told_from_others() -> None:
    assert lost_contact(RuntimeError(GLOO)) == "Connection closed by peer [127.0.0.1]:29609"
    late = "[unbound_buffer.cc:129] Timed out waiting 4000ms for send operation to complete"
    assert lost_contact(RuntimeError(late)) == "Timed out waiting 4000ms for send operation to complete"
    assert lost_contact(dist.DistBackendError("NCCL error in: x.cpp:1\nmore")) == "NCCL error in: x.cpp:1"
    behind = ValueError("of ours")
    behind.__cause__ = RuntimeError(GLOO)
    assert lost_contact(behind) == "Connection closed by peer [127.0.0.1]:29609"
    assert lost_contact(RuntimeError("CUDA out of memory")) is None
    assert lost_contact(ValueError(GLOO)) is None


def test_a_position_is_our_innermost_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    console = Console(speaks=False)
    seen = []
    console.keep = lambda _text: seen.append(position(inspect.currentframe()))  # type: ignore[method-assign]
    console.line("x")
    assert seen[0].startswith("at console.py:")
    assert seen[0].endswith(" in line")
    assert position(None) == "at an unknown place"


def test_alone_errors_are_raised_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError), on_its_own(World(), Console(), lambda: "nowhere"):
        _ = 1 / 0


def ended_by(error: BaseException, log: Path | None) -> tuple[int, str]:
    """Exit status and last words of a process, one of several, that meets this error."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(send, 2)
        console = Console(speaks=False)
        if log is not None:
            console.open_log(log)
        with on_its_own(World(3, 4, group="others"), console, lambda: "forward of iteration 7"):
            raise error
        os._exit(77)  # not reached
    os.close(send)
    with os.fdopen(receive) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def test_what_one_process_alone_meets_ends_it(tmp_path: Path) -> None:
    """A line on standard error; the traceback in the log, or before the line where there is no log yet."""
    log = tmp_path / "rank-3.txt"
    status, said = ended_by(ValueError("a\nb"), None)
    assert status == 1
    assert said.startswith("Traceback (most recent call last):\n")
    assert said.endswith("\nValueError: a\nb\nrank 3: ValueError in forward of iteration 7: a\n")

    line = f"rank 3: ValueError in forward of iteration 7: a; traceback in {log}"
    assert ended_by(ValueError("a\nb"), log) == (1, line + "\n")
    kept = [entry.split("  ", 1)[1] for entry in log.read_text().splitlines()]
    assert kept[:2] == [line, "Traceback (most recent call last):"]
    assert kept[-2:] == ["ValueError: a", "b"]

    refused = "rank 3: error in forward of iteration 7: x is wrong; so is y\n"
    assert ended_by(UserError("x is wrong", "so is y"), log) == (2, refused)
    lost = "rank 3: lost contact in forward of iteration 7 (Connection closed by peer [127.0.0.1]:29609)"
    assert ended_by(RuntimeError(GLOO), log) == (1, f"{lost}; traceback in {log}\n")
