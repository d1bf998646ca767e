"""The layout as `validate` shows it, every line of it counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.config.layout import Layout
from modelyard.plan.layout import layout_line
from modelyard.plan.summary import summarise
from tests.config.helpers import load_tiny

DEEP = ("model.base_model.transformer.num_layers=6", "batch.batch_size=32", "batch.micro_batch_size=2")


def shown(folder: Path, *overrides: str, processes: int | None = None) -> list[str]:
    text, problems, _ = summarise(load_tiny(folder, *DEEP, *overrides), processes)
    assert problems == []
    block = text.partition("\n\nlayout\n")[2].partition("\n\n")[0]
    return [" ".join(line.split()) for line in block.splitlines()]


def test_one_process(tmp_path: Path) -> None:
    assert shown(tmp_path) == [
        "processes 1 (--nproc N shows what another number does)",
        "data all 32 rows of a step, in 16 micro-batches of 2",
    ]


@pytest.mark.parametrize(
    ("stage", "kept"),
    [
        (1, "optimizer state and master weights"),
        (2, "optimizer state and master weights, gradients between micro-batches"),
        (
            3,
            "optimizer state and master weights, gradients between micro-batches, weights between forward and backward",
        ),
    ],
)
def test_zero_stages(tmp_path: Path, stage: int, kept: str) -> None:
    assert shown(tmp_path, f"model.multi_stage.zero_stage={stage}", processes=4) == [
        "processes 4 = 4 data (1, 2, 4, 8, 16 processes are possible)",
        "data 4 share the rows of a step: 8 of 32 each, in 4 micro-batches of 2",
        f"ZeRO {stage} each keeps 1/4 of {kept}",
    ]


def test_every_dimension(tmp_path: Path) -> None:
    lines = shown(
        tmp_path,
        "model.distributed.tensor_parallel=2",
        "model.base_model.transformer.head_groups=2",
        "model.distributed.sequence_tensor_parallel=yes",
        "model.distributed.sequence_data_parallel=2",
        "model.distributed.pipeline_parallel=2",
        "model.distributed.pipeline_schedule=zbv",
        "model.distributed.data_parallel_replicas=2",
        "model.multi_stage={cpu_offload: yes, recompute: selective}",
        processes=32,
    )
    assert lines == [
        "processes 32 = 4 data x 2 pipeline x 2 context x 2 tensor (16, 32, 64, 128 processes are possible)",
        "data 4 share the rows of a step: 8 of 32 each, in 4 micro-batches of 2",
        "pipeline 2 share the layers, 2 of 4 stages each, as zbv has it",
        # The head costs half a layer: with two layers it would be the slowest stage.
        "0 embedding, layer 0; layer 5, head",
        "1 layers 1-2; layers 3-4",
        "context 2 share each row: 32 of 64 tokens each, in two stretches",
        "tensor 2 share each matrix, and the tokens in between",
        "ZeRO 1 each keeps 1/4 of optimizer state and master weights; 2 copies of the model",
        "in host memory master weights, gradients and optimizer state",
        "computed again in the backward, all activations but those of matrix products and attention",
    ]


@pytest.mark.parametrize(
    ("overrides", "processes", "amount"),
    [
        # Blocks x tokens of a micro-batch x hidden x bytes.
        ((), 1, "160.0 KiB"),  # 5 x 128 x 64 x 4: the last of 6 stays
        (("model.distributed.training_dtype=bf16",), 1, "80.0 KiB"),
        (
            (
                "model.distributed.training_dtype=bf16",
                "model.base_model.transformer.full_precision_residual=yes",
            ),
            1,
            "160.0 KiB",
        ),
        (("model.distributed.sequence_data_parallel=2",), 2, "80.0 KiB"),
        (("model.distributed.pipeline_parallel=3",), 3, "64.0 KiB"),  # 2 blocks; the last process has 1
        (
            (
                "model.distributed.tensor_parallel=2",
                "model.base_model.transformer.head_groups=2",
                "model.distributed.sequence_tensor_parallel=yes",
            ),
            2,
            "80.0 KiB",
        ),
    ],
)
def test_offloaded_inputs(tmp_path: Path, overrides: tuple[str, ...], processes: int, amount: str) -> None:
    keys = "model.multi_stage={recompute: full, offload_activations: yes}"
    lines = shown(tmp_path, keys, *overrides, processes=processes)
    assert lines[-2:] == [
        "computed again in the backward, every block from its input on",
        "offloaded from a GPU, every block's input, to the host's memory until the backward: "
        f"{amount} a process for each micro-batch on its way; on a CPU nothing changes",
    ]


def test_tensor_parallelism_alone_shares_no_copies(tmp_path: Path) -> None:
    lines = shown(
        tmp_path, "model.distributed.tensor_parallel=2", "model.base_model.transformer.head_groups=2"
    )
    assert lines[0] == "processes 2 = 2 tensor (2, 4, 8, 16, 32 processes are possible)"
    assert lines[-1] == "ZeRO 1 nothing to share: no two processes have the same weights and other tokens"


@pytest.mark.parametrize(
    ("overrides", "processes", "where"),
    [
        ((), 2, "each whole in one process"),
        (
            ("model.distributed.tensor_parallel=2", "model.base_model.transformer.head_groups=2"),
            4,
            "each on 2 processes",
        ),
    ],
)
def test_copies_share_nothing(tmp_path: Path, overrides: tuple[str, ...], processes: int, where: str) -> None:
    lines = shown(tmp_path, "model.distributed.data_parallel_replicas=2", *overrides, processes=processes)
    assert lines[-1] == f"ZeRO 1 nothing to share: 2 copies of the model, {where}"


def test_one_line_for_the_records() -> None:
    assert layout_line(Layout()) == "1 process"
    assert layout_line(Layout(pipeline=2, tensor=2)) == "4 processes = 2 pipeline x 2 tensor, zero_stage 1"
    assert layout_line(Layout(replicate=2, shard=3, zero_stage=3)) == "6 processes = 6 data, zero_stage 3"


def test_a_layout_that_is_impossible_is_a_problem_and_the_rest_is_shown(tmp_path: Path) -> None:
    text, problems, _ = summarise(load_tiny(tmp_path, *DEEP), 5)
    assert problems == [
        "override 2: batch.batch_size: 32 rows cannot be dealt evenly to 5 data-parallel processes; possible: "
        "batch_size 30 or 35, or --nproc 1, 2, 4, 8, 16"
    ]
    assert "\n\nlayout\n  processes  5 cannot be laid out so\n\ndata\n" in text
