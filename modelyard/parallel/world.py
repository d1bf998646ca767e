"""The processes of a job: how they find each other, what they must agree on, how they part.

What is said here goes between hosts over gloo, whatever the tensors of a step travel by, and may wait long: the others
wait while the main process writes a manifest.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from modelyard.errors import RunFailed, UserError
from modelyard.launch.process import a_restart_may_mend
from modelyard.parallel.rank import (
    local_rank,
    main_address,
    number_of_processes,
    rank,
    wait_for_the_main_process,
)
from modelyard.parallel.torch_private import default_store

T = TypeVar("T")

PATIENCE = 1800.0
"""Seconds that processes wait at least for one that saves, exports or reads, before they give it up."""

QUIET = 10.0
"""Seconds that the main process waits for the others to come before it says so."""


class World:
    """The processes of a job as equals that have to do the same; alone, every question is answered at once."""

    def __init__(
        self,
        number: int = 0,
        size: int = 1,
        group: Any = None,
        *,
        board: Any = None,
        patience: float = PATIENCE,
    ):
        self.rank, self.size = number, size
        self.group: dist.ProcessGroup | None = group
        """For what is said between hosts; None alone."""
        self.patience = patience
        """Seconds that one of them may take to answer."""
        self._twins: list[World] = []
        self._board: dist.Store | None = board
        self.messages = 0
        """Exchanged so far: a sign of life."""
        self.agreed: BaseException | None = None
        """The last failure that every process has."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that talks to people and writes what there is one of."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to ask: a process that torchrun did not start."""
        return self.group is None

    def twin(self) -> World:
        """The same processes over a group of its own, for a thread beside this one. All must call it alike."""
        if self.group is None:
            return World()
        twin = World(self.rank, self.size, _group(self.patience), patience=self.patience)
        self._twins.append(twin)
        return twin

    @property
    def signs_of_life(self) -> int:
        """Messages exchanged so far, here and beside."""
        return self.messages + sum(twin.messages for twin in self._twins)

    def part(self) -> None:
        """Let go of the groups, before they are destroyed."""
        for world in (self, *self._twins):
            world.group = world._board = None

    def tell(self, value: T) -> T:
        """What the main process passes; what the others pass is not looked at."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group, device=torch.device("cpu"))
        self.messages += 1
        return values[0]

    def post(self, key: str) -> None:
        """Put up a word that the others can see without being asked; nobody waits for it. Alone nothing happens."""
        if self._board is not None:
            with suppress(RuntimeError):  # the one who keeps the board is gone: then all will be soon
                self._board.set(f"modelyard: {key}", "")

    def is_posted(self, key: str) -> bool:
        """Whether any process has put up this word."""
        if self._board is None:
            return False
        with suppress(RuntimeError):
            return self._board.check([f"modelyard: {key}"])
        return False

    def largest(self, number: int) -> int:
        """The largest of what the processes pass."""
        if self.group is None:
            return number
        tensor = torch.tensor([number])
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        self.messages += 1
        return int(tensor)

    def gather(self, value: T) -> list[T]:
        """What each process passes, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        self.messages += 1
        return cast(list[T], values)

    def send(self, tensor: Tensor, *, to: int) -> None:
        """Give a tensor on the CPU to the process `to`, which waits for it with `receive`."""
        dist.send(tensor, to, group=self.group)
        self.messages += 1

    def receive(self, tensor: Tensor, *, sender: int) -> Tensor:
        """Fill `tensor`, on the CPU, with what `sender` gives."""
        dist.recv(tensor, sender, group=self.group)
        self.messages += 1
        return tensor

    @contextmanager
    def together(self) -> Iterator[None]:
        """Go on from the block only when every process has come through it.

        A UserError, RunFailed or OSError of one of them is raised in all, that of the lowest rank. Inside nobody may wait
        for another process: one that failed does not answer.
        """
        failure: BaseException | None = None
        try:
            yield
        except (UserError, RunFailed, OSError) as error:
            if self.group is None:
                raise
            failure = error
        if self.largest(int(failure is not None)):
            # Pickling drops an exception's cause, in which a full disk is named.
            found = self.gather(None if failure is None else (failure, failure.__cause__))
            self.agreed, cause = next(pair for pair in found if pair is not None)
            raise self.agreed from cause


@contextmanager
def connected(*, backend: str, timeout: float, traces: Path) -> Iterator[World]:
    """While entered, this process is one of those that torchrun started; a process without torchrun stays alone.

    `backend` is `gloo`, `nccl`, or `auto` for what fits the device; `timeout` [seconds] is how long a collective of a
    step waits for the others. Where NCCL gives up it writes what every rank was doing into files `traces`/nccl-N.
    Raises UserError where the environment is not whole, RunFailed where the others do not come.
    """
    if dist.is_initialized():
        yield _world(timeout)
        return
    if "WORLD_SIZE" not in os.environ:
        yield World()
        return
    missing = [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise UserError(
            f"the environment has WORLD_SIZE={os.environ['WORLD_SIZE']} but not {', '.join(missing)}: start the run with "
            "torchrun or --nproc, or unset WORLD_SIZE"
        )
    for check in (number_of_processes, rank, local_rank, main_address):
        check()
    _record_flights(traces)
    _find_each_other(_backend(backend), timeout)
    world = _world(timeout)
    try:
        yield world
    except (UserError, RunFailed):
        _part(world)
        wait_for_the_main_process()  # which has the same to say
        raise
    finally:
        _part(world)


def _part(world: World) -> None:
    # Nobody may hold a group when the interpreter ends: its threads would outlive what they need.
    world.part()
    if dist.is_initialized():
        dist.destroy_process_group()


def _backend(wanted: str) -> str:
    """As `init_process_group` takes it; hosts always have gloo."""
    if wanted == "gloo" and torch.cuda.is_available():
        raise UserError(
            "model.distributed.backend: gloo is for CPUs, and torch sees a GPU; write auto, or hide the GPU with "
            "CUDA_VISIBLE_DEVICES= in front of the command"
        )
    if not torch.cuda.is_available():
        if wanted == "nccl":
            raise UserError(
                "model.distributed.backend: nccl needs a GPU, and torch sees none; write gloo or auto"
            )
        return "gloo"
    local, devices = local_rank(), torch.cuda.device_count()
    if local >= devices:
        raise UserError(
            f"{os.environ.get('LOCAL_WORLD_SIZE', local + 1)} processes on this machine need a GPU each, and torch sees "
            f"{devices}; start fewer, or hide the GPUs with CUDA_VISIBLE_DEVICES= in front of the command"
        )
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def _record_flights(traces: Path) -> None:
    """Have NCCL remember its last collectives, and write them down when one of them is late."""
    for name, value in {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(traces / "nccl-"),
    }.items():
        os.environ.setdefault(name, value)


def _find_each_other(backend: str, timeout: float) -> None:
    limit = timedelta(seconds=timeout)
    waiting = threading.Timer(QUIET, _say_what_is_waited_for, [timeout])
    waiting.daemon = True
    if rank() == 0:
        waiting.start()
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=limit))
        # After a restart the agent's store still has the addresses of the processes that died
        # (https://github.com/pytorch/pytorch/issues/135712). A store of the ranks' own, as --nproc has it, has not, and
        # nodes count their restarts each for itself.
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if shared else "0"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=number,
            world_size=size,
            timeout=limit,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        a_restart_may_mend()
        raise RunFailed(
            f"the {number_of_processes()} processes of the job did not find each other within {timeout:g} s "
            f"(model.distributed.timeout): rank {rank()}: {reason}"
        ) from error
    finally:
        waiting.cancel()


def _say_what_is_waited_for(timeout: float) -> None:
    print(
        f"waiting for {number_of_processes()} processes at {main_address()}, at most {timeout:g} s "
        "(model.distributed.timeout)",
        file=sys.stderr,
        flush=True,
    )


def _world(timeout: float) -> World:
    patience = max(10 * timeout, PATIENCE)
    group = _group(patience)
    return World(dist.get_rank(), dist.get_world_size(), group, board=default_store(), patience=patience)


def _group(patience: float) -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
