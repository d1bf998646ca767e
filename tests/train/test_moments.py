"""Moments of a run: in eight bits, and of what is trained alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modelyard.errors import UserError
from modelyard.report.inspect_blocks import Inspection
from modelyard.report.inspect_checkpoint import inspect_checkpoint
from modelyard.report.inspect_data import Options
from modelyard.train.checkpoint import Checkpoint, save_checkpoint
from modelyard.train.run import train
from tests.parallel.processes import run_distributed
from tests.train.helpers import loaded, losses, new_run

pytestmark = pytest.mark.usefixtures("tiny")

EIGHT = "optimizer.state=8bit"
WIDE = (
    "model.base_model={vocab_size: 160, transformer: {num_layers: 2, hidden_size: 64, head_groups: 2, ffn_hidden_size: 192}}",
    "optimizer.learning_rate.base=0.003",
)
"""All matrices have 4,096 values or more."""
FROZEN = "model.base_model.embeddings_lr_scale=0"


def tensors(folder: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(Path(folder))
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors().items()}
    checkpoint.load_into(found)
    return found


def trained(*overrides: str) -> int:
    return train(loaded(*overrides))


def test_a_run_with_eight_bits_follows_that_with_all() -> None:
    assert train(loaded(*WIDE)) == 0
    assert train(loaded(*WIDE, EIGHT, "run.experiment_dir=eight")) == 0
    whole, eight = losses("run"), losses("eight")
    assert eight == pytest.approx(whole, rel=5e-3)
    assert eight[1] == whole[1]
    assert eight[12] != whole[12]
    expected, found = tensors("run/checkpoint/12"), tensors("eight/checkpoint/12")
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    assert {t.dtype for t in found.values()} == {torch.float32}
    bytes_of = [new_run(*WIDE, *more).optimizer.nbytes for more in ((), (EIGHT, "run.experiment_dir=eight"))]
    assert bytes_of[1] < 0.27 * bytes_of[0]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_going_on_in_the_same_layout_is_the_same_to_the_bit(processes: int) -> None:
    keys = (*WIDE, EIGHT)
    for folder, stops in (("whole", [12]), ("run", [1, 5, 12])):
        for stop in stops:
            where = (f"run.experiment_dir={folder}", f"training.train_iters={stop}")
            if processes == 1:
                assert trained(*keys, *where) == 0
            else:
                zero = "model.multi_stage.zero_stage=2"
                assert run_distributed(trained, processes, *keys, *where, zero) == [0] * processes
    assert losses("run") == losses("whole")
    whole, resumed = tensors("whole/checkpoint/12"), tensors("run/checkpoint/12")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_eight_bits_on_several_processes_and_back() -> None:
    """Blocks lie otherwise in the shards: it is no more than another rounding. Between the two kinds a run may change."""
    assert train(loaded(*WIDE)) == 0
    two = (*WIDE, "run.experiment_dir=two")
    assert run_distributed(
        trained, 2, *two, EIGHT, "model.multi_stage.zero_stage=3", "training.train_iters=8"
    ) == [0, 0]
    assert train(loaded(*two)) == 0
    assert losses("two") == pytest.approx(losses("run"), rel=5e-3)


def test_what_is_frozen_has_no_moments_in_checkpoints() -> None:
    keys = (FROZEN, "training.train_iters=3")
    assert train(loaded(*keys)) == 0
    found = tensors("run/checkpoint/3")
    assert "model.embed_tokens.weight" in found
    assert [name for name in found if "embed_tokens" in name] == ["model.embed_tokens.weight"]
    assert "optimizer.norm.weight.exp_avg_sq" in found
    inspection = Inspection("")
    inspect_checkpoint(Path("run/checkpoint/3"), Options(), inspection)
    assert not inspection.faults
    assert train(loaded(FROZEN, "run.experiment_dir=whole")) == 0
    assert train(loaded(FROZEN)) == 0
    assert losses() == losses("whole")


def test_what_was_frozen_begins_anew_where_that_is_asked_for() -> None:
    assert train(loaded(FROZEN, "training.train_iters=3")) == 0
    with pytest.raises(UserError, match=r"embeddings_lr_scale: was 0\.0, is now None"):
        train(loaded("training.train_iters=4"))
    before = tensors("run/checkpoint/3")["model.embed_tokens.weight"]
    assert train(loaded("training.train_iters=4"), force=True) == 0
    after = tensors("run/checkpoint/4")
    assert after["optimizer.embed_tokens.weight.exp_avg"].abs().max() > 0
    assert not torch.equal(after["model.embed_tokens.weight"], before)


def test_checkpoints_with_zeros_for_what_is_frozen_are_still_read() -> None:
    """As they were written before; and their config has not the keys that came since."""
    assert train(loaded(FROZEN, "run.experiment_dir=whole")) == 0
    assert train(loaded(FROZEN, "training.train_iters=4")) == 0
    checkpoint = Checkpoint(Path("run/checkpoint/4"))
    found = tensors("run/checkpoint/4")
    for moment in ("exp_avg", "exp_avg_sq"):
        name = f"embed_tokens.weight.{moment}"
        found[f"optimizer.{name}"] = torch.zeros_like(found["model.embed_tokens.weight"])
    config = checkpoint.config
    del config["optimizer"]["state"], config["optimizer"]["gradient_scaler"]
    del config["model"]["base_model"]["transformer"]["peft"]
    state = checkpoint.state
    del state["format_version"]
    for key in ("loss_scale", "steps_at_scale", "overflows"):
        del state["progress"][key]
    save_checkpoint(
        Path("run/checkpoint/5"),
        parameters={n.removeprefix("model."): t for n, t in found.items() if n.startswith("model.")},
        moments={n.removeprefix("optimizer."): t for n, t in found.items() if n.startswith("optimizer.")},
        state=state,
        config=config,
    )
    assert train(loaded(FROZEN)) == 0
    assert losses() == losses("whole")
