"""A run in several processes: what is kept, said and decided, held against the run of one."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from modelyard.errors import RunFailed, UserError
from modelyard.parallel.world import connected
from modelyard.train import checkpoint as checkpoint_module
from modelyard.train import state as state_module
from modelyard.train.checkpoint import Checkpoint
from modelyard.train.console import Console
from modelyard.train.evaluators import evaluate_loss
from modelyard.train.run import train
from modelyard.train.state import Run
from tests.parallel.processes import run_distributed
from tests.train.helpers import lines, loaded, losses, new_run

pytestmark = pytest.mark.usefixtures("tiny")

TIED = "model.base_model.tie_word_embeddings=yes"
EXACT = (
    "model.distributed.training_dtype=float64",
    "model.base_model.transformer.num_layers=2",
    "model.base_model.transformer.head_groups=2",
    "training.checkpoint={interval: 3, offset: 0}",
)
LAYOUTS = {
    "ZeRO 3": (2, ("model.multi_stage.zero_stage=3",)),
    "offload": (2, ("model.multi_stage={zero_stage: 2, cpu_offload: yes}",)),
    "tensor": (2, ("model.distributed.tensor_parallel=2",)),
    "pipeline, tied": (2, ("model.distributed.pipeline_parallel=2", "batch.micro_batch_size=2", TIED)),
    "V-shaped pipeline, tied": (
        2,
        (
            "model.distributed={pipeline_parallel: 2, pipeline_schedule: zbv}",
            "model.base_model.transformer.num_layers=4",
            "batch.micro_batch_size=2",
            TIED,
        ),
    ),
    "context": (2, ("model.distributed.sequence_data_parallel=2",)),
    "shards x pipeline x tensor, tied": (
        8,
        (
            "model.distributed={pipeline_parallel: 2, tensor_parallel: 2, sequence_tensor_parallel: yes}",
            "batch.micro_batch_size=1",
            TIED,
        ),
    ),
    "tensor x copies": (4, ("model.distributed={tensor_parallel: 2, data_parallel_replicas: 2}",)),
}


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(Path(folder))
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors().items()}
    checkpoint.load_into(found)
    return found


def in_this_layout(*overrides: str) -> Run:
    """The run of this process among the others of a job."""
    config = loaded(*overrides)
    assert config.architecture is not None
    with connected(backend="gloo", timeout=30, traces=Path("unused")) as world:
        return Run(
            config.train,
            config.architecture,
            force=False,
            console=Console(speaks=world.is_main),
            world=world,
        )


def trained(*overrides: str) -> int:
    return train(loaded(*overrides))


def loss_of(run: Run) -> float:
    """On the first batch, of the weights that a forward uses."""
    evaluation = evaluate_loss(
        run.parallel,
        run.stream,
        iterations=1,
        micro_batch_size=run.config.batch.micro_rows(run.mesh.layout.data),
        options=run.loss_options,
    )
    assert evaluation is not None
    return evaluation.whole.loss


def resave(*overrides: str) -> float:
    """Go on from the run's last checkpoint and save and export what was loaded under the next number; its loss."""
    run = in_this_layout(*overrides)
    assert run.progress.iteration == 3
    run.progress.iteration = 4
    run.save(wait=True)
    assert run.saved
    run.export(replace=True)
    return loss_of(run)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (LAYOUTS[name][0] > 4)) for name in LAYOUTS]
)
def test_a_checkpoint_goes_from_one_process_to_a_layout_and_back(name: str) -> None:
    """Bit for bit, and the export of it as well: what one process writes, several read, and the other way round."""
    processes, layout = LAYOUTS[name]
    shape = [word for word in layout if "base_model" in word]
    export = "training.export={interval: 3, format: llama, data_type: float32}"
    keys = (*EXACT, export, *shape)
    assert train(loaded(*keys, "training.train_iters=3")) == 0
    before = tensors("run/checkpoint/3")
    assert before["optimizer.norm.weight.exp_avg"].abs().max() > 0
    found = run_distributed(resave, processes, *keys, *layout)
    after = tensors("run/checkpoint/4")
    assert after.keys() == before.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    exports = [Path(f"run/export/llama/{n}/model.safetensors").read_bytes() for n in (3, 4)]
    assert exports[0] == exports[1]
    old, new = (json.loads(Path(f"run/checkpoint/{n}/state.json").read_text()) for n in (3, 4))
    assert new.pop("progress") == {**old.pop("progress"), "iteration": 4}
    assert (old.pop("processes"), new.pop("processes")) == (1, processes)
    for where in ("layout", "micro_batch_size"):
        assert old.pop(where) is not None
        assert new.pop(where) is not None
    assert new == old
    again = new_run(*keys)
    assert again.progress.iteration == 4
    assert found == pytest.approx([loss_of(again)] * processes, rel=1e-13)
    assert all(torch.equal(p, before[f"model.{key}"]) for key, p in again.weights.master.items())


