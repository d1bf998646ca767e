"""Where the time goes: sums by hand, on a clock of our own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from modelyard.train import phases
from modelyard.train.phases import PHASES, PhaseClock


def test_each_phase_lasts_until_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 3.5, 10.0, 10.25, 11.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(moments))
    clock = PhaseClock(torch.device("cpu"))  # other from 0
    clock("forward")  # from 1
    clock("backward")  # from 3
    clock("forward")  # from 3.5
    zeros = dict.fromkeys(PHASES, 0.0)
    assert clock.read() == zeros | {"other": 1.0, "forward": 2.0 + 6.5, "backward": 0.5}  # at 10
    clock("checkpoint")  # at 10.25: the rest of the second forward
    assert clock.read() == zeros | {"forward": 0.25, "checkpoint": 0.75}  # at 11


class FakeEvent:
    """A CUDA event on a device that is always `behind` marks behind the host."""

    made: list[FakeEvent]
    waited: int
    behind: int

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.milliseconds = 10.0 * len(FakeEvent.made) ** 2
        FakeEvent.made.append(self)

    def query(self) -> bool:
        return FakeEvent.made.index(self) < len(FakeEvent.made) - FakeEvent.behind

    def synchronize(self) -> None:
        FakeEvent.waited += 1
        FakeEvent.behind = 0

    def elapsed_time(self, later: FakeEvent) -> float:
        assert self.query()
        assert later.query()
        return later.milliseconds - self.milliseconds


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    FakeEvent.made, FakeEvent.waited, FakeEvent.behind = [], 0, 3
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    return torch.device("cuda")


def test_on_a_gpu_only_reading_waits(fake_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mark n is reached at 10 n² ms, so that phase n lasts 10 (2 n + 1) ms."""
    monkeypatch.setattr(phases, "_MANY", 6)
    clock = PhaseClock(fake_device)
    for phase in itertools.islice(itertools.cycle(("forward", "backward")), 20):
        clock(phase)
    assert FakeEvent.waited == 0
    assert len(clock._marks) <= 7  # complete ones are added up on the way
    seconds = clock.read()
    assert FakeEvent.waited == 1
    assert seconds["other"] == pytest.approx(0.01)
    assert seconds["forward"] == pytest.approx(sum(0.01 * (2 * n + 1) for n in range(1, 21, 2)))
    assert seconds["backward"] == pytest.approx(sum(0.01 * (2 * n + 1) for n in range(2, 21, 2)))
