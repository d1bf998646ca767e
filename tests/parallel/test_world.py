"""What processes agree on, and that they fail as one."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from modelyard.errors import RunFailed, UserError
from modelyard.parallel import rank as rank_module
from modelyard.parallel import world as world_module
from modelyard.parallel.rank import number_of_processes, rank, wait_for_the_main_process
from modelyard.parallel.world import World, connected
from tests.parallel.processes import run_distributed


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def connect() -> World:
    with connected(backend="gloo", timeout=30, traces=Path("unused")) as world:
        return world


def test_alone_every_question_is_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")  # of something else
    with connected(backend="nccl", timeout=30, traces=Path("unused")) as world:
        assert (world.rank, world.size, world.is_main, world.is_alone) == (0, 1, True, True)
        assert (world.tell(5), world.largest(7), world.gather("a")) == (5, 7, ["a"])
        with pytest.raises(ValueError, match="as it is"), world.together():
            raise ValueError("as it is")
        assert not dist.is_initialized()
    assert (rank(), number_of_processes()) == (0, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            r"WORLD_SIZE=2 but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start the run with",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "0",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "1",
            },
            r"backend: nccl needs a GPU",
        ),
    ],
)
def test_an_environment_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match=message),
        connected(backend="nccl", timeout=1, traces=Path("unused")),
    ):
        pass


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("WORLD_SIZE", "two", "at least 1"),
        ("WORLD_SIZE", "0", "at least 1"),
        ("RANK", "2", "from 0 to 1"),
        ("RANK", "-1", "from 0 to 1"),
        ("LOCAL_RANK", "first", "at least 0"),
        ("MASTER_PORT", "0", "from 1 to 65535"),
        ("MASTER_PORT", "65536", "from 1 to 65535"),
        ("MASTER_PORT", "http", "from 1 to 65535"),
    ],
)
def test_numbers_in_the_environment_that_are_none(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, allowed: str
) -> None:
    good = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, text in {**good, variable: value}.items():
        monkeypatch.setenv(name, text)
    with (
        pytest.raises(UserError) as refusal,
        connected(backend="gloo", timeout=1, traces=Path("unused")),
    ):
        pass
    assert str(refusal.value) == (
        f"the environment has {variable}={value}, where a whole number {allowed} is expected; start the run with torchrun "
        "or --nproc, or unset WORLD_SIZE"
    )


@pytest.mark.parametrize("late", [True, False])
def test_the_main_process_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], late: bool
) -> None:
    port = free_port()
    good = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, text in {**good, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(world_module, "QUIET", 0.1 if late else 60.0)
    with (
        pytest.raises(RunFailed),
        connected(backend="gloo", timeout=0.5, traces=Path("unused")),
    ):
        pass
    word = f"waiting for 2 processes at localhost:{port}, at most 0.5 s (model.distributed.timeout)\n"
    assert capsys.readouterr().err.count(word) == int(late)


def test_others_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expected = r"the 2 processes of the job did not find each other within 0.5 s \(model.distributed.timeout\): rank 0: "
    with (
        pytest.raises(RunFailed, match=expected),
        connected(backend="gloo", timeout=0.5, traces=Path("unused")),
    ):
        pass
    assert not dist.is_initialized()


def test_only_the_main_process_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(rank_module.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        wait_for_the_main_process()
    assert waited == [rank_module.LAST_WORD]


def exchange() -> dict[str, object]:
    import torch

    world = connect()
    me = world.rank
    answers: dict[str, object] = {
        "told": world.tell({"from": me}),
        "largest": world.largest(10 * me),
        "gathered": world.gather(str(me)),
        "messages": world.messages,
    }
    if me == 1:
        world.send(torch.arange(3.0), to=0)
    elif me == 0:
        answers["received"] = world.receive(torch.empty(3), sender=1).tolist()
    return answers


def test_what_is_said_arrives() -> None:
    answers = run_distributed(exchange, 3)
    for answer in answers:
        assert answer["told"] == {"from": 0}
        assert answer["largest"] == 20
        assert answer["gathered"] == ["0", "1", "2"]
        assert answer["messages"] == 3
    assert answers[0]["received"] == [0.0, 1.0, 2.0]


def fail_together(world: World, ranks: tuple[int, ...], *problems: str) -> None:
    with world.together():
        if world.rank in ranks:
            cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise UserError(*problems, f"rank {world.rank}") from cause


def fail() -> list[str]:
    world = connect()
    with pytest.raises(UserError) as of_one:
        fail_together(world, (2,), "several", "lines")
    with pytest.raises(UserError) as of_two:
        fail_together(world, (1, 2))
    fail_together(world, ())
    assert of_two.value is world.agreed
    cause = of_two.value.__cause__
    assert isinstance(cause, OSError)
    return [*of_one.value.problems, str(of_two.value), errno.errorcode[cause.errno or 0]]


def test_a_failure_of_one_is_the_failure_of_all() -> None:
    expected = ["several", "lines", "rank 2", "rank 1", "ENOSPC"]
    assert run_distributed(fail, 3) == [expected] * 3


def test_nccl_is_asked_to_remember_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has set stays."""
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    environment = {
        "WORLD_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with connected(backend="gloo", timeout=30, traces=Path("run/logs")) as world:
        assert (world.rank, world.size, world.is_alone) == (0, 1, False)
        assert dist.get_backend() == "gloo"
    assert not dist.is_initialized()
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "run/logs/nccl-"
