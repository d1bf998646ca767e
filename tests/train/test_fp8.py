"""Runs in fp8: what they compute with, how they go on, and what they are evaluated with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modelyard.errors import UserError
from modelyard.model.fp8 import Fp8Linear
from modelyard.train.run import train
from tests.train.helpers import loaded, losses, new_run

pytestmark = pytest.mark.usefixtures("tiny")
WIDE = (
    "model.base_model.transformer.hidden_size=32",
    "model.base_model.transformer.ffn_hidden_size=48",
    "model.distributed.training_dtype=bf16",
    "training.train_iters=6",
    "training.evaluators={held_out: {interval: 6, iterations: 2}}",
)
ROWWISE = (*WIDE, "training.fp8=rowwise")


def test_a_run_in_fp8_learns_what_one_in_bf16_does_and_goes_on_to_the_bit() -> None:
    assert train(loaded(*WIDE, "run.experiment_dir=bf16")) == 0
    assert train(loaded(*ROWWISE)) == 0
    assert train(loaded(*ROWWISE, "training.train_iters=3", "run.experiment_dir=again")) == 0
    assert train(loaded(*ROWWISE, "run.experiment_dir=again")) == 0
    whole, again, plain = losses(), losses("again"), losses("bf16")
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    assert again == whole
    assert whole != plain
    assert whole == pytest.approx(plain, rel=0.02)
    log = Path("run/log.txt").read_text()
    assert "the blocks' products are in fp8, scaled rowwise, emulated: slower here than without" in log
    # Nothing of it is in checkpoints: from here on in bf16.
    more = "training.train_iters=7"
    assert train(loaded(*WIDE, more, "run.experiment_dir=again")) == 0
    assert losses("again")[7] == pytest.approx(whole[6], rel=0.2)


def test_the_matrices_are_those_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, scaling in ((WIDE, None), (ROWWISE, "rowwise"), ((*WIDE, "training.fp8=tensorwise"), "tensorwise")):  # fmt: skip
        model = new_run(*words).model
        assert isinstance(model, torch.nn.Module)
        matrices = [module for module in model.modules() if isinstance(module, Fp8Linear)]
        assert len(matrices) == (0 if scaling is None else 7)
        assert {module.scaling for module in matrices} == ({scaling} if scaling else set())
    monkeypatch.setattr("modelyard.train.build.obstacle", lambda device: "a newer GPU")
    with pytest.raises(UserError, match=r"^training\.fp8: rowwise needs a newer GPU; write fp8: none"):
        new_run(*ROWWISE)
    new_run(*WIDE)
