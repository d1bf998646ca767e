"""Whose folder it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from modelyard.errors import UserError
from modelyard.train.run import train
from tests.train.helpers import lines, loaded

pytestmark = pytest.mark.usefixtures("tiny")
ONE = "training.train_iters=1"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_that_holds_something_else_is_refused_and_untouched() -> None:
    run = Path("run")
    run.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "vocab.json"):
        (run / name).write_text("{}")
    before = content(run)
    with pytest.raises(UserError) as refusal:
        train(loaded(ONE))
    assert str(refusal.value) == (
        "run.experiment_dir: run is not the folder of a run, it holds config.json, model.safetensors, tokenizer.json "
        "and 1 more; name an empty or new folder, or use this one with --force"
    )
    assert content(run) == before
    assert train(loaded(ONE), force=True) == 0
    assert train(loaded("training.train_iters=2")) == 0  # now it is one


def test_what_people_and_schedulers_put_beside_is_no_reason() -> None:
    Path("run").mkdir()
    for name in ("train.yaml", "job.sh", "slurm-1.out", ".gitignore"):
        (Path("run") / name).touch()
    assert train(loaded(ONE)) == 0


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("model.distributed.seed=9", "model.distributed.seed: was 1234, is now 9"),
        ("model.base_model.transformer.num_layers=2", "architecture.num_layers: was 1, is now 2"),
        ("data.datasets.training.document_length=21", "data.datasets.training: the rows are not those"),
    ],
)
def test_records_of_another_run_are_not_overwritten(override: str, difference: str) -> None:
    assert train(loaded(ONE)) == 0
    shutil.rmtree("run/checkpoint")
    before = content(Path("run"))
    with pytest.raises(UserError) as refusal:
        train(loaded(ONE, override))
    (problem,) = refusal.value.problems
    assert problem.startswith("run.experiment_dir: run belongs to another run, started 2")
    assert difference in problem
    assert content(Path("run")) == before
    assert train(loaded(ONE, override), force=True) == 0
    assert difference in lines("run/events.jsonl")[-3]["forced"][0]


def test_a_run_that_got_nowhere_may_be_changed() -> None:
    assert train(loaded(ONE)) == 0
    shutil.rmtree("run/checkpoint")
    Path("run/metrics.jsonl").write_text("")
    assert train(loaded(ONE, "model.distributed.seed=9")) == 0


def test_the_same_run_starts_over_where_its_checkpoints_are_gone() -> None:
    assert train(loaded(ONE)) == 0
    first = lines("run/metrics.jsonl")[0]["loss"]
    shutil.rmtree("run/checkpoint")
    assert train(loaded(ONE, "optimizer.learning_rate.base=0.02")) == 0
    assert lines("run/metrics.jsonl")[0]["loss"] == first