def test_the_main_process_keeps_and_says_what_one_would(capfd: pytest.CaptureFixture[str]) -> None:
    evaluators = "training.evaluators={held_out: {interval: 2, evaluator: {iterations: 2}}}"
    keys = (
        *EXACT,
        evaluators,
        "training.train_iters=4",
        "training.test_iters=1",
        "data.datasets.test.type=random",
    )
    assert train(loaded(*keys, "run.experiment_dir=one")) == 0
    said = capfd.readouterr().out
    assert run_distributed(trained, 2, *keys) == [0, 0]
    out, err = capfd.readouterr()
    one, two = lines("one/metrics.jsonl"), lines("run/metrics.jsonl")
    assert [record.keys() for record in one] == [record.keys() for record in two]
    for mine, theirs in zip(one, two, strict=True):
        for key in ("iteration", "evaluator", "tokens", "targets", "learning_rate", "skipped_steps"):
            assert mine.get(key) == theirs.get(key)
        for key in ("loss", "loss_mean", "grad_norm"):
            assert mine.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-10)
    assert {p.name for p in Path("run").iterdir()} == {p.name for p in Path("one").iterdir()} | {"logs"}
    assert [e["event"] for e in lines("run/events.jsonl")] == [e["event"] for e in lines("one/events.jsonl")]
    # Once each; where it is, how fast it is and how it is laid out apart.
    about_the_layout = re.compile(r"^(processes|data|ZeRO 1): .*\n", re.MULTILINE)
    assert about_the_layout.sub("", out).count("\n") == said.count("\n")
    assert "processes: 2 = 2 data\n" in out
    assert err == ""
    assert [path.name for path in Path("run/logs").iterdir()] == ["rank-1.txt"]
    assert "iteration 4/4 | loss" in Path("run/logs/rank-1.txt").read_text()


def test_a_layout_gives_the_same_bits_each_time() -> None:
    keys = (*EXACT, "training.train_iters=6")
    for folder in ("run", "again"):
        assert run_distributed(trained, 2, *keys, f"run.experiment_dir={folder}") == [0, 0]
    assert losses("run") == losses("again")
    first, second = tensors("run/checkpoint/6"), tensors("again/checkpoint/6")
    assert all(torch.equal(first[name], second[name]) for name in first)


def signalled(*overrides: str) -> tuple[int, int]:
    """One process is told to stop in its third step; the status, and how many steps this process made."""
    steps = 0
    true_step = state_module.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return true_step(*args, **kwargs)

    state_module.train_step = step  # type: ignore[assignment]
    return train(loaded(*overrides)), steps


def test_a_signal_to_one_process_stops_all_after_the_same_step() -> None:
    assert run_distributed(signalled, 2) == [(128 + signal.SIGTERM, 3)] * 2
    assert Checkpoint(Path("run/checkpoint/3")).iteration == 3
    assert lines("run/events.jsonl")[-1]["text"].startswith("stopped after iteration 3")
    assert (
        "rank 1 got SIGTERM: saving after this iteration, then leaving\n" in Path("run/log.txt").read_text()
    )
    assert lines("run/events.jsonl")[0]["layout"] == "2 processes = 2 data, zero_stage 1"
    assert run_distributed(trained, 2) == [0, 0]
    assert list(losses()) == list(range(1, 13))


def on_a_full_disk(*overrides: str) -> str:
    """The disk of one process is full when the second checkpoint is written."""
    true_write = checkpoint_module.dcp.FileSystemWriter.write_data

    def write(self: Any, plan: Any, planner: Any) -> Any:
        if "checkpoint/2" in str(self.path) and os.environ["RANK"] == "1":
            raise ValueError("unexpected pos 64 vs 0") from OSError(errno.ENOSPC, "No space left on device")
        return true_write(self, plan, planner)

    checkpoint_module.dcp.FileSystemWriter.write_data = write  # type: ignore[method-assign]
    try:
        return str(train(loaded(*overrides)))
    except RunFailed as error:
        return str(error)


def test_a_save_that_fails_in_one_process_fails_in_all() -> None:
    keys = ("training.checkpoint={interval: 1, offset: 0}", "training.train_iters=3")
    main, other = run_distributed(on_a_full_disk, 2, *keys)
    assert main == other
    assert main.startswith("iteration 2 is not saved: no space left in run/checkpoint (")
    assert main.endswith("checkpoint run/checkpoint/1 stays")
    assert [path.name for path in Path("run/checkpoint").iterdir()] == ["1"]

    goes_on = "training.checkpoint.on_error=continue"
    answers = run_distributed(on_a_full_disk, 2, *keys, goes_on, "run.experiment_dir=other")
    assert answers == ["0", "0"]
    assert sorted(path.name for path in Path("other/checkpoint").iterdir()) == ["1", "3"]


def refused(*overrides: str) -> list[str]:
    try:
        train(loaded(*overrides))
    except UserError as error:
        return error.problems
    return []


def test_what_the_main_process_refuses_all_refuse() -> None:
    """A change that a checkpoint forbids, and damage that the main process alone has looked for."""
    assert train(loaded("training.train_iters=3")) == 0
    first, second = run_distributed(refused, 2, "optimizer.weight_decay=0.3", "training.train_iters=6")
    assert first == second
    assert first[0] == "optimizer.weight_decay: was 0.01, is now 0.3"

    data = next(Path("run/checkpoint/3").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert run_distributed(trained, 2, "training.train_iters=3") == [0, 0]
    assert Path("run/checkpoint/3.damaged").is_dir()
    assert [e["event"] for e in lines("run/events.jsonl")][-4:] == [
        "checkpoint_damaged",
        "resumed",
        "saved",
        "finished",
    ]


@pytest.mark.parametrize(("processes", "rows"), [(1, 1), (1, 2), (2, 1)])
def test_going_on_with_other_micro_batches_is_the_same_run(processes: int, rows: int) -> None:
    """Saved with 4 rows at once, gone on with fewer: the remaining batches and what they do to the weights are the same."""
    keys = (*EXACT, "training.train_iters=6")
    assert train(loaded(*keys)) == 0
    again = "run.experiment_dir=again"
    assert train(loaded(*EXACT, again, "training.train_iters=3")) == 0
    fewer = (*keys, again, f"batch.micro_batch_size={rows}")
    if processes == 1:
        assert train(loaded(*fewer)) == 0
    else:
        assert run_distributed(trained, processes, *fewer) == [0] * processes
    assert losses("again") == pytest.approx(losses("run"), rel=1e-12)
    mine, theirs = tensors("again/checkpoint/6"), tensors("run/checkpoint/6")
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
