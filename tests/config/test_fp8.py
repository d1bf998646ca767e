"""What `training.fp8` asks of a config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.config.helpers import load_tiny, tiny_problems

WANTED = ("training.fp8=rowwise", "model.distributed.training_dtype=bf16")
TRANSFORMER = "model.base_model.transformer"


def test_none_where_nothing_is_said(tmp_path: Path) -> None:
    assert load_tiny(tmp_path).train.training.fp8 == "none"


def test_what_works(tmp_path: Path) -> None:
    split = (
        f"{TRANSFORMER}.head_groups=4",
        "model.distributed.tensor_parallel=4",
        "model.distributed.sequence_data_parallel=4",
    )
    for words in ((), split):  # 4 heads of 16, 64 tokens in four chunks of 16
        assert load_tiny(tmp_path, *WANTED, *words).train.training.fp8 == "rowwise"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("model.distributed.training_dtype=fp32",), "rowwise with model.distributed.training_dtype float32"),
        (("training.fp8=tensorwise", "model.distributed.training_dtype=fp16"), "tensorwise with .* float16"),
        (("batch.sequence_length=40",), "batch.sequence_length 40 is not a multiple of 16"),
        (
            ("model.distributed.sequence_data_parallel=2", "batch.sequence_length=48"),
            "sequence_length 48 is not a multiple of 16 x sequence_data_parallel 2 = 32",
        ),
        ((f"{TRANSFORMER}.ffn_hidden_size=250",), "multiples of 16, and ffn_hidden_size is 250"),
        (
            ("model.distributed.tensor_parallel=2", f"{TRANSFORMER}.head_groups=2", f"{TRANSFORMER}.kv_channels=8"),
            "multiples of 16 x tensor_parallel 2 = 32, and head_groups x head_size is 16",
        ),
        ((f"{TRANSFORMER}.peft.type=lora", "training.train_iters=1"), "rowwise with an adapter"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_one_line(tmp_path: Path, words: tuple[str, ...], problem: str) -> None:
    found = [line for line in tiny_problems(tmp_path, *WANTED, *words) if "training.fp8: " in line]
    assert len(found) == 1, found
    assert re.search(problem, found[0]), found[0]


def test_another_word_is_answered_with_those_there_are(tmp_path: Path) -> None:
    (problem,) = tiny_problems(tmp_path, "training.fp8=blockwise")
    assert "expected one of none, tensorwise, rowwise" in problem
