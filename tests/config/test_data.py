"""The `data` section: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from modelyard.config.data import DATASET_TYPES, REFUSED_DATASET_TYPES, DataConfig, SamplingConfig


def training(**dataset) -> DataConfig:
    return DataConfig.model_validate({"datasets": {"training": dataset}})


def test_defaults():
    config = DataConfig()
    assert config.datasets == {}
    assert config.sampling == SamplingConfig(seed=784569, shuffle="epoch", gpu=True)
    assert config.tokenizer.path is None


def test_types_compose():
    config = training(
        type="blended",
        weights=[1, 0.5],
        datasets=[
            {"type": "file", "path": "a.yaml"},
            {"type": "slice", "end": 0.5, "dataset": {"type": "memmap", "path": "b", "num_documents": 3}},
        ],
    ).datasets["training"]
    assert [part.type for part in config.datasets] == ["file", "slice"]
    assert (config.datasets[1].begin, config.datasets[1].end) == (0.0, 0.5)


@pytest.mark.parametrize("kind", REFUSED_DATASET_TYPES)
def test_types_of_other_programs_are_refused_by_name(kind):
    with pytest.raises(ValidationError, match=f"dataset type '{kind}' cannot be used"):
        training(type=kind)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            {"type": "memap", "path": "x"},
            r"unknown dataset type 'memap' \(one of .*\); did you mean 'memmap'\?",
        ),
        ({"path": "x"}, "a dataset needs a type"),
        ({"type": ["memmap"]}, "unknown dataset type"),
        ({"type": "slice", "begin": 0.5, "end": 0.5, "dataset": {"type": "random"}}, "slice is empty"),
        ({"type": "slice", "end": 1.5, "dataset": {"type": "random"}}, "less than or equal to 1"),
        ({"type": "concatenated", "datasets": []}, "at least 1 item"),
        (
            {"type": "blended", "datasets": [{"type": "random"}], "weights": [1, 2]},
            "2 weights for 1 datasets",
        ),
        ({"type": "blended", "datasets": [{"type": "random"}], "weights": [0]}, "all weights are 0"),
        ({"type": "blended", "datasets": [{"type": "random"}], "weights": [float("nan")]}, "finite number"),
        (
            {"type": "blended", "datasets": [{"type": "random"}], "weights": [-1]},
            "greater than or equal to 0",
        ),
        ({"type": "random", "length": 3}, "Extra inputs"),
        ({"type": "memmap"}, "Field required"),
        (
            {"type": "sampled", "dataset": {"type": "random"}, "sampling": {"shuffle": "legacy"}},
            "Megatron's order",
        ),
        (
            {"type": "sampled", "dataset": {"type": "random"}, "sampling": {"shuffle": "all"}},
            "'epoch', 'full'",
        ),
    ],
)
def test_what_is_wrong_is_said(dataset, message):
    with pytest.raises(ValidationError, match=message):
        training(**dataset)


def test_every_key_is_described():
    for section in (*DATASET_TYPES.values(), SamplingConfig, DataConfig):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
