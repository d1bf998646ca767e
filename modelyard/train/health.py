"""Whether several processes still hold the same weights and count alike, and whether one of them keeps the others waiting."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from torch import Tensor

from modelyard.errors import RunFailed
from modelyard.files import numbered_folders
from modelyard.launch.process import a_restart_may_mend
from modelyard.parallel.replicas import Along, copied, differing, digest, hashes, odd_ones
from modelyard.train.build import compiles
from modelyard.train.schedule import learning_rate
from modelyard.train.slow_rank import SlowRanks, Speed, Stopwatch

if TYPE_CHECKING:
    from modelyard.train.state import Run

_MOST = 4
"""Ranks or names that a message has."""


class Report(NamedTuple):
    """What a process tells the others in a check, of one size whatever the model's."""

    facts: str
    """Digest of what all must have alike."""
    copies: dict[Along, str]
    """Digests of what it has a copy of, as `differing` takes them."""
    speed: Speed | None


class Details(NamedTuple):
    """What it tells them where they differ."""

    host: str
    facts: Mapping[str, Any]
    hashes: Mapping[Along, Mapping[str, int]]
    """By name, of the copies that differ."""


class Health:
    """Compares the processes of a run every `training.health.interval` iterations, after the first step of every start and
    before each checkpoint and export; one process has nothing to compare."""

    def __init__(self, run: Run):
        self._run, self._world, self._settings = run, run.world, run.config.training.health
        self._is_off = run.world.size == 1 or self._settings.interval is None
        # Without sequence parallelism each tensor-parallel process works out the gradients of norms for itself. Compiled
        # for a GPU, sums may be cut otherwise in each (by what was faster there), and the last bits go their own ways.
        alike = run.mesh.layout.sequence_parallel or run.device.type == "cpu"
        alike = alike or not compiles(run.config, run.device)
        self._copied = copied(run.parallel, without=() if alike else ("tensor",))
        self._at = run.progress.iteration
        """The iteration, counted here: it must not be this process alone that finds a check due."""
        self._equal: int | None = None
        """The last iteration after which all were found equal, since this start."""
        self._stopwatch = Stopwatch(run.device)
        factor = self._settings.slow_rank_factor
        self._slow_ranks = None if factor is None else SlowRanks(factor)

    def check(self, seconds: float, data_wait: float) -> None:
        """Called by all processes after each step, with how long it took and how much of that its batch was waited for [s].

        Where it is due: raises RunFailed in all of them where they differ, and says so where one is slow.
        """
        if self._is_off:
            return
        self._stopwatch.add(seconds, data_wait)
        self._at += 1
        if self._run.went_back:
            self._at, self._equal = self._run.progress.iteration, None
        due = self._settings.due(self._at)
        if due or self._equal is None:
            self._compare(with_speed=due and self._slow_ranks is not None)

    def compare(self) -> None:
        """Called by all processes before they write what is kept: raises RunFailed in all of them where they differ."""
        if not self._is_off and self._equal != self._at:
            self._compare()

    def _compare(self, *, with_speed: bool = False) -> None:
        facts = self._facts()
        found = {along: hashes(self._tensors(names)) for along, names in self._copied.items()}
        report = Report(
            digest(facts),
            {along: digest(values) for along, values in found.items()},
            self._stopwatch.read() if with_speed else None,
        )
        reports = self._world.gather(report)
        groups = differing(self._run.mesh.layout, [report.copies for report in reports])
        unlike = len({report.facts for report in reports}) > 1
        if unlike or groups:
            self._fail(facts if unlike else {}, groups, found)
        self._equal = self._at
        speeds = [report.speed for report in reports if report.speed is not None]
        if self._slow_ranks is not None and speeds:
            self._say_slow(self._slow_ranks, speeds)

    def _facts(self) -> dict[str, Any]:
        """What every process must have alike, in whatever layout."""
        run = self._run
        steps = run.optimizer.steps
        return {
            **dataclasses.asdict(run.progress),
            "optimizer_steps": steps,
            "learning_rate": learning_rate(run.config.optimizer.learning_rate, steps + 1),
            "data_fingerprint": run.stream.fingerprint,
            "spikes": digest(run.spikes.state_dict()),
        }

    def _tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What a checkpoint holds of these parameters, as it lies here."""
        found: dict[str, Tensor] = {}
        for name in names:
            found[name] = self._run.weights.master[name].detach()
            found |= self._run.optimizer.held(name)
        return found

    # Where they differ

    def _fail(
        self,
        facts: Mapping[str, Any],
        groups: Mapping[Along, Sequence[Mapping[int, str]]],
        found: Mapping[Along, Mapping[str, int]],
    ) -> NoReturn:
        run, rank = self._run, self._world.rank
        asked = {along: found[along] for along, members in groups.items() if any(rank in g for g in members)}
        told = self._world.gather(Details(socket.gethostname(), facts, asked))
        ranks, tensors, problems = set[int](), list[str](), list[str]()
        if facts:
            at_fault, problem = _unlike_facts(told)
            ranks |= set(at_fault)
            problems.append(problem)
        if groups:
            at_fault, tensors, problem = _unlike_copies(told, groups)
            ranks |= set(at_fault)
            problems.append(problem)
        since = "" if self._equal is None else f"; all were equal after iteration {self._equal}"
        with suppress(RunFailed):  # a save that failed has been said
            run.land()
        directory = run.folder / "checkpoint"
        before = self._world.tell(numbered_folders(directory))
        kept = f"checkpoint {before[-1]} is untouched" if before else "there is no checkpoint yet"
        text = (
            f"iteration {self._at}: {'; '.join(problems)}{since}; {kept}: start again with the same command, and if "
            "that names the same rank, suspect its host's memory, GPU and network, and leave it out"
        )
        run.events.add(
            "diverged",
            self._at,
            text,
            say=False,
            ranks=sorted(ranks),
            hosts=[told[rank].host for rank in sorted(ranks)],
            tensors=tensors[:100],
            last_equal=self._equal,
        )
        a_restart_may_mend()
        raise RunFailed(text)

    # Where one is slow

    def _say_slow(self, slow_ranks: SlowRanks, speeds: Sequence[Speed]) -> None:
        newly, no_longer = slow_ranks.judge(speeds)
        if not newly and not no_longer:
            return
        hosts = self._world.gather(Details(socket.gethostname(), {}, {}))
        for slow in newly:
            text = f"warning: {slow.words.format(_named(slow.rank, hosts))}"
            facts: dict[str, Any] = {"rank": slow.rank, "host": hosts[slow.rank].host, "why": slow.why}
            self._run.events.add("slow_rank", self._at, text, **facts, factor=round(slow.factor, 2))
        for rank, why in no_longer:
            text = f"{_named(rank, hosts)} no longer keeps the others waiting ({why})"
            self._run.events.add(
                "slow_rank", self._at, text, rank=rank, host=hosts[rank].host, why=why, factor=1.0
            )


def _unlike_facts(told: Sequence[Details]) -> tuple[list[int], str]:
    """The ranks that have other facts than the rest, or all, and that in words."""
    votes = {rank: repr(details.facts) for rank, details in enumerate(told)}
    at_fault, _ = odd_ones([votes])
    keys = [key for key in told[0].facts if len({repr(details.facts[key]) for details in told}) > 1]

    def has(rank: int) -> str:
        return " and ".join(f"{key} {told[rank].facts[key]}" for key in keys)

    words = [f"{_named(rank, told)} has {has(rank)}" for rank in at_fault]
    if rest := votes.keys() - set(at_fault):
        words.append(f"the others have {has(min(rest))}")
    return at_fault, f"the processes no longer agree where they are: {_some(words)}"


def _unlike_copies(
    told: Sequence[Details], groups: Mapping[Along, Sequence[Mapping[int, str]]]
) -> tuple[list[int], list[str], str]:
    """The ranks whose copies are wrong, or may be; the names that differ; both in words."""
    at_fault, sure = odd_ones([group for members in groups.values() for group in members])
    names: dict[str, None] = {}
    for along, members in groups.items():
        for group in members:
            copies = [told[rank].hashes[along] for rank in group]
            names |= {name: None for name in copies[0] if len({copy[name] for copy in copies}) > 1}
    who = _some([_named(rank, told) for rank in at_fault])
    if sure:
        have = "has" if len(at_fault) == 1 else "have"
        words = f"{who} {have} other bits than the others that hold the same weights, in {_some(list(names))}"
    else:
        words = f"{who} hold copies of the same weights, which differ in {_some(list(names))}: nothing tells which is right"
    return at_fault, list(names), words


def _named(rank: int, told: Sequence[Details]) -> str:
    return f"rank {rank} ({told[rank].host})"


def _some(things: Sequence[str]) -> str:
    """The first few in words, and how many more there are."""
    few = list(things[:_MOST])
    if more := len(things) - len(few):
        few.append(f"{more} more")
    return " and ".join([*([", ".join(few[:-1])] if len(few) > 1 else []), few[-1]])
