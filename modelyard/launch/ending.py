"""How the ranks of a node ended: which of them failed first, in words, and the exit status that follows."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress

from modelyard.launch.rank import STOPS, Farewell, RankFiles

Ranks = Mapping[int, RankFiles]
"""Those of this node, by their number among all."""


def exit_status(ranks: Ranks, failures: Mapping[int, int]) -> int:
    """That of the rank that failed first (128 + n for signal n); `failures` are exit codes, -n for signal n."""
    ends = farewells(ranks)
    if not failures:  # those that were told to leave have, and that is no failure to torchrun
        return next((end.status for end in ends.values() if end is not None and end.status), 0)
    first = first_failure(ranks, failures)
    end = ends[first]
    if end is None:
        code = failures[first]
        return 128 - code if code < 0 else code
    return end.status


def farewells(ranks: Ranks) -> dict[int, Farewell | None]:
    return {rank: files.farewell() for rank, files in ranks.items()}


def first_failure(ranks: Ranks, failures: Mapping[int, int]) -> int:
    """The rank that failed before the others did because of it.

    Torchrun ends the others with SIGTERM; one that was killed by anything else before it could take its leave has not
    followed another.
    """
    killed = [rank for rank, code in failures.items() if code < 0 and code != -signal.SIGTERM]
    ends = farewells(ranks)
    left = {rank: end.when for rank in failures if (end := ends[rank]) is not None and end.status}
    if killed:
        return killed[0]
    return min(left, key=lambda rank: left[rank]) if left else next(iter(failures))


def how_it_ended(ranks: Ranks, failures: Mapping[int, int]) -> str:
    """The first failure in a line."""
    rank = first_failure(ranks, failures)
    files, end, code = ranks[rank], ranks[rank].farewell(), failures[rank]
    if end is not None:
        how = f"ended with status {end.status}"
        if end.status - 128 in STOPS:
            how = f"was told to leave by {signal.Signals(end.status - 128).name}"
    else:
        how = _killed(-code) if code < 0 else f"left with status {code}"
    last, log = files.last_line(), files.log
    if last.startswith(f"rank {rank}: "):
        return last  # it has said all itself
    if log is not None:
        return f"rank {rank} {how}; what it wrote is in {os.path.relpath(log)}"
    return f"rank {rank} {how}" + (f"; it last wrote: {last}" if last else "")


def unsaid(ranks: Ranks, failures: Mapping[int, int]) -> bool:
    """Whether the screen does not show yet why the ranks failed: rank 0, which has it, is not the one, or was killed."""
    first = first_failure(ranks, failures)
    ends = farewells(ranks)
    end = ends[first]
    both_refuse = (
        end is not None and end.status == 2 and (here := ends.get(0)) is not None and here.status == 2
    )
    # Told before it could save: it was silent, for the agent's SIGTERM that follows another's failure looks the same.
    return end is None or end.status - 128 in STOPS or bool(first and not both_refuse)


def say(text: str) -> None:
    """What the launching process has to say goes to standard error; standard output is rank 0's."""
    print(text, file=sys.stderr, flush=True)


def _killed(signum: int) -> str:
    name = f"signal {signum}"
    with suppress(ValueError):
        name = signal.Signals(signum).name
    memory = ", perhaps because memory ran out" if signum == signal.SIGKILL else ""
    return f"was killed by {name}{memory}"
