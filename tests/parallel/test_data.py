"""Data parallelism alone: ZeRO stages, copies, accumulation."""

from __future__ import annotations

import pytest

from modelyard.config.layout import Layout
from tests.parallel.matrix import Case, compare
from tests.parallel.processes import run_distributed


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_zero_stage_computes_what_one_process_does(stage: int) -> None:
    run_distributed(compare, 2, Case(Layout(shard=2, zero_stage=stage)))  # type: ignore[arg-type]


def test_copies_of_shards_compute_what_one_process_does() -> None:
    run_distributed(compare, 4, Case(Layout(replicate=2, shard=2, zero_stage=2), micro_batch_size=1))
