"""Processes that no longer hold the same weights, or count otherwise, are found and named; so is a slow one."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modelyard.errors import RunFailed
from modelyard.train import slow_rank
from modelyard.train import state as state_module
from modelyard.train.run import train
from modelyard.train.slow_rank import SlowRanks, Speed, Stopwatch, medians_of_others, outliers
from modelyard.train.state import Run
from tests.parallel.processes import run_distributed
from tests.train.helpers import lines, loaded

pytestmark = pytest.mark.usefixtures("tiny")

HOST = socket.gethostname()
CPU = torch.device("cpu")

# --- copies that differ, and counts ------------------------------------------------------------------------------

Damage = Callable[[Run], None]
"""Done to a run between two steps."""


def words(run: Run, name: str, moment: str | None = None) -> torch.Tensor:
    """int32 [words]: the bits of a parameter, or of its moment, as they are here."""
    parameter = run.weights.master[name]
    tensor = parameter if moment is None else run.optimizer.adamw.state[parameter][moment]
    return tensor.data.view(-1).view(torch.int32)


def one_bit(run: Run) -> None:
    words(run, "layers.1.mlp.down_proj.weight")[5] ^= 1


def two_elements(run: Run) -> None:
    here = words(run, "layers.0.input_layernorm.weight")
    assert here[0] != here[1]
    here[[0, 1]] = here[[1, 0]]


def one_moment(run: Run) -> None:
    words(run, "embed_tokens.weight", "exp_avg_sq")[0] += 1


def zero(run: Run) -> None:
    words(run, "embed_tokens.weight")[0] = 0


def minus_zero(run: Run) -> None:
    words(run, "embed_tokens.weight")[0] = -(2**31)


def another_step(run: Run) -> None:
    run.optimizer.steps += 1


def another_iteration(run: Run) -> None:
    run.progress.iteration += 1


def no_damage(run: Run) -> None:
    pass


def damaged(keys: tuple[str, ...], damage: Damage, rank: int, elsewhere: Damage = no_damage) -> str | int:
    """Train, with `damage` done after the third step in the process `rank`, `elsewhere` in the others; status or failure."""
    true_after = Run._after

    def after(run: Run, *arguments: Any) -> None:
        true_after(run, *arguments)
        if run.progress.iteration == 3:
            (damage if os.environ["RANK"] == str(rank) else elsewhere)(run)

    Run._after = after  # type: ignore[method-assign, assignment]
    try:
        return train(loaded(*SHAPE, *keys))
    except RunFailed as error:
        return str(error)
    finally:
        Run._after = true_after  # type: ignore[method-assign]


def all_damaged(cases: list[tuple[Any, ...]]) -> list[str | int]:
    return [damaged(*case) for case in cases]


SHAPE = (
    "model.base_model.transformer.num_layers=2",
    "model.base_model.transformer.head_groups=2",
    "training.checkpoint={interval: null, offset: 0}",
    "training.train_iters=6",
    "batch.micro_batch_size=1",
)
TWO = "training.health.interval=2"
REPLICAS = "model.distributed.data_parallel_replicas=2"
SAVED = "training.checkpoint={interval: 2, offset: 1}"
ADVICE = (
    ": start again with the same command, and if that names the same rank, suspect its host's memory, GPU and network, "
    "and leave it out"
)


def test_what_no_longer_is_the_same_ends_the_run_in_all_processes() -> None:
    def into(folder: str) -> str:
        return f"run.experiment_dir={folder}"

    cases: dict[str, tuple[Any, ...]] = {
        "replicas": ((into("replicas"), TWO, REPLICAS), one_bit, 3),
        "tensor": (
            (into("tensor"), TWO, "model.distributed={data_parallel_replicas: 2, tensor_parallel: 2}"),
            two_elements,
            2,
        ),
        "tied": (
            (
                into("tied"),
                "training.health.interval=1",
                "model.distributed.pipeline_parallel=2",
                "model.base_model.tie_word_embeddings=yes",
            ),
            minus_zero,
            1,
            zero,
        ),
        "moment": ((into("moment"), "training.health.interval=100", SAVED, REPLICAS), one_moment, 0),
        "step": ((into("step"), TWO), another_step, 1),
        "iteration": ((into("iteration"), TWO), another_iteration, 2),
        "off": ((into("never"), "training.health.interval=null", REPLICAS), one_bit, 3),
    }
    answers = run_distributed(all_damaged, 4, list(cases.values()))
    said = dict(zip(cases, answers[0], strict=True))
    assert answers == [answers[0]] * 4
    here = f"({HOST})"
    equal = "all were equal after iteration 2; there is no checkpoint yet" + ADVICE
    # the first replica has ranks 0 and 1, the second 2 and 3
    assert said.pop("replicas") == (
        f"iteration 4: rank 1 {here} and rank 3 {here} hold copies of the same weights, which differ in "
        f"layers.1.mlp.down_proj.weight: nothing tells which is right; {equal}"
    )
    assert said.pop("tensor") == (
        f"iteration 4: rank 2 {here} has other bits than the others that hold the same weights, in "
        f"layers.0.input_layernorm.weight; {equal}"
    )
    # two shards, each with a first stage (0, 2) and a last (1, 3)
    assert said.pop("tied") == (
        f"iteration 3: rank 0 {here} and rank 1 {here} hold copies of the same weights, which differ in "
        f"embed_tokens.weight: nothing tells which is right; {equal}"
    )
    # due before the checkpoint of iteration 3, which is not written
    assert said.pop("moment") == (
        f"iteration 3: rank 0 {here} and rank 2 {here} hold copies of the same weights, which differ in "
        "embed_tokens.weight.exp_avg_sq: nothing tells which is right; all were equal after iteration 1; "
        "checkpoint moment/checkpoint/1 is untouched" + ADVICE
    )
    assert [path.name for path in Path("moment/checkpoint").iterdir()] == ["1"]
    # warm-up is 8 steps to a rate of 0.01; the next step is the fifth, or the sixth
    assert said.pop("step") == (
        f"iteration 4: the processes no longer agree where they are: rank 1 {here} has optimizer_steps 5 and learning_rate "
        f"0.0075 and the others have optimizer_steps 4 and learning_rate 0.00625; {equal}"
    )
    assert said.pop("iteration") == (
        f"iteration 4: the processes no longer agree where they are: rank 2 {here} has iteration 5 and the others have "
        f"iteration 4; {equal}"
    )
    assert said == {"off": 0}

    found, failed = lines("tensor/events.jsonl")[-2:]
    assert (found["event"], failed["event"]) == ("diverged", "failed")
    assert found["text"] == failed["text"] == answers[0][1]
    facts = {key: found[key] for key in ("iteration", "ranks", "hosts", "tensors", "last_equal")}
    assert facts == {
        "iteration": 4,
        "ranks": [2],
        "hosts": [HOST],
        "tensors": ["layers.0.input_layernorm.weight"],
        "last_equal": 2,
    }


# --- who is slow -------------------------------------------------------------------------------------------------


def slowed(*overrides: str) -> int:
    """The processor of rank 2 is slow, and the data of rank 1; no clock is read, which a busy machine would make a game of
    chance."""
    slow_rank._LEAST = 0.0
    slow_rank.core_times = lambda: (1, 0)
    rank, true_batches = os.environ["RANK"], state_module.prefetched
    slow_rank.host_seconds = lambda: 0.004 if rank == "2" else 0.001
    slow_rank.device_seconds = lambda device: 0.001

    def batches(*arguments: Any, **settings: Any) -> Iterator[tuple[Any, float]]:
        try:
            for batch, waited in (ready := true_batches(*arguments, **settings)):
                yield batch, waited + (60.0 if rank == "1" else 0.0)
        finally:
            ready.close()

    state_module.prefetched = batches  # type: ignore[assignment]
    return train(loaded(*overrides))


def test_a_slow_process_is_named_once() -> None:
    assert run_distributed(slowed, 3, TWO, "batch.batch_size=6", "training.train_iters=10") == [0] * 3
    events = [event for event in lines("run/events.jsonl") if event["event"] == "slow_rank"]
    assert [(e["iteration"], e["rank"], e["host"], e["why"]) for e in events] == [
        (4, 1, HOST, "data_wait"),
        (4, 2, HOST, "host"),
    ]
    data, processor = (event["text"] for event in events)
    assert data.startswith(f"warning: rank 1 ({HOST}) makes the others wait: it waited for its data in ")
    assert processor.startswith(f"warning: rank 2 ({HOST}) computes 4.0 times slower than the others: ")
    assert data in Path("run/log.txt").read_text()


def speed(host: float = 1.0, device: float = 1.0, core_wait: float = 0.0, data_wait: float = 0.0) -> Speed:
    return Speed(host / 1000, device / 1000, core_wait, data_wait)


def test_medians_of_others() -> None:
    for values in ([3, 1], [2, 2, 2], [5, 1, 4, 1], [9, 8, 1, 3, 3], [1, 2, 3, 4, 5, 6]):
        expected = [statistics.median(values[:i] + values[i + 1 :]) for i in range(len(values))]
        assert medians_of_others(values) == expected


def test_who_stands_out() -> None:
    assert outliers([speed(1.0), speed(1.4), speed(1.2)], 1.5) == []
    (slow,) = outliers([speed(1.0), speed(device=2.0), speed(1.2)], 1.5)
    assert slow[:3] == (1, "device", 2.0)
    assert slow.words.format("rank 1") == (
        "rank 1 computes 2.0 times slower than the others: arithmetic on its device takes 2.00 ms, in the others 1.00 ms"
    )
    # what they all wait for is nobody's fault
    assert outliers([speed(data_wait=0.5)] * 3, 1.5) == []
    assert outliers([speed(core_wait=0.6), speed(core_wait=0.5), speed(core_wait=0.3)], 1.5) == []
    (slow,) = outliers([speed(data_wait=0.02), speed(data_wait=0.27), speed(data_wait=0.02)], 1.5)
    assert slow[:2] == (1, "data_wait")
    assert slow.factor == pytest.approx(4 / 3)
    assert slow.words == "{} makes the others wait: it waited for its data in 27% of the time, they in 2%"
    # a third of the time is what makes steps 1.5 times as long
    assert [s.why for s in outliers([speed(), speed(core_wait=0.35)], 1.5)] == ["core_wait"]
    assert outliers([speed(), speed(core_wait=0.35)], 2.0) == []


def test_a_process_is_named_when_it_was_slow_twice_and_again_when_it_was_not_in_between() -> None:
    judge, fast, slow = SlowRanks(1.5).judge, [speed(), speed()], [speed(), speed(2.0)]
    said = []
    for speeds in (slow, fast, slow, slow, fast, slow, slow, fast, fast, slow, slow, slow):
        newly, no_longer = judge(speeds)
        said.append(([found.rank for found in newly], no_longer))
    nothing: Any = ([], [])
    named: Any = ([1], [])
    fine: Any = ([], [(1, "host")])
    assert said[:4] == [nothing, nothing, nothing, named]
    assert said[4:9] == [nothing, nothing, nothing, nothing, fine]
    assert said[9:] == [nothing, named, nothing]


def test_shares_of_the_time_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(0, 0), (3, 1), (3, 1), (4, 9), (4, 9)])
    monkeypatch.setattr(slow_rank, "core_times", lambda: next(times))
    stopwatch = Stopwatch(CPU)
    for _ in range(4):
        stopwatch.add(0.5, 0.1)
    first = stopwatch.read()
    assert (first.core_wait, first.data_wait) == (0.25, pytest.approx(0.2))
    stopwatch.add(0.9, 0.9)  # too short to tell
    second = stopwatch.read()
    assert (second.core_wait, second.data_wait) == (0.0, 0.0)
    assert 0 < second.host < 0.1
    assert 0 < second.device < 0.1


def test_what_runs_beside_it_does_not_make_a_processor_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own time counts, not that of the clock on the wall."""
    monkeypatch.setattr(slow_rank, "_python", lambda small: time.sleep(0.02))
    assert slow_rank.host_seconds() < 0.01


def test_work_that_takes_longer_is_measured_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, work = slow_rank.host_seconds(), slow_rank._python
    monkeypatch.setattr(slow_rank, "_python", lambda small: sum(work(small) for _ in range(20)))
    assert slow_rank.host_seconds() > 2 * plain
