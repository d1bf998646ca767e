"""Spikes: what is one, what is done about it, and that all of it comes back from a checkpoint."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import modelyard.train.state as state_module
from modelyard.config.training import SpikesConfig
from modelyard.errors import RunFailed, UserError
from modelyard.train.checkpoint import Checkpoint
from modelyard.train.run import train
from modelyard.train.spikes import SpikeWatch, batch_number, in_words, set_newer_aside
from tests.parallel.processes import run_distributed
from tests.train.helpers import lines, loaded, losses, new_run


def watch(**settings: Any) -> SpikeWatch:
    return SpikeWatch(SpikesConfig(**{"window": 8, "threshold": 4.0, **settings}))


def test_what_stands_far_above_the_steps_before_is_a_spike() -> None:
    spikes = watch()
    # Nothing is judged before there is half a window.
    assert [spikes.judge(loss, 1.0) for loss in (3.0, 100.0)] == [None, None]
    spikes = watch()
    for loss in (2.0, 4.0, 2.0, 4.0):
        assert spikes.judge(loss, 1.0) is None
    # Mean 3, deviation 1: four of them are 7.
    assert spikes.judge(7.0, 1.0) is None
    spikes.load_state_dict({"loss": [2.0, 4.0, 2.0, 4.0], "gradient norm": [0.0, 0.2, 0.0, 0.2]})
    found = spikes.judge(7.1, 1.0)
    assert found == "the loss 7.1 stands 4.1 standard deviations above 3, the mean of the last 4 steps"
    # It counts as 7.
    assert spikes.state_dict()["loss"] == [2.0, 4.0, 2.0, 4.0, 7.0]
    # The logarithm of the norm: mean 0.1, deviation 0.1, so that 0.5 is the limit.
    spikes.load_state_dict({"loss": [2.0, 4.0, 2.0, 4.0], "gradient norm": [0.0, 0.2, 0.0, 0.2]})
    found = spikes.judge(3.0, math.exp(0.51))
    assert found is not None
    assert found.startswith("the gradient norm 1.665 stands 4.1 standard deviations above 1.105")
    assert spikes.judge(3.0, 1e-9) is None  # too low is none


def test_steps_without_noise_have_room() -> None:
    spikes = watch()
    for _ in range(8):
        assert spikes.judge(2.0, 1.0) is None
    # Four times one percent.
    assert spikes.judge(2.07, 1.0) is None
    assert spikes.judge(2.2, 1.0) is not None


def test_a_level_that_stays_becomes_the_usual_one() -> None:
    spikes = watch(window=16)
    for step in range(16):
        spikes.judge(2.0 + 0.1 * (step % 2), 1.0)
    found = [spikes.judge(4.0, 1.0) is not None for _ in range(12)]
    assert found[0]
    assert not found[-1]


def test_ignored_is_ignored() -> None:
    spikes = watch(policy="ignore")
    assert [spikes.judge(loss, 1.0) for loss in (1.0,) * 8 + (1e9,)] == [None] * 9
    assert spikes.state_dict() == {"loss": [], "gradient norm": []}


def test_batches_that_are_left_out_are_stepped_over() -> None:
    assert [batch_number(i, []) for i in range(3)] == [0, 1, 2]
    assert [batch_number(i, [2, 3]) for i in range(4)] == [0, 1, 4, 5]
    assert [batch_number(i, [5, 0, 2, 3]) for i in range(4)] == [1, 4, 6, 7]
    found = [batch_number(i, [1, 4, 5, 9]) for i in range(20)]
    assert found == [n for n in range(24) if n not in (1, 4, 5, 9)]


def test_documents_in_words() -> None:
    assert in_words({"a": [3, 4], "b": list(range(9))}) == "a: 3, 4; b: 0, 1, 2, 3, 4, …"


def test_newer_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for number in (2, 4, 6):
        (tmp_path / str(number)).mkdir()
    assert [path.name for path in set_newer_aside(tmp_path, 4)] == ["6.rolled-back"]
    assert [path.name for path in set_newer_aside(tmp_path, 4)] == []
    (tmp_path / "6").mkdir()
    assert [path.name for path in set_newer_aside(tmp_path, 4)] == ["6.rolled-back-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "6.rolled-back", "6.rolled-back-2"]
    assert set_newer_aside(tmp_path / "nothing", 4) == []


# In a run

LONG = (
    "training.train_iters=16",
    "training.checkpoint={interval: 3, offset: 0, keep: null}",
    "optimizer.learning_rate.base=0.001",
)


def spike_at(monkeypatch: pytest.MonkeyPatch, batches: set[int]) -> list[int]:
    """Make the loss of these batches look a thousandfold, wherever in the run they come; returns what was trained on."""
    trained: list[int] = []
    stream_type = state_module.Run._batches
    total = state_module.Mesh.total
    current: list[int] = []

    def batches_of(run: Any) -> Any:
        begin = run.progress.iteration
        for offset, item in enumerate(stream_type(run)):
            current[:] = [batch_number(begin + offset, run.progress.left_out)]
            yield item

    def looked_at(self: Any, *args: Any, **kwargs: Any) -> Any:
        sums = total(self, *args, **kwargs)
        trained.append(current[0])
        return sums._replace(loss=sums.loss * 1000) if current[0] in batches else sums

    monkeypatch.setattr(state_module.Run, "_batches", batches_of)
    monkeypatch.setattr(state_module.Mesh, "total", looked_at)
    return trained


def policy(name: str, **more: Any) -> str:
    settings = {"policy": name, "window": 8, **more}
    return "training.spikes={" + ", ".join(f"{key}: {value}" for key, value in settings.items()) + "}"


@pytest.mark.usefixtures("tiny")
def test_a_warning_names_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    spike_at(monkeypatch, {9})
    assert train(loaded(*LONG, policy("warn"))) == 0
    (event,) = [e for e in lines("run/events.jsonl") if e["event"] == "spike"]
    assert (event["iteration"], event["batch"], event["policy"]) == (10, 9, "warn")
    # What the four rows of 16 positions of batch 9 are made of, by the stream itself.
    run = new_run(*LONG, "run.experiment_dir=other")
    expected = {p.document for _, pieces in run.stream.pieces(36, 40) for p in pieces}
    assert event["documents"] == {"random 'dummy'": sorted(expected)}
    assert f"batch 9 has documents random 'dummy': {sorted(expected)[0]}" in event["text"]
    assert "standard deviations above" in event["reason"]
    assert lines("run/metrics.jsonl")[-1]["skipped_steps"] == 0


@pytest.mark.usefixtures("tiny")
def test_a_skipped_spike_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    spike_at(monkeypatch, {9})
    assert train(loaded(*LONG, policy("skip"))) == 0
    skipped = [e for e in lines("run/events.jsonl") if e["event"] in ("spike", "skipped")]
    assert [(e["event"], e["iteration"]) for e in skipped] == [("spike", 10), ("skipped", 10)]
    state = Checkpoint(Path("run/checkpoint/16")).state
    assert (state["progress"]["skipped_steps"], state["optimizer_steps"]) == (1, 15)
    # The history is in the checkpoint, whose run would go on with it.
    assert len(state["spikes"]["loss"]) == 8
    assert new_run(*LONG, policy("skip")).spikes.state_dict() == state["spikes"]


@pytest.mark.usefixtures("tiny")
def test_skips_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    spike_at(monkeypatch, {9, 10, 11})
    with pytest.raises(
        RunFailed, match=r"2 steps in a row were skipped \(last: the loss .* stands .*; checkpoint"
    ):
        train(loaded(*LONG, policy("skip", threshold=3), "training.max_skipped_steps=2"))


@pytest.mark.usefixtures("tiny")
def test_a_rollback_leaves_out_the_batches_before_the_spike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = spike_at(monkeypatch, {10})
    keys = (*LONG, policy("rollback", batches=3), "training.logs.tensorboard=yes")
    assert train(loaded(*keys)) == 0
    # The spike is in iteration 11; three batches, 8 to 10, are left out; checkpoint 6 is the last from before them.
    assert trained == [*range(11), 6, 7, *range(11, 19)]
    events = [(e["event"], e["iteration"]) for e in lines("run/events.jsonl") if e["event"] != "saved"]
    assert events == [("started", 0), ("spike", 11), ("rolled_back", 11), ("finished", 16)]
    (back,) = [e for e in lines("run/events.jsonl") if e["event"] == "rolled_back"]
    assert (back["to"], back["left_out"]) == (6, [8, 9, 10])
    assert (
        "going back from iteration 11 to run/checkpoint/6, and on without batches [8, 9, 10]" in back["text"]
    )
    assert "set aside: run/checkpoint/9.rolled-back" in capsys.readouterr().out
    names = sorted(path.name for path in Path("run/checkpoint").iterdir())
    assert names == ["12", "15", "16", "3", "6", "9", "9.rolled-back"]
    assert [r["iteration"] for r in lines("run/metrics.jsonl")] == list(range(1, 17))
    state = Checkpoint(Path("run/checkpoint/16")).state
    assert state["progress"]["left_out"] == [8, 9, 10]
    assert (state["progress"]["rollbacks"], state["progress"]["skipped_steps"]) == (1, 0)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator("run/tensorboard").Reload()
    assert [event.step for event in board.Scalars("training/loss")] == list(range(1, 17))

    # The same as a run that never saw those batches.
    monkeypatch.setattr(state_module, "batch_number", lambda i, left_out: i if i < 8 else i + 3)
    keys = (*LONG, policy("ignore"), "run.experiment_dir=never")
    run = new_run(*keys)
    run.progress.left_out = [8, 9, 10]  # so that the numbers are looked up
    found = [result.loss for result, _, _ in run.steps()]
    assert found == list(losses("run").values())


@pytest.mark.usefixtures("tiny")
def test_a_run_that_went_back_goes_on_after_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    spike_at(monkeypatch, {10})
    keys = (*LONG, policy("rollback", batches=1))
    assert train(loaded(*keys)) == 0
    whole = losses("run")
    again = ("run.experiment_dir=again",)
    assert train(loaded(*keys, *again, "training.train_iters=13")) == 0
    trained = spike_at(monkeypatch, set())
    assert train(loaded(*keys, *again)) == 0
    assert trained == [14, 15, 16]  # batch 10 is left out
    assert losses("again") == whole


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("limit", [0, 1])
def test_rollbacks_have_a_limit(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    spike_at(monkeypatch, set(range(10, 40)))
    with pytest.raises(RunFailed, match=rf"^iteration 1[01]: .*has gone back {limit} times already"):
        train(loaded(*LONG, policy("rollback", batches=1, max_rollbacks=limit)))


@pytest.mark.usefixtures("tiny")
def test_without_a_checkpoint_the_step_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spike_at(monkeypatch, {9})
    assert train(loaded(*LONG, policy("rollback"), "training.checkpoint.interval=null")) == 0
    assert "there is no checkpoint to go back to: the step is skipped" in capsys.readouterr().out
    assert lines("run/metrics.jsonl")[-1]["skipped_steps"] == 1


def rolled_back(*keys: str) -> tuple[list[int], dict[int, float]]:
    with pytest.MonkeyPatch.context() as patch:
        trained = spike_at(patch, {10})
        assert train(loaded(*keys)) == 0
    return trained, losses("run")


@pytest.mark.usefixtures("tiny")
def test_all_processes_go_back_together() -> None:
    keys = (*LONG, policy("rollback", batches=3))
    found = run_distributed(rolled_back, 2, *keys)
    assert [trained for trained, _ in found] == [[*range(11), 6, 7, *range(11, 19)]] * 2
    alone = rolled_back(*keys, "run.experiment_dir=alone")
    assert losses("alone") == pytest.approx(found[0][1], rel=1e-4)
    assert alone[0] == found[0][0]


# What went wrong once


def started_again(monkeypatch: pytest.MonkeyPatch, *keys: str, starts: int) -> list[str]:
    """A run with a spike in batch 10, started again and again; what each start ended in."""
    found = []
    for _ in range(starts):
        with monkeypatch.context() as patch:
            spike_at(patch, {10})
            try:
                found.append(str(train(loaded(*keys))))
            except RunFailed as failure:
                found.append(str(failure))
    return found


@pytest.mark.usefixtures("tiny")
def test_going_back_is_no_reason_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iteration 6 is one that `training.shutdown` leaves at, and the one that is gone back to."""
    keys = (*LONG, policy("rollback", batches=3), "training.shutdown.interval=3")
    assert started_again(monkeypatch, *keys, starts=7) == ["0"] * 7
    assert losses("run").keys() == set(range(1, 17))
    assert sum(e["event"] == "rolled_back" for e in lines("run/events.jsonl")) == 1


