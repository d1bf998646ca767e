"""`--nproc` and its company on the command line: which processes are to be started, and whether they can be laid out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from modelyard.config.layout import Problem, world_problems
from modelyard.errors import UserError
from modelyard.launch.process import end_with_parent
from modelyard.parallel.rank import number_of_processes, wait_for_the_main_process

if TYPE_CHECKING:
    from modelyard.config.loader import Loaded
    from modelyard.config.train import TrainConfig


@dataclass(frozen=True)
class Asked:
    """What the command line says about processes; None where it says nothing."""

    nproc: int | Literal["auto"] | None = None
    nnodes: tuple[int, int] | None = None
    """The fewest and the most nodes."""
    endpoint: str | None = None
    run_id: str | None = None
    restarts: int | None = None
    conf: Mapping[str, int] | None = None

    @property
    def given(self) -> list[str]:
        """The options that are there."""
        options = {
            "--nproc": self.nproc,
            "--nnodes": self.nnodes,
            "--rdzv-endpoint": self.endpoint,
            "--rdzv-id": self.run_id,
            "--max-restarts": self.restarts,
            "--rdzv-conf": self.conf,
        }
        return [name for name, value in options.items() if value is not None]

    @property
    def most_nodes(self) -> int:
        return 1 if self.nnodes is None else self.nnodes[1]


@dataclass(frozen=True)
class Node:
    """What is to be started on this machine, one node of a job."""

    processes: int
    """On this node, and on every other."""
    possible: tuple[int, ...] = (1,)
    """Numbers of nodes that the run can have, in order."""
    endpoint: str | None = None
    """HOST:PORT where the nodes meet; None for one alone."""
    run_id: str = "modelyard"
    """What tells one job from another at the same endpoint."""
    restarts: int = 0
    """How often all ranks may be started again after one has failed."""
    conf: Mapping[str, int] = field(default_factory=dict)
    """Settings of the meeting, with torchrun's names [seconds]."""

    @property
    def alone(self) -> bool:
        """Whether there can be no other node."""
        return self.endpoint is None


def processes_asked(asked: Asked) -> int | None:
    """How many processes are to be started on this node; None: none, this one does it alone. Raises UserError."""
    nproc = asked.nproc
    if nproc is None and asked.given:
        raise UserError(
            f"{asked.given[0]} needs --nproc N|auto, too: the processes that are started on each node"
        )
    if asked.nnodes is None:
        for name, value in (("--rdzv-endpoint", asked.endpoint), ("--rdzv-id", asked.run_id)):
            if value is not None:
                raise UserError(
                    f"{name} is where several nodes meet; add --nnodes N or MIN:MAX, or leave it out"
                )
    elif asked.endpoint is None and asked.most_nodes > 1:
        raise UserError(
            f"--nnodes {_nodes(asked.nnodes)} needs --rdzv-endpoint HOST:PORT, the same on every node: one of them "
            "that the others reach, and a port that is free there (29500, say)"
        )
    if nproc != "auto":
        return nproc
    from modelyard.launch.torchrun import automatic

    found = automatic()
    return found if found > 1 or len(asked.given) > 1 else None


def laid_out(load: Callable[[], Loaded], asked: Asked) -> tuple[Loaded, Node | None]:
    """What `load` gives, checked for the number of processes there are or are to be started; and what is to be started.

    Raises UserError, in one process of a job before the others.
    """
    started = "WORLD_SIZE" in os.environ
    if started and asked.given:
        raise UserError(
            f"{asked.given[0]} starts processes, and torchrun has started this one; leave one of the two out"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
        _warn_of_the_shared_store()
    try:
        processes = processes_asked(asked)
        loaded = load()
        world = number_of_processes() if processes is None else processes * asked.most_nodes
        problems = world_problems(loaded.train, world)
        if loaded.train.model.multi_stage.cpu_offload and not (processes or started):
            problems.append(_ALONE)
        if problems:
            hint = [] if processes is None else _other_nodes(loaded.train, processes, asked)
            raise UserError(*loaded.placed(problems), *hint)
    except UserError:
        wait_for_the_main_process()  # all have read the same
        raise
    return loaded, None if processes is None else _node(loaded.train, processes, asked)


def _warn_of_the_shared_store() -> None:
    """Of several nodes none can come back: torchrun's default store tells newcomers nothing, and others what is no more.

    (https://github.com/pytorch/pytorch/issues/135712; with --nproc the ranks have a store of their own.)
    """
    says = os.environ.get
    restarts = (
        says("TORCHELASTIC_USE_AGENT_STORE") == "True" and says("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    )
    if restarts and says("GROUP_WORLD_SIZE", "1") != "1" and says("RANK") == "0":
        print(
            "warning: restarts on several nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment, "
            "on every node (docs/elastic.md)",
            file=sys.stderr,
        )


def _node(config: TrainConfig, processes: int, asked: Asked) -> Node:
    fewest, most = asked.nnodes or (1, 1)
    return Node(
        processes,
        possible=tuple(n for n in range(fewest, most + 1) if not world_problems(config, n * processes)),
        endpoint=asked.endpoint,
        # Two runs that were given the same endpoint by mistake do not become one.
        run_id=asked.run_id or str(config.run.experiment_dir),
        restarts=asked.restarts or 0,
        conf=asked.conf or {},
    )


def _other_nodes(config: TrainConfig, processes: int, asked: Asked) -> list[str]:
    """Which numbers of nodes are possible, where several were asked for."""
    if asked.nnodes is None or asked.most_nodes == 1:
        return []
    possible = [n for n in range(1, 2 * asked.most_nodes) if not world_problems(config, n * processes)]
    said = f"--nnodes {_nodes(asked.nnodes)} with --nproc {processes}"
    if not possible:
        return [
            f"{said}: no number of nodes up to {2 * asked.most_nodes - 1} is possible with so many processes each"
        ]
    return [f"{said}: numbers of nodes that are possible: {', '.join(map(str, possible))}"]


def _nodes(nnodes: tuple[int, int]) -> str:
    fewest, most = nnodes
    return str(most) if fewest == most else f"{fewest}:{most}"


_ALONE: Problem = (
    "model.multi_stage.cpu_offload",
    "yes needs processes that torchrun starts, be it one: --nproc 1",
)
