"""Whatever is written at whatever key, the answer is one line a problem, with its place, and never a traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modelyard.config.document import dotted
from modelyard.config.loader import load_config
from modelyard.config.newest import RENAMED, RULES, SECTIONS
from modelyard.config.prepare import PrepareConfig
from modelyard.config.problems import all_keys, shown
from modelyard.config.train import TrainConfig
from modelyard.errors import UserError
from tests.config.helpers import TINY, write

PREPARE = "output_path: out\ndataset: {path: x}\ntokenizer: {path: y}\n"
OLDER = (
    "training.validation", "training.evaluations.x", "training.evaluators.evaluator", "data.format", "data.path",
    "data.split", "data.datasets.Training", "data.truncate_documents", "optimizer.learning_rate",
    "model.base_model.transformer.rotary_embedding_scale", "dataset.name_or_path",
)  # fmt: skip


@pytest.mark.parametrize("value", ["text", "[1]"])
@pytest.mark.parametrize("kind", ["train", "prepare"])
def test_any_value_at_any_key(tmp_path: Path, kind: str, value: str) -> None:
    file = write(tmp_path, TINY if kind == "train" else PREPARE)
    schema = TrainConfig if kind == "train" else PrepareConfig
    newest = [dotted(key) for key in (*RULES, *SECTIONS)]
    for key in (*all_keys(schema), *OLDER, *newest, *RENAMED):
        try:
            load_config([file], [f"{key}={value}"])
        except UserError as error:
            for problem in error.problems:
                assert re.match(r"override 1: |.*config\.yaml(:\d+)?: ", problem), problem
                assert "\n" not in problem
                assert "Input should" not in problem, "pydantic's own words"


def test_values_are_shown_as_they_are_written() -> None:
    assert [shown(value) for value in (None, True, False, 1e-5, "x", [1])] == [
        "null",
        "yes",
        "no",
        "1e-05",
        "'x'",
        "[1]",
    ]
    assert len(shown("x" * 100)) == 60


def test_how_evaluators_are_switched_off(tmp_path: Path) -> None:
    evaluators = "evaluators: {training: {interval: 5, evaluator: {type: loss, iterations: 1}}}"
    file = write(tmp_path, TINY.replace("train_iters: 100", f"train_iters: 100, {evaluators}"))
    assert list(load_config([file]).train.training.evaluators) == ["training"]
    with pytest.raises(UserError, match=r"training.evaluators = null: expected a section .*, or {} for none"):
        load_config([file], ["training.evaluators=null"])
    assert load_config([file], ["training.evaluators={}"]).train.training.evaluators == {}
