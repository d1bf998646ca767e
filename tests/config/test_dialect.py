"""Older spellings: each row of the table, its value, its notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelyard.config.dialect import repair
from modelyard.config.loader import load_config
from modelyard.config.yaml import parse_override, parse_yaml
from modelyard.errors import UserError
from tests.config.helpers import TINY, write


def repaired(text: str) -> tuple[dict[str, Any], list[str]]:
    document = parse_yaml(text, "x")
    notices, problems = repair(document)
    assert problems == []
    return document.values, notices


def evaluators(text: str) -> tuple[Any, list[str]]:
    values, notices = repaired(text)
    return values["training"]["evaluators"], notices


LOSS = {"interval": 10, "evaluator": {"iterations": 2}}


def test_validation_of_the_first_eras() -> None:
    found, notices = evaluators("training:\n  validation: {iterations: 2, interval: 10}\n")
    assert found == {"validation": LOSS}
    assert notices == ["x:2: training.validation is now training.evaluators.validation"]


def test_evaluations_of_the_third_era() -> None:
    found, notices = evaluators(
        "training:\n  evaluations:\n    books: {iterations: 2, interval: 10}\n    web: {interval: 5}\n"
    )
    assert found == {"books": LOSS, "web": {"interval": 5}}
    assert notices == [
        "x:3: training.evaluations.books is now training.evaluators.books",
        "x:4: training.evaluations.web is now training.evaluators.web",
    ]


def test_the_unnamed_evaluator_is_called_after_its_dataset() -> None:
    found, notices = evaluators(
        "training:\n  evaluators:\n    interval: 10\n    evaluator: {type: loss, iterations: 2, dataset_name: held_out}\n"
    )
    assert found == {
        "held_out": {
            "interval": 10,
            "evaluator": {"type": "loss", "iterations": 2, "dataset_name": "held_out"},
        }
    }
    assert notices == [
        "x:3: the unnamed evaluator in training.evaluators is now training.evaluators.held_out"
    ]


def test_an_evaluators_keys_beside_its_interval() -> None:
    found, notices = evaluators("training: {evaluators: {v: {interval: 10, iterations: 2}}}\n")
    assert found == {"v": LOSS}
    assert notices == [
        "x:1: training.evaluators.v: iterations now belongs in training.evaluators.v.evaluator"
    ]


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("data: {sampling: {use_loss_masking_spans: yes}}", "batch.use_loss_masking_spans", True),
        ("data: {truncate_documents: no}", "batch.truncate_documents", False),
        ("data: {datasets: {Training: {type: random}}}", "data.datasets.training", {"type": "random"}),
        ("batch: {depth_first_micro_batches: 4}", "batch.sequential_micro_batches", 4),
        ("optimizer: {learning_rate: 1e-3}", "optimizer.learning_rate.base", 1e-3),
        ("pretrained: {load_weights: no}", "pretrained.model_weights", False),
        ("model: {distributed: {distributed_timeout: 60}}", "model.distributed.timeout", 60),
        (
            "model: {base_model: {transformer: {use_rotary_embeddings: yes}}}",
            "model.base_model.transformer.rotary.type",
            "default",
        ),
        (
            "model: {base_model: {transformer: {rotary_embedding_scale: -9.210340371976184}}}",
            "model.base_model.transformer.rotary.theta",
            10_000.0,
        ),
        (
            "model: {base_model: {transformer: {normalization: {layer_norm_eps: 1e-6}}}}",
            "model.base_model.transformer.normalization.epsilon",
            1e-6,
        ),
        ("dataset: {name_or_path: x}", "dataset.path", "x"),
    ],
)
def test_renamed_keys(text: str, path: str, value: object) -> None:
    values, notices = repaired(text + "\n")
    document = parse_yaml(text + "\n", "x")
    repair(document)
    assert document.get(tuple(path.split("."))) == value
    assert len(notices) == 1
    assert notices[0].startswith("x:1: ")
    assert f"is now {path}" in notices[0]
    # Nothing of the old spelling stays behind, and repairing again changes nothing.
    assert repair(document) == ([], [])
    assert values == document.values


def test_overrides_in_an_older_spelling() -> None:
    document = parse_override("training.validation.interval=5", 1)
    assert repair(document) == (["override 1: training.validation is now training.evaluators.validation"], [])
    assert document.values == {"training": {"evaluators": {"validation": {"interval": 5}}}}


def test_todays_spelling_is_left_alone() -> None:
    text = "training: {evaluators: {validation: {interval: 1, evaluator: {type: loss, iterations: 2}}}}\nbatch: {truncate_documents: no}\n"
    values, notices = repaired(text)
    assert values == parse_yaml(text, "x").values
    assert notices == []


def test_both_spellings_are_a_conflict() -> None:
    document = parse_yaml("batch:\n  truncate_documents: yes\ndata:\n  truncate_documents: no\n", "x")
    assert repair(document)[1] == [
        "x:4: data.truncate_documents is an older spelling of batch.truncate_documents, which is also given (x:2); keep one"
    ]


def test_the_command_word_of_a_file(tmp_path: Path) -> None:
    """`type: train_gpt` is the command line's `train gpt`; it says nothing of the run."""
    loaded = load_config([write(tmp_path, "type: train_gpt\n" + TINY)])
    assert loaded.notices[0].endswith(":1: type: train_gpt is left out: the command says what is done")
    assert loaded.train == load_config([write(tmp_path, TINY, "plain.yaml")]).train
    prepare = "type: prepare_gpt_memmap\noutput_path: o\ndataset: {path: x}\ntokenizer: {path: y}\n"
    assert load_config([write(tmp_path, prepare)]).kind == "prepare"
    with pytest.raises(UserError, match=r":1: type: evaluate_gpt: leave it out and run `modelyard evaluate`"):
        load_config([write(tmp_path, "type: evaluate_gpt\n" + TINY)])
    with pytest.raises(UserError, match="unknown key 'type'"):
        load_config([write(tmp_path, "type: gpt\n" + TINY)])
