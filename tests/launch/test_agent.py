"""What is added to torch's agent, where no processes are needed to see it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from modelyard.launch import agent as module
from modelyard.launch.agent import Agent, End, _numbers
from modelyard.launch.command import Node
from modelyard.launch.rank import RankFiles
from modelyard.launch.signals import Signals, Stopped


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def agent(folder: Path, store: dist.Store, restarts: int = 2, possible: tuple[int, ...] = (1, 2, 4)) -> Agent:
    """Of a node with two processes, ranks 2 and 3, among others."""
    node = Node(2, possible, "127.0.0.1:29500", restarts=restarts)
    spec = WorkerSpec("role", 2, SimpleNamespace(), entrypoint="python", max_restarts=restarts)  # type: ignore[arg-type]
    found = Agent(spec, node, store, folder=folder, words=[], signals=Signals())
    found._store = dist.PrefixStore("round", store)  # type: ignore[assignment]
    found.ranks = {rank: RankFiles(folder, rank) for rank in (2, 3)}
    return found


def test_numbers_of_nodes() -> None:
    assert [_numbers(nodes) for nodes in ((1,), (2,), (1, 2), (1, 2, 4), (2, 3, 4))] == [
        "1 node", "2 nodes", "1 or 2 nodes", "1, 2 or 4 nodes", "2 to 4 nodes"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "worlds"),
    [
        (4, [([0, 1], 8), ([2, 3], 8), ([4, 5], 8), ([6, 7], 8)]),
        (3, [([0, 1], 4), ([2, 3], 4), ([], None)]),
        (1, [([0, 1], 2)]),
    ],
)
def test_nodes_that_the_layout_cannot_use_have_no_ranks(
    tmp_path: Path, store: dist.Store, nodes: int, worlds: list[tuple[list[int], int | None]]
) -> None:
    here = agent(tmp_path, store)
    spec = here._worker_group.spec
    for other in range(nodes):  # what they write before the first of them deals out ranks
        words = {"role": "role", "rank": other, "local_world_size": 2}
        store.set(f"torchelastic/role_info/{other}", json.dumps(words))
    for group_rank, (ranks, world) in enumerate(worlds):
        workers = here._assign_worker_ranks(store, group_rank, nodes, spec)
        assert [worker.global_rank for worker in workers] == ranks
        assert {worker.world_size for worker in workers} == ({world} if ranks else set())


def test_nodes_meet_again_when_one_went(
    tmp_path: Path, store: dist.Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meetings = []

    def meet(_self: Any, _group: Any) -> None:
        meetings.append(1)
        if len(meetings) % 3:
            raise dist.DistStoreError("wait timeout after 60000ms")

    monkeypatch.setattr(LocalElasticAgent, "_rendezvous", meet)
    here = agent(tmp_path, store)
    here._rendezvous(here._worker_group)
    assert len(meetings) == 3
    said = "a node went while ranks were dealt out; once more\n"
    assert capsys.readouterr().err == f"waiting for 1, 2 or 4 nodes at 127.0.0.1:29500\n{said}{said}"
    monkeypatch.setattr(module, "MEETINGS", 2)
    with pytest.raises(dist.DistStoreError):
        here._rendezvous(here._worker_group)
    here.signals.first = 15
    with pytest.raises(Stopped):
        here._rendezvous(here._worker_group)
    assert len(meetings) == 5


def failed(here: Agent, **codes: int) -> RunResult:
    """What the agent makes of ranks that left with these exit codes."""
    here.failures = {int(rank[-1]): code for rank, code in codes.items()}
    failures = {rank: ProcessFailure(rank, 1, code, "") for rank, code in here.failures.items()}
    return here._judged(RunResult(WorkerState.FAILED, failures=failures))


def test_which_failures_are_final(
    tmp_path: Path, store: dist.Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "MOMENT", 0.0)
    here = agent(tmp_path, store, restarts=2)
    assert failed(here, rank3=-9).state == WorkerState.FAILED
    assert (here._remaining_restarts, here.end(now=True)) == (2, None)  # the agent counts
    assert "restarting (1 of 2): rank 3 was killed by SIGKILL" in capsys.readouterr().err
    assert here._said("failed")
    here.ranks[2].say_farewell(2)
    assert failed(here, rank2=2).state == WorkerState.FAILED
    assert (here._remaining_restarts, here.end(now=True)) == (0, End(2, orderly=False))
    assert capsys.readouterr().err == ""


def test_a_node_whose_ranks_lost_others_hears_why(
    tmp_path: Path, store: dist.Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That the job is over, or that ranks are saving for a node that came."""
    here, there = agent(tmp_path, store), agent(tmp_path, store)
    here.ranks[2].say_farewell(1)
    there._say("regroup")
    assert failed(here, rank2=1).state == WorkerState.HEALTHY
    here._store = dist.PrefixStore("another round", store)  # type: ignore[assignment]
    there.failures = {3: -11}
    there._end(orderly=False)
    assert failed(here, rank2=1).state == WorkerState.FAILED
    assert (here.elsewhere, here._remaining_restarts) == (End(139, orderly=False), 0)
    assert capsys.readouterr().err == ""


