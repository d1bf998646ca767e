"""A checkpoint is written while training goes on: the same bytes, one at a time, its failure seen and counted."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelyard.train.state as state_module
from modelyard.errors import RunFailed, UserError
from modelyard.files import synced_facts
from modelyard.parallel.world import World
from modelyard.train.checkpoint import Checkpoint, marked_retention, save_checkpoint
from modelyard.train.run import train
from modelyard.train.saving import HostCopies, Saver
from tests.parallel.processes import run_distributed
from tests.train.helpers import lines, loaded, losses, new_run

pytestmark = pytest.mark.usefixtures("tiny")

EVERY = "training.checkpoint={interval: 2, offset: 0, keep: null}"


def tensors(folder: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(Path(folder))
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors().items()}
    checkpoint.load_into(found)
    return found


def slow_disk(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Call `before(iteration)` where a checkpoint is about to be written."""

    def write(folder: Path, **arguments: Any) -> None:
        before(int(folder.name))
        save_checkpoint(folder, **arguments)

    monkeypatch.setattr(state_module, "save_checkpoint", write)


def test_copies_are_equal_and_independent() -> None:
    tensors = {
        "a": torch.arange(7, dtype=torch.float64).view(7, 1),
        "b": torch.randn(3, 5)[:, 1:3],
        "c": torch.tensor(2.5),
        "d": torch.empty(0, 4),
        "e": torch.randn(3).bfloat16(),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    kept = HostCopies()
    copies = kept.of(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert all(torch.equal(copies[name], before[name]) for name in tensors)
    assert {name: copy.dtype for name, copy in copies.items()} == {n: t.dtype for n, t in before.items()}
    assert kept.of({}) == {}
    place = copies["a"].data_ptr()
    again = kept.of(tensors)
    assert again["a"].data_ptr() == place
    assert again["a"].sum() == 0


def test_training_goes_on_while_a_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of iteration 2 waits for step 5; its bytes are those of a run that waited for it."""
    reached = threading.Event()
    steps = 0
    step = state_module.train_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            reached.set()
        return step(*args, **kwargs)

    monkeypatch.setattr(state_module, "train_step", counted)
    slow_disk(monkeypatch, lambda iteration: assert_(reached.wait(20)))
    keys = ("training.train_iters=6", "training.checkpoint={interval: 5, offset: 2}")
    assert train(loaded(*keys)) == 0
    monkeypatch.setattr(state_module, "save_checkpoint", save_checkpoint)
    events = [(e["event"], e["iteration"]) for e in lines("run/events.jsonl")]
    assert events == [("started", 0), ("saved", 2), ("saved", 6), ("finished", 6)]

    assert train(loaded(*keys, "training.checkpoint.asynchronous=no", "run.experiment_dir=there")) == 0
    assert losses("run") == losses("there")
    for iteration in (2, 6):
        mine, theirs = tensors(f"run/checkpoint/{iteration}"), tensors(f"there/checkpoint/{iteration}")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        states = [Path(f"{run}/checkpoint/{iteration}/state.json").read_text() for run in ("run", "there")]
        # How many failed saves, tokens, rows: as they were at that iteration.
        assert states[0] == states[1]


def assert_(condition: bool) -> None:
    assert condition


def test_one_is_on_its_way_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work: list[int] = []
    most = 0

    def write(folder: Path, **arguments: Any) -> None:
        nonlocal most
        at_work.append(int(folder.name))
        most = max(most, len(at_work))
        time.sleep(0.05)
        save_checkpoint(folder, **arguments)
        at_work.remove(int(folder.name))

    monkeypatch.setattr(state_module, "save_checkpoint", write)
    assert train(loaded("training.train_iters=8", EVERY)) == 0
    assert most == 1
    assert [e["iteration"] for e in lines("run/events.jsonl") if e["event"] == "saved"] == [2, 4, 6, 8]


def fail(iteration: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(iteration))


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_failure_beside_the_training_is_shown_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_error: str
) -> None:
    slow_disk(monkeypatch, lambda iteration: fail(iteration) if iteration in (2, 4) else None)
    keys = ("training.train_iters=6", EVERY, f"training.checkpoint.on_error={on_error}")
    if on_error == "stop":
        with pytest.raises(
            RunFailed, match=r"^iteration 2 is not saved: .*Input/output error.* no earlier checkpoint$"
        ):
            train(loaded(*keys))
        # At once: the next save would have been after iteration 4.
        assert max(losses("run")) <= 4
        return
    assert train(loaded(*keys)) == 0
    out = capsys.readouterr().out
    assert "warning: iteration 2 is not saved: [Errno 5] Input/output error: '2'; there is no earlier" in out
    assert (
        "iteration 4 is not saved: [Errno 5] Input/output error: '4'; there is no earlier checkpoint; 2 could not be saved so far"
        in out
    )
    assert [path.name for path in Path("run/checkpoint").iterdir()] == ["6"]
    assert Checkpoint(Path("run/checkpoint/6")).state["progress"]["failed_saves"] == 2
    assert new_run(*keys).progress.failed_saves == 2


def test_a_run_that_fails_leaves_the_checkpoint_that_was_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()
    slow_disk(monkeypatch, lambda iteration: assert_(failed.wait(20)))
    step, marks = state_module.train_step, []

    def fourth_fails(*args: Any, **kwargs: Any) -> Any:
        if marks.append(None) or len(marks) == 4:
            failed.set()
            raise ValueError("a fault of ours")
        return step(*args, **kwargs)

    monkeypatch.setattr(state_module, "train_step", fourth_fails)
    with pytest.raises(ValueError, match="a fault of ours"):
        train(loaded("training.train_iters=6", EVERY))
    assert Checkpoint(Path("run/checkpoint/2")).iteration == 2


def slow_then_broken_at_one_rank(*keys: str) -> tuple[str, int]:
    """Rank 1 cannot write its part of the checkpoint of iteration 2, after a while; what each process says."""
    is_second = torch.distributed.get_rank() == 1
    with pytest.MonkeyPatch.context() as patch:

        def facts(files: Any, folder: Path) -> Any:
            if is_second and folder.name == "2.tmp":
                time.sleep(0.2)
                fail(2)
            return synced_facts(files, folder)

        patch.setattr("modelyard.train.checkpoint.synced_facts", facts)
        try:
            status = train(loaded(*keys))
        except RunFailed as failure:
            return str(failure), max(losses("run"))
    return str(status), max(losses("run"))


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_what_fails_in_one_process_all_know(on_error: str) -> None:
    keys = ("training.train_iters=6", EVERY, f"training.checkpoint.on_error={on_error}")
    found = run_distributed(slow_then_broken_at_one_rank, 2, *keys)
    assert found[0][1] == found[1][1]
    if on_error == "stop":
        assert all(text.startswith("iteration 2 is not saved: ") for text, _ in found)
        assert all("Input/output error" in text for text, _ in found)
        assert list(Path("run/checkpoint").iterdir()) == []
    else:
        assert [text for text, _ in found] == ["0", "0"]
        assert sorted(path.name for path in Path("run/checkpoint").iterdir()) == ["4", "6"]


def test_what_a_saver_does_is_done_once() -> None:
    saver = Saver(World(), asynchronous=True)
    assert not saver.busy
    assert not saver.ended
    go = threading.Event()
    saver.start(lambda world: assert_(go.wait(20)), wait=False)
    assert saver.busy
    assert not saver.ended
    go.set()
    saver.wait()
    assert saver.ended
    saver.finish()
    assert not saver.busy

    def refuse(world: World) -> None:
        raise UserError("no")

    for wait in (True, False):
        saver.start(refuse, wait=wait)
        with pytest.raises(UserError, match="no"):
            saver.finish()
        assert not saver.busy


def kept() -> dict[int, str]:
    return {
        int(path.name): marked_retention(path)
        for path in sorted(Path("run/checkpoint").iterdir(), key=lambda p: int(p.name))
    }


def test_short_lived_checkpoints_go_when_there_is_a_newer_one() -> None:
    policy = "training.checkpoint={interval: 4, offset: 0, ephemeral_interval: 1, keep: 1, keep_every: 3}"
    found: list[dict[int, str]] = []
    for last in (3, 4, 6, 8, 12, 14):
        assert train(loaded(f"training.train_iters={last}", policy)) == 0
        found.append(kept())
    assert found == [
        {3: "ephemeral"},
        {4: "regular"},
        {4: "regular", 6: "ephemeral"},
        {8: "regular"},
        {8: "regular", 12: "permanent"},
        {8: "regular", 12: "permanent", 14: "ephemeral"},
    ]
    saved = [e["iteration"] for e in lines("run/events.jsonl") if e["event"] == "saved"]
    assert saved == list(range(1, 15))
    # What was to stay for ever does so under other intervals, too.
    policy = "training.checkpoint={interval: 5, offset: 0, keep: 1, keep_every: null}"
    assert train(loaded("training.train_iters=20", policy)) == 0
    assert kept() == {12: "permanent", 20: "regular"}


@pytest.mark.parametrize(("checksums", "newest"), [("yes", 2), ("auto", 2), ("no", 4)])
def test_checksums_are_compared_as_configured(checksums: str, newest: int) -> None:
    assert train(loaded("training.train_iters=4", EVERY)) == 0
    data = next(Path("run/checkpoint/4").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[-100] ^= 1
    data.write_bytes(content)
    run = new_run(f"training.checkpoint.checksums={checksums}", "training.train_iters=6")
    assert run.progress.iteration == newest
    aside = sorted(path.name for path in Path("run/checkpoint").iterdir())
    assert aside == (["2", "4"] if newest == 4 else ["2", "4.damaged"])
