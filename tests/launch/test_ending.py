"""Which rank failed first, what is said of it, and the exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.launch.ending import exit_status, first_failure, how_it_ended, unsaid
from modelyard.launch.rank import Farewell, RankFiles


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, RankFiles]:
    """Two ranks of a second node, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return {rank: RankFiles(tmp_path, rank) for rank in (2, 3)}


class Ended(RankFiles):
    def __init__(self, end: tuple[int, float] | None):
        self.end = end

    def farewell(self) -> Farewell | None:
        return None if self.end is None else Farewell(*self.end, final=False)


def test_the_rank_that_failed_first() -> None:
    """Of several: one that was killed; else the earliest; SIGTERM is what torchrun ends the others with."""
    late, early, gone = Ended((1, 20.0)), Ended((3, 10.0)), Ended(None)
    for ranks, failures, first in (
        ((late, early, gone), {0: 1, 1: 3, 2: -9}, 2),
        ((late, early, gone), {0: 1, 1: 3, 2: -15}, 1),
        ((late, gone, gone), {1: -15, 2: -11, 0: 1}, 2),
        ((late, gone, early), {0: 1, 1: 1, 2: 3}, 2),
        ((Ended((0, 1.0)), gone), {1: -15}, 1),
    ):
        assert first_failure(dict(enumerate(ranks)), failures) == first


def test_the_status_is_that_of_the_first(ranks: dict[int, RankFiles]) -> None:
    assert exit_status(ranks, {2: -9, 3: 1}) == 137
    assert exit_status(ranks, {3: 5}) == 5
    ranks[2].say_farewell(143)
    assert exit_status(ranks, {}) == 143  # torchrun saw no failure
    ranks[3].say_farewell(1)
    assert exit_status(ranks, {3: 1}) == 1


def test_what_a_farewell_says_of_a_restart(ranks: dict[int, RankFiles]) -> None:
    """Final: 2, signals, and 1 where the program answers with it."""
    files = ranks[2]
    for status, answered, final in ((1, False, False), (1, True, True), (2, False, True), (143, False, True)):
        files.say_farewell(status, answered=answered)
        end = files.farewell()
        assert end is not None
        assert (end.status, end.final) == (status, final)


def test_what_rank_0_has_said_too_is_not_repeated(tmp_path: Path) -> None:
    ranks = {rank: RankFiles(tmp_path, rank) for rank in (0, 1)}
    ranks[1].output.write_text("error: the same line\n")
    for status, repeated in ((2, False), (1, True)):
        ranks[1].say_farewell(status)
        ranks[0].say_farewell(status)
        assert unsaid(ranks, {0: status, 1: status}) == repeated
    assert (
        how_it_ended(ranks, {0: 1, 1: 1}) == "rank 1 ended with status 1; it last wrote: error: the same line"
    )
    ranks[1].output.write_text("Traceback\nrank 1: no progress for 60 s in forward of iteration 3\n")
    assert how_it_ended(ranks, {0: 1, 1: 1}) == "rank 1: no progress for 60 s in forward of iteration 3"


def test_a_rank_that_was_told_to_leave_at_its_start(tmp_path: Path) -> None:
    ranks = {rank: RankFiles(tmp_path, rank) for rank in (0, 1)}
    ranks[0].say_farewell(138, answered=True)
    assert unsaid(ranks, {0: 138})
    assert exit_status(ranks, {0: 138}) == 138
    assert how_it_ended(ranks, {0: 138}) == "rank 0 was told to leave by SIGUSR1"


def test_without_rank_0_all_is_said(ranks: dict[int, RankFiles]) -> None:
    """On another node than the first nobody has the screen."""
    ranks[2].output.write_text("error: the data is not there\n")
    for files in ranks.values():
        files.say_farewell(2)
    assert unsaid(ranks, {2: 2, 3: 2})
    assert (
        how_it_ended(ranks, {2: 2, 3: 2})
        == "rank 2 ended with status 2; it last wrote: error: the data is not there"
    )


def test_a_killed_rank_says_where_its_words_are(ranks: dict[int, RankFiles]) -> None:
    log = Path("run/logs/rank-3.txt").absolute()
    log.parent.mkdir(parents=True)
    log.write_text("begun\nIllegal instruction\n\n")
    ranks[3].output.symlink_to(log)
    ranks[2].say_farewell(1)
    assert exit_status(ranks, {2: 1, 3: -4}) == 132
    assert unsaid(ranks, {2: 1, 3: -4})
    assert how_it_ended(ranks, {2: 1, 3: -4}) == (
        "rank 3 was killed by SIGILL; what it wrote is in run/logs/rank-3.txt"
    )
