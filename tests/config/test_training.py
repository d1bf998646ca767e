"""Intervals, batches and what depends on them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from modelyard.config.batch import BatchConfig
from modelyard.config.training import IntervalConfig, TrainingConfig


def due(steps: int, **settings: Any) -> list[int]:
    section = IntervalConfig(**settings)
    return [step for step in range(1, steps + 1) if section.due(step)]


def test_intervals_and_offsets() -> None:
    assert due(10, interval=3) == [3, 6, 9]
    assert due(10, interval=3, offset=1) == [1, 4, 7, 10]
    assert due(10, interval=3, offset=7) == [1, 4, 7, 10]
    assert due(10) == []


def test_micro_batches() -> None:
    def sizes(data: int = 1, **settings: int) -> tuple[int, int]:
        batch = BatchConfig(batch_size=8, **settings)
        return batch.micro_batches(data), batch.micro_rows(data)

    assert [sizes(), sizes(2), sizes(8)] == [(1, 8), (1, 4), (1, 1)]
    assert [sizes(micro_batch_size=2), sizes(2, micro_batch_size=2)] == [(4, 2), (2, 2)]
    assert [sizes(sequential_micro_batches=4), sizes(2, sequential_micro_batches=4)] == [(4, 2), (4, 1)]
    assert sizes(2, micro_batch_size=2, sequential_micro_batches=2) == (2, 2)
    with pytest.raises(
        ValidationError,
        match="sequential_micro_batches 8 does not fit: batch_size 8 / micro_batch_size 2 makes 4",
    ):
        BatchConfig(batch_size=8, micro_batch_size=2, sequential_micro_batches=8)
    with pytest.raises(ValidationError, match="nearest that are: 6 and 9"):
        BatchConfig(batch_size=8, micro_batch_size=3)
    with pytest.raises(
        ValidationError, match=r"batch_size 8 is not a multiple of sequential_micro_batches 3"
    ):
        BatchConfig(batch_size=8, sequential_micro_batches=3)
    with pytest.raises(ValidationError, match="batch_size"):
        BatchConfig(micro_batch_size=2)


def test_tokens_of_a_step() -> None:
    assert BatchConfig(batch_size=256, sequence_length=4096).tokens == 1_048_576


def test_shutdown_falls_on_checkpoints() -> None:
    def training(**sections: Any) -> TrainingConfig:
        return TrainingConfig(train_iters=10, **sections)

    assert training(checkpoint={"interval": 5}, shutdown={"interval": 10}).shutdown.due(10)
    with pytest.raises(
        ValidationError, match=r"shutdown.interval 7 must be a multiple of checkpoint.interval 5"
    ):
        training(checkpoint={"interval": 5}, shutdown={"interval": 7})
    with pytest.raises(
        ValidationError, match=r"shutdown.interval 7 must be a multiple of checkpoint.interval None"
    ):
        training(shutdown={"interval": 7})
    with pytest.raises(ValidationError, match=r"shutdown.offset 2 must fall on a checkpoint"):
        training(checkpoint={"interval": 5}, shutdown={"interval": 10, "offset": 2})