def test_ranks_that_still_wait_are_ended_with_the_job(
    tmp_path: Path, store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        LocalElasticAgent, "_monitor_workers", lambda _self, _group: RunResult(WorkerState.HEALTHY)
    )
    here, there = agent(tmp_path, store), agent(tmp_path, store)
    assert here._monitor_workers(here._worker_group).state == WorkerState.HEALTHY
    there.ranks[3].say_farewell(2)
    there.failures = {3: 2}
    there._end(orderly=False)
    assert here._monitor_workers(here._worker_group).state == WorkerState.HEALTHY  # it has looked just now
    here._looked = 0.0
    assert here._monitor_workers(here._worker_group).state == WorkerState.FAILED
    assert (here.elsewhere, here._remaining_restarts) == (End(2, orderly=False), 0)


def test_ranks_that_a_signal_killed_before_they_could_save_are_not_restarted(
    tmp_path: Path, store: dist.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    here = agent(tmp_path, store)
    here.signals.first = 10
    assert failed(here, rank2=-10).state == WorkerState.FAILED
    assert (here._remaining_restarts, here.end(now=True)) == (0, End(138, orderly=False))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("signum", [1, 2, 10, 15])
def test_a_rank_that_was_told_to_leave_before_it_could_listen_is_not_restarted(
    tmp_path: Path, store: dist.Store, signum: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal came to the rank alone, and its default action killed it."""
    here = agent(tmp_path, store)
    assert failed(here, rank3=-signum).state == WorkerState.FAILED
    assert (here._remaining_restarts, here.end(now=True)) == (0, End(128 + signum, orderly=False))
    assert capsys.readouterr().err == ""


def test_a_failure_on_the_way_out_does_not_start_a_run_again_that_is_over(
    tmp_path: Path, store: dist.Store
) -> None:
    here, there = agent(tmp_path, store), agent(tmp_path, store)
    for files in there.ranks.values():
        files.say_farewell(0)
    there._end(orderly=True)
    assert failed(here, rank2=-9).state == WorkerState.SUCCEEDED  # to the exit, where the others wait


def test_the_node_with_the_store_stays_until_all_have_seen_the_end(
    tmp_path: Path, store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINGER", 60.0)
    here, there = agent(tmp_path, store), agent(tmp_path, store)
    waiting = threading.Thread(target=here.linger, kwargs={"host": True})
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    there.linger(host=False)  # returns at once
    waiting.join(10)
    assert not waiting.is_alive()
    monkeypatch.setattr(module, "LINGER", 0.2)
    agent(tmp_path, store).linger(host=True)
    here.linger(host=True)  # one was killed: not for ever
