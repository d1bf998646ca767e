"""Progress is said in plain lines without a terminal, and drawn on one."""

from __future__ import annotations

import pytest

from modelyard.data import progress
from modelyard.data.progress import Progress, duration, short


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1k"),
        (12_345, "12.3k"),
        (4_578_331, "4.58M"),
        (15e12, "15T"),
        (2e9, "2G"),
    ],
)
def test_short(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (360_000, "100:00:00")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_lines_say_share_counts_speed_and_time_left(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines: list[str] = []
    with Progress(1000, lines.append, terminal=False) as bar:
        for _ in range(4):
            clock[0] += 2.0
            bar.update(100, 10, 2000)
    assert lines == ["prepare  30% | 30 documents | 6,000 tokens | 1,000 tokens/s | ETA 0:00:14"]


def test_bar_on_a_terminal(capsys):
    lines: list[str] = []
    with Progress(10, lines.append, terminal=True) as bar:
        bar.update(10, 1234, 56_789)
        bar._bar.refresh()
        task = bar._bar.tasks[0]
        assert (task.completed, task.total) == (10, 10)
        assert task.fields["counts"].startswith("1.23k documents | 56.8k tokens | ")
    assert lines == []