@pytest.mark.usefixtures("tiny")
def test_a_run_stopped_after_going_back_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (*LONG, policy("rollback", batches=3, max_rollbacks=1))
    roll_back = state_module.roll_back

    def asked_to_stop(run: Any, reason: str) -> bool:
        run.stop.heard = 15
        return roll_back(run, reason)

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "roll_back", asked_to_stop)
        assert started_again(patch, *keys, starts=1) == ["143"]
    state = Checkpoint(Path("run/checkpoint/6")).state["progress"]
    assert (state["rollbacks"], state["left_out"]) == (1, [8, 9, 10])
    assert started_again(monkeypatch, *keys, starts=1) == ["0"]
    assert sum(e["event"] == "rolled_back" for e in lines("run/events.jsonl")) == 1


@pytest.mark.usefixtures("tiny")
def test_a_damaged_checkpoint_is_not_gone_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 nothing can be used: 3 is, 6 and what came after it are set aside, and short-lived ones are kept from then on."""
    keys = (*LONG, policy("rollback", batches=3), "training.checkpoint.ephemeral_interval=1")
    keys = (*keys, "training.checkpoint.keep=2", "training.checkpoint.asynchronous=no")
    roll_back = state_module.roll_back

    def damaged(run: Any, reason: str) -> bool:
        (Path("run/checkpoint/6") / "state.json").write_text("{}")
        return roll_back(run, reason)

    monkeypatch.setattr(state_module, "roll_back", damaged)
    assert started_again(monkeypatch, *keys, starts=1) == ["0"]
    events = [(e["event"], e["iteration"]) for e in lines("run/events.jsonl") if e["event"] != "saved"]
    assert events[1:4] == [("spike", 11), ("checkpoint_damaged", 6), ("rolled_back", 11)]
    names = {path.name for path in Path("run/checkpoint").iterdir()}
    assert {"6.damaged", "9.rolled-back", "10.rolled-back", "15", "16"} <= names
    assert losses("run").keys() == set(range(1, 17))


@pytest.mark.usefixtures("tiny")
def test_a_state_by_halves_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that is gone back to turns out to be unreadable in its midst."""
    load = Checkpoint.load_into

    def broken(self: Checkpoint, tensors: dict[str, Any]) -> None:
        load(self, dict(list(tensors.items())[:4]))
        raise UserError("cannot be read")

    monkeypatch.setattr(Checkpoint, "load_into", broken)
    spike_at(monkeypatch, {10})
    with pytest.raises(UserError, match="cannot be read"):
        train(loaded(*LONG, policy("rollback", batches=3)))
    monkeypatch.setattr(Checkpoint, "load_into", load)
    assert sorted(path.name for path in Path("run/checkpoint").iterdir()) == ["3", "6", "9"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_after_going_back_it_is_the_run_from_that_checkpoint(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Bit for bit that of one which is started from checkpoint 6 and was never anywhere else; exports, too."""
    export = "training.export={interval: 3, offset: 0, format: llama, data_type: float32}"
    keys = (
        *LONG,
        policy("rollback", batches=3),
        export,
        f"model.distributed.training_dtype={dtype}",
        "optimizer.learning_rate.base=0.05",
    )
    assert started_again(monkeypatch, *keys, starts=1) == ["0"]
    shutil.copytree("run", "other")
    for folder in Path("other/checkpoint").iterdir():
        if folder.name != "6":
            shutil.rmtree(folder)
    shutil.rmtree("other/export")
    assert started_again(monkeypatch, *keys, "run.experiment_dir=other", starts=1) == ["0"]
    assert losses("other") == losses("run")
    for iteration in (9, 12, 16):
        weights = [
            Path(f"{run}/export/llama/{iteration}/model.safetensors").read_bytes() for run in ("run", "other")
        ]
        assert weights[0] == weights[1]
    assert Path("run/export/llama/9.rolled-back").is_dir()
