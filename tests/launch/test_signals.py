"""Signals between the launching process and its ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from modelyard.launch.rank import RankFiles
from modelyard.launch.signals import Signals, Stopped


def test_with_ranks_they_decide(tmp_path: Path) -> None:
    ranks = [RankFiles(tmp_path, rank) for rank in range(2)]
    signals = Signals()
    with signals.passed_on():
        signals.now_to(ranks)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.first == signal.SIGUSR1
    assert ranks[1].stopped_by() == signal.SIGUSR1  # for one that is not there yet


def test_without_ranks_it_is_obeyed_at_once(tmp_path: Path) -> None:
    signals = Signals()
    before = signal.getsignal(signal.SIGTERM)
    with signals.passed_on():
        with pytest.raises(Stopped) as stopped, signals.without_ranks():
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.signum == signal.SIGTERM
        with pytest.raises(Stopped), signals.without_ranks():
            raise AssertionError("it came before")
    assert signal.getsignal(signal.SIGTERM) == before
    # While torch is imported: the ranks that follow leave at once.
    ranks = [RankFiles(tmp_path, 0)]
    signals.now_to(ranks)
    assert ranks[0].stopped_by() == signal.SIGTERM
