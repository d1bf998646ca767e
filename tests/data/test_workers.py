"""The parallel map keeps the order, draws few inputs ahead, passes errors on and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from modelyard.data.workers import available_cores, ordered_map
from modelyard.errors import UserError


def slow_square(offset: int, item: int) -> int:
    time.sleep(0.002 * (item % 3))
    return offset + item * item


def fail_at_five(_: None, item: int) -> int:
    if item == 5:
        raise UserError("five is wrong")
    return item


def die(_: None, item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_order_and_bounded_draw(workers):
    drawn = []

    def items():
        for i in range(40):
            drawn.append(i)
            yield i

    for count, (item, result) in enumerate(ordered_map(slow_square, 1, items(), workers)):
        assert (item, result) == (count, 1 + count * count)
        assert len(drawn) <= count + 2 * workers + 1
    assert len(drawn) == 40


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_in_their_place(workers):
    results = ordered_map(fail_at_five, None, range(100), workers)
    assert [next(results)[1] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="five is wrong"):
        next(results)


def test_killed_worker_is_a_clear_error():
    with pytest.raises(UserError, match="worker process was killed"):
        list(ordered_map(die, None, range(20), 2))


def test_workers_leave_when_the_main_process_is_killed():
    code = (
        "import os, sys, time\n"
        "from modelyard.data.workers import ordered_map\n"
        "def work(_, item):\n"
        "    os.write(1, b'%d\\n' % os.getpid())\n"  # one write: both workers share the pipe
        "    time.sleep(60)\n"
        "list(ordered_map(work, None, range(2), 2))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(running(pid) for pid in workers)


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_available_cores():
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
