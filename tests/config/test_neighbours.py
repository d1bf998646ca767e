"""Keys without effect, and features that are not built: harmless values pass, others are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelyard.config.document import Document
from modelyard.config.loader import TrainConfig, load_config
from modelyard.config.neighbours import (
    NO_EFFECT,
    NOT_BUILT,
    NoEffect,
    NotBuilt,
    neighbour_keys,
    take_neighbours,
)
from modelyard.config.problems import all_keys
from modelyard.config.yaml import parse_yaml
from tests.config.helpers import TINY, load_tiny, tiny_problems, write

EXAMPLES: dict[type, Any] = {int: 3, float: 60.5, bool: True, str: "auto", dict: {"initial": 1}}


def document_with(path: tuple[str | int, ...], value: Any) -> Document:
    document = Document({}, {}, "x")
    document.put(path, value, "x:1")
    return document


@pytest.mark.parametrize("row", NO_EFFECT, ids=lambda row: row.key)
def test_keys_without_effect(row: NoEffect) -> None:
    document = document_with(row.path, EXAMPLES[row.kind])
    assert take_neighbours(document) == ([], [row])
    assert document.values == {}
    assert take_neighbours(document_with(row.path, None)) == ([], [row])
    wrong = [1, 2]
    (problem,), _ = take_neighbours(document_with(row.path, wrong))
    assert problem.startswith(f"x:1: {row.key} = [1, 2]: expected ")


@pytest.mark.parametrize("feature", NOT_BUILT, ids=lambda feature: feature.key)
def test_features_that_are_not_built(feature: NotBuilt) -> None:
    for value in feature.harmless:
        document = document_with(feature.path, value)
        assert take_neighbours(document) == ([], [])
        assert document.values == {}
    (problem,), _ = take_neighbours(document_with(feature.path, 17))
    assert problem == f"x:1: {feature.key} = 17: {feature.instead}"


def test_one_is_not_yes() -> None:
    assert take_neighbours(parse_yaml("model: {base_model: {transformer: {num_experts: yes}}}\n", "x"))[
        0
    ] == [
        "x:1: model.base_model.transformer.num_experts = yes: mixtures of experts are not supported; write num_experts: 1"
    ]


def test_no_key_is_in_two_places() -> None:
    keys = [row.key for row in NO_EFFECT] + [feature.key for feature in NOT_BUILT]
    assert len(keys) == len(set(keys))
    fields = [key for key in all_keys(TrainConfig) if key not in keys]
    assert not set(keys) & set(fields)


def test_keys_of_a_section() -> None:
    assert {"num_grad_buffers", "layers_per_stage"} <= set(neighbour_keys(("model", "multi_stage")))
    assert "num_workers" in neighbour_keys(("training",))


def test_unknown_keys_in_sections_of_neighbours(tmp_path: Path) -> None:
    problems = tiny_problems(
        tmp_path,
        "model.multi_stage.zero_stag=2",
        "schedule.x=1",
        "training.wandb.entity=me",
    )
    assert problems[0].startswith(
        "override 2: unknown key 'x' in schedule; known keys: data_batch_warn_time_ms,"
    )
    assert problems[1:] == [
        "override 3: unknown key 'entity' in training.wandb; did you mean 'entity_name'?",
        "override 1: unknown key 'zero_stag' in model.multi_stage; did you mean 'zero_stage'?",
    ]


def test_what_users_of_the_dialect_write(tmp_path: Path) -> None:
    text = """\
schedule: {pipeline_overlap: true}
profiling: {cpu: false, cuda: false, table_width: 100}
"""
    loaded = load_config(
        [write(tmp_path, TINY + text)],
        [
            "model.multi_stage={zero_stage: 2, num_grad_buffers: 2}",
            "model.distributed.tensor_parallel=1",
            "training.wandb={entity_name: null, project_name: mine}",
            "training.num_workers=8",
            "model.base_model.transformer.attention_dropout=0.0",
            "model.base_model.transformer.peft={type: none}",
            "optimizer.gradient_scaler={initial: 65536}",
            "data.sampling.gpu=no",
        ],
    )
    assert {row.key for row in loaded.without_effect} == {
        "schedule.pipeline_overlap",
        "profiling.table_width",
        "model.multi_stage.num_grad_buffers",
        "training.num_workers",
        "optimizer.gradient_scaler",
    }
    assert loaded.document["model"]["multi_stage"] == {"zero_stage": 2, "num_grad_buffers": 2}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.distributed.world_size=8", "torchrun or --nproc says how many processes there are"),
        ("model.distributed.pipeline_first=yes", "tensor, sequence, pipeline, data"),
        ("model.multi_stage.layers_per_stage=2", "model.distributed.stages_per_process says how many"),
        ("batch.breadth_first_micro_batches=2", "write batch.sequential_micro_batches"),
        (
            "model.base_model.transformer.hidden_dropout=0.1",
            "dropout is not supported; write hidden_dropout: 0",
        ),
        ("model.base_model.enable_dpo=yes", "preference tuning is not supported yet"),
        ("training.checkpoint.callback={script: x}", "shell callbacks are not run"),
        ("data.fim={rate: 0.5}", "fill-in-the-middle is not supported yet"),
        ("reference_models={a: {}}", "distillation and DPO are not supported yet"),
        (
            "data.datasets.training={type: fim, rate: 0.5}",
            "fill-in-the-middle datasets are not supported yet",
        ),
        ("data.datasets.training={type: streaming}", "Redis streams are not supported"),
        ("training.evaluators.x={interval: 1, evaluator: {type: lm_eval}}", "lm_eval"),
        ("profiling.ranks=[1]", "rank 0 is the one that is traced"),
        ("schedule.profile_schedule=yes", "training.profiling.iterations writes traces"),
    ],
)
def test_features_are_refused_by_name(tmp_path: Path, override: str, problem: str) -> None:
    problems = tiny_problems(tmp_path, override)
    assert len(problems) == 1
    assert problems[0].startswith("override 1: ")
    assert problem in problems[0]


def test_a_section_left_empty_is_no_problem(tmp_path: Path) -> None:
    load_tiny(tmp_path, "model.multi_stage=null", "profiling=null", "training.wandb=null", "schedule={}")
