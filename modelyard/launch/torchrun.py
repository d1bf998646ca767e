"""`--nproc N`: N processes of this program on this machine, one node of a job, started and watched by torchrun's agent."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.errors import RunFailed
from modelyard.launch.command import Node
from modelyard.launch.ending import how_it_ended, say, unsaid
from modelyard.launch.meeting import endpoint_of, is_here, own_address, wait_for_host
from modelyard.launch.signals import Signals, Stopped

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.distributed.elastic.rendezvous import RendezvousHandler

    from modelyard.launch.agent import Agent, End

JOIN = 600
"""Seconds that a node waits for the others, unless `conf` has join_timeout."""


def automatic() -> int:
    """Processes that `--nproc auto` means: one for each GPU, or one."""
    with _without_warnings():
        import torch

    return max(1, torch.cuda.device_count())


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Around the first import of torch: it says little of a store that goes with its node, which is said here in a line.

    The ranks' torch is not meant.
    """
    name = "TORCH_CPP_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "FATAL"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def launch(node: Node, module: str, words: Sequence[str]) -> int:
    """Run `python -m module words` in the job's processes on this node; the exit status of the first that failed for good
    (128 + n for signal n).

    Rank 0 has its node's output. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on, and the ranks decide; if this process is
    killed, so are they (on Linux). Raises RunFailed where the processes cannot be started, or the nodes do not meet.
    """
    folder, signals = Path(tempfile.mkdtemp(prefix="modelyard-")), Signals()
    try:
        with signals.passed_on():
            return _run_agent(node, folder, [module, *words], signals)
    except Stopped as stopped:
        return 128 + stopped.signum
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_agent(node: Node, folder: Path, words: list[str], signals: Signals) -> int:
    """The ranks from their start to their end, restarts between them."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // node.processes)))
    # The ranks' store is their own: one that they share with the agent outlives a restart, with the addresses of the dead
    # (https://github.com/pytorch/pytorch/issues/135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # The agent would stop the ranks at the others, and count to 30.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    with _without_warnings():
        from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.rendezvous import (
        RendezvousClosedError,
        RendezvousError,
        RendezvousTimeoutError,
    )

    from modelyard.launch.agent import Agent

    # What it says about processes that end, `how_it_ended` says in a line.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with signals.without_ranks():
            handler, store, address, host = _meeting(node)
        spec = WorkerSpec(
            role="default_role",
            local_world_size=node.processes,
            entrypoint=sys.executable,
            args=("-m", "modelyard.launch.rank"),  # and what the agent adds, for each start its own
            rdzv_handler=handler,
            max_restarts=node.restarts,
            monitor_interval=0.1,
            local_addr=address,
        )
        agent = Agent(spec, node, store, folder=folder, words=words, signals=signals)
        try:
            with suppress(RendezvousClosedError):  # the job is over
                agent.run()
        except (Stopped, SignalException):
            raise  # the others may go on
        except BaseException:
            handler.shutdown()
            raise
        handler.shutdown()
    except SignalException as error:
        raise Stopped(error.sigval) from None
    except RendezvousTimeoutError:
        limit = node.conf.get("join_timeout", JOIN)
        raise RunFailed(
            f"{node.possible[0]} nodes did not meet at {node.endpoint} within {limit} s; is the same command running on each? "
            "(--rdzv-conf join_timeout=SECONDS waits longer)"
        ) from None
    except RendezvousError as error:
        raise RunFailed(
            f"lost contact with {node.endpoint}, where the nodes meet: the node that has it must live as long as the run"
        ) from error
    except (OSError, RuntimeError) as error:
        raise RunFailed(f"{node.processes} processes cannot be started: {error}") from error
    end = agent.elsewhere or (None if agent.ranks else agent.end(now=True))
    if not node.alone:
        agent.linger(host=host)
    return _farewell(node, agent, signals, end)


def _meeting(node: Node) -> tuple[RendezvousHandler, Store, str, bool]:
    """Where the nodes meet, the store they share, this node's address, and whether it has the store."""
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    endpoint, address, hosts = "localhost:0", "localhost", [True]  # a free port
    if node.endpoint is not None:
        endpoint, place = node.endpoint, endpoint_of(node.endpoint)
        address = own_address(place)
        # Another launcher on this machine may have opened it already.
        hosts = [True, False] if is_here(place.host) else [False]
        if not hosts[0]:
            wait_for_host(place, node.conf.get("join_timeout", JOIN))
    for host in hosts:
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=endpoint,
            # torch makes a folder of this name among its logs: one name, and no path.
            run_id=re.sub(r"[^\w.-]+", "-", node.run_id),
            min_nodes=node.possible[0],
            max_nodes=node.possible[-1],
            local_addr=address,
            is_host=host,
            **node.conf,
        )
        try:
            backend, store = create_backend(parameters)
        except RendezvousConnectionError:
            if host == hosts[-1]:
                raise RunFailed(
                    f"{node.endpoint} is not where nodes meet: another program has that port; choose another in "
                    "--rdzv-endpoint, on every node"
                ) from None
        else:
            return create_handler(store, backend, parameters), store, address, host
    raise AssertionError


def _farewell(node: Node, agent: Agent, signals: Signals, end: End | None) -> int:
    """The exit status, having said why where the screen does not show it; `end` where it was not these ranks' own."""
    if agent.ranks and end is None:
        status = agent.status
        obeyed = signals.first and status == 128 + signals.first
        if agent.failures and unsaid(agent.ranks, agent.failures) and not obeyed:
            say(f"error: {how_it_ended(agent.ranks, agent.failures)}")
        return status
    if end is None:
        raise RunFailed(f"the job at {node.endpoint} is over, and nothing says how")
    if end.orderly:
        say("the job is over, without ranks on this node at its end")
    else:
        say(f"error: the job ended with status {end.status} on another node, which says why")
    return end.status


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
