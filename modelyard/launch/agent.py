"""torch's elastic agent, told which failures a restart can mend and which nodes can work together.

`LocalElasticAgent` restarts whatever fails and starts ranks on every node that comes. What is added here, in methods that
it has for the purpose (torch 2.11 to 2.13):

- a failure that would come again ends the job, on every node and with the same status (`_monitor_workers`);
- ranks that are stopped because another node came save first (`_restart_workers`);
- where the layout cannot use all nodes that are there, the last ones stand by (`_assign_worker_ranks`).

The nodes tell each other in the store they meet in; `_say` and `_end` have the words.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from modelyard.launch.command import Node
from modelyard.launch.ending import exit_status, farewells, first_failure, how_it_ended, say
from modelyard.launch.rank import STOPS, RankFiles
from modelyard.launch.signals import Signals

SAVING = 1800.0
"""Seconds that ranks have for saving when they are stopped for a node that came."""
LINGER = 5.0
"""Seconds that the node with the store waits at the end for the others to see that it is the end."""
MEETINGS = 5
"""Times that nodes meet anew because one went before they had begun."""
MOMENT = 2.0
"""Seconds that a node whose ranks lost others waits to hear what became of those."""
LOOK = 1.0
"""Seconds between two looks at what other nodes say."""


class Agent(LocalElasticAgent):
    """The ranks of this node, from their first start to the end of the job."""

    def __init__(
        self,
        spec: WorkerSpec,
        node: Node,
        store: dist.Store,
        *,
        folder: Path,
        words: list[str],
        signals: Signals,
    ):
        super().__init__(spec=spec, logs_specs=DefaultLogsSpecs(log_dir=str(folder)), start_method="spawn")
        self.node, self.signals = node, signals
        self.ranks: dict[int, RankFiles] = {}
        """Of this node, by their number among all."""
        self.failures: dict[int, int] = {}
        """Exit codes of those that failed, -n for signal n."""
        self.elsewhere: End | None = None
        """How another node ended the job, where the ranks of this one were stopped for it."""
        self._folder, self._words = folder, words
        self._shared = dist.PrefixStore(f"modelyard.{node.run_id}", store)
        self._attempts, self._looked = 0, 0.0
        with suppress(*LOST):
            self._shared.add(_CAME, 1)

    # Start

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self.ranks, self.failures = {}, {}
        with self.signals.without_ranks():
            if not self.node.alone:
                say(f"waiting for {_numbers(self.node.possible)} at {self.node.endpoint}")
            for attempt in range(MEETINGS):
                try:
                    super()._rendezvous(worker_group)
                    return
                except (
                    dist.DistStoreError
                ):  # torch waits for a node that went after the others had counted it
                    if attempt == MEETINGS - 1:
                        raise
                    say("a node went while ranks were dealt out; once more")

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        workers = super()._assign_worker_ranks(store, group_rank, group_world_size, spec)
        used = max((n for n in self.node.possible if n <= group_world_size), default=group_world_size)
        alike = workers[0].world_size == group_world_size * spec.local_world_size
        if used == group_world_size or not alike:
            return workers  # what cannot be laid out the ranks refuse
        for worker in workers:
            worker.world_size = worker.role_world_size = used * spec.local_world_size
        return workers if group_rank < used else []

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        workers = worker_group.workers
        if not workers:
            self._pcontext = None
            nodes = worker_group.group_world_size or 0
            used = max(n for n in self.node.possible if n <= nodes)
            say(f"{nodes} nodes are here, and the layout can use {used}: this one stands by")
            return {}
        folder = self._folder / str(self._attempts)
        folder.mkdir()
        self._attempts += 1
        self.ranks = {worker.global_rank: RankFiles(folder, worker.global_rank) for worker in workers}
        spec = worker_group.spec
        spec.args = (*spec.args[:2], str(folder), str(os.getpid()), *self._words)
        if not self.node.alone:
            others = (
                "" if 0 in self.ranks else f"; rank 0, which has the screen, is on {worker_group.master_addr}"
            )
            first, last = workers[0].global_rank, workers[-1].global_rank
            here = f"rank {first} is" if first == last else f"ranks {first} to {last} are"
            say(f"{here} here, of {workers[0].world_size}{others}")
        self.signals.now_to(list(self.ranks.values()))
        started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    # While they run

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if not worker_group.workers:
            return self._stand_by()
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.SUCCEEDED:
            # Told to leave for a node that came: here that node has not been seen yet.
            if self.status and self._said("regroup"):
                return RunResult(state=WorkerState.HEALTHY)
            self._end(orderly=True)
        elif result.state == WorkerState.FAILED:
            self.failures = {rank: failure.exitcode for rank, failure in result.failures.items()}
            return self._judged(result)
        elif (end := self.end()) is not None and not end.orderly:
            self.elsewhere = end  # the ranks here would find out by themselves, and late
            self._remaining_restarts = 0
            return RunResult(state=WorkerState.FAILED)
        return result

    def _judged(self, result: RunResult) -> RunResult:
        """A failure, with an end to all restarts where it would come again."""
        first = first_failure(self.ranks, self.failures)
        farewell = self.ranks[first].farewell()
        # Killed by a signal that asks to stop, before there was a handler: told to leave, and no crash.
        told = farewell is None and -self.failures[first] in STOPS
        final = told or (farewell is not None and farewell.final)
        over = self.end(now=True) if final or farewell is None else self._word_of_others()
        if over is not None and over.orderly:
            # The run was over, and something went wrong on the way out: the others wait at the exit.
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(self.ranks))
        if over is not None and not final:
            self.elsewhere = over
        if final or over is not None or self.signals.first:
            self._remaining_restarts = 0
        elif self._said("regroup"):
            return RunResult(state=WorkerState.HEALTHY)  # it lost those who left already: no failure
        if not self._remaining_restarts:
            self._end(orderly=False)
            return result
        number = self.node.restarts - self._remaining_restarts + 1
        say(f"restarting ({number} of {self.node.restarts}): {how_it_ended(self.ranks, self.failures)}")
        self._say("failed")
        return result

    def _word_of_others(self) -> End | None:
        """The end of the job, if the node whose ranks failed first says in a moment that it is: those here lost them."""
        deadline = time.monotonic() + MOMENT
        while True:
            end = self.end(now=True)
            known = end is not None or self.node.alone or self._said("failed") or self._said("regroup")
            if known or time.monotonic() > deadline:
                return end
            time.sleep(0.1)

    def _stand_by(self) -> RunResult:
        end = self.end()
        if end is None:
            return RunResult(state=WorkerState.HEALTHY)
        self._remaining_restarts = 0
        return RunResult(state=WorkerState.SUCCEEDED if end.orderly else WorkerState.FAILED)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY and worker_group.workers:
            if self._said("failed"):
                say("ranks of another node failed: restarting with them")
            elif not self._let_in():
                return
        super()._restart_workers(worker_group)

    def _let_in(self) -> bool:
        """Have the ranks save and leave for a node that came; False where the run was over before they heard of it."""
        if not self._over():
            self._say("regroup")
            say("another node is here: saving, then going on with it")
            self.signals.pass_on(signal.SIGUSR1)
            assert self._pcontext is not None
            self._pcontext.wait(SAVING, 0.1)
        return not self._over()

    def _over(self) -> bool:
        ends = farewells(self.ranks).values()
        refused = any(end is not None and end.final and 0 < end.status < 128 for end in ends)
        return refused or all(end is not None and end.status == 0 for end in ends)

    # End

    @property
    def status(self) -> int:
        """The exit status that follows from how the ranks ended."""
        return exit_status(self.ranks, self.failures)

    def end(self, *, now: bool = False) -> End | None:
        """How a node, this one or another, ended the job; None while none has, and between two looks (but for `now`)."""
        if self.node.alone or (not now and time.monotonic() - self._looked < LOOK):
            return None
        self._looked = time.monotonic()
        with suppress(*LOST):
            if self._shared.check([_END]):
                return End(*json.loads(self._shared.get(_END)))
        return None

    def _end(self, *, orderly: bool) -> None:
        with suppress(*LOST):
            self._shared.compare_set(_END, "", json.dumps([self.status, orderly]))

    def linger(self, *, host: bool) -> None:
        """Say that this node has seen the end; the one that has the store waits a little for the others to say so, be they
        nodes that work, stand by or wait to be let in."""
        deadline = time.monotonic() + LINGER
        with suppress(*LOST):
            seen = self._shared.add(_SEEN, 1)
            while host and seen < self._shared.add(_CAME, 0) and time.monotonic() < deadline:
                time.sleep(0.1)
                seen = self._shared.add(_SEEN, 0)

    # What nodes tell each other of a round, the time from one meeting to the next

    def _round(self) -> Any:
        return self._store

    def _say(self, word: str) -> None:
        with suppress(*LOST):
            self._round().set(f"modelyard/{word}", "yes")

    def _said(self, word: str) -> bool:
        """Whether a node has said it of this round."""
        with suppress(*LOST):
            return bool(self._round().check([f"modelyard/{word}"]))
        return False


class End(NamedTuple):
    """How the job ended."""

    status: int
    orderly: bool
    """Whether all ranks left alike, so that every node ends by itself."""


_END, _CAME, _SEEN = "end", "came", "seen"
LOST = (RuntimeError, ValueError)
"""What torch raises where the store is gone."""


def _numbers(nodes: tuple[int, ...]) -> str:
    """`2 nodes`, `1 to 4 nodes`, `1, 2 or 4 nodes`."""
    if len(nodes) > 2 and nodes == tuple(range(nodes[0], nodes[-1] + 1)):
        return f"{nodes[0]} to {nodes[-1]} nodes"
    *rest, last = map(str, nodes)
    text = f"{', '.join(rest)} or {last}" if rest else last
    return f"{text} node" + ("" if nodes == (1,) else "s")
