"""What may be named as `pretrained.path`, without torch: folders of files that a checkpoint has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from modelyard.config.architecture import Architecture, Rotary
from modelyard.config.loader import load_config
from modelyard.config.pretrained import (
    is_checkpoint,
    model_tokenizer,
    read_shape,
    reference_folder,
    unreadable_weights,
)
from modelyard.errors import UserError
from modelyard.files import complete_or_absent, write_json
from tests.config.helpers import TINY, problems_of, write

SHAPE = Architecture(
    40, 32, 2, 4, 2, 8, 48, qkv_bias=True, rotary=Rotary("llama3", 5e5), max_position_embeddings=512
)


def checkpoint(folder: Path, shape: Architecture = SHAPE) -> Path:
    with complete_or_absent(folder, manifest=True) as temporary:
        write_json(temporary / "state.json", {"architecture": dataclasses.asdict(shape)})
        for name in (".metadata", "__0_0.distcp"):
            (temporary / name).write_text("weights")
    return folder


def config(folder: Path, model: Path) -> Path:
    text = TINY[: TINY.index("model:")] + f"pretrained:\n  path: {model}\nrun: {{experiment_dir: x}}\n"
    return write(folder, text)


def test_the_shape_of_a_checkpoint(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "run/checkpoint/30")
    assert read_shape(model) == (SHAPE, "qwen2")
    loaded = load_config([config(tmp_path, model)])
    assert loaded.architecture == SHAPE
    assert loaded.warnings == []
    # A number of heads is the shape that the weights have.
    (problem,) = problems_of([config(tmp_path, model)], "model.base_model.transformer.num_attention_heads=8")
    assert "num_attention_heads = 8, but the pretrained weights have 4" in problem


def test_a_checkpoint_must_fit_the_format(tmp_path: Path) -> None:
    """It is of no family: a Llama's shape fits Mistral's folders too."""
    model = checkpoint(tmp_path / "average", dataclasses.replace(SHAPE, qkv_bias=False))
    file = config(tmp_path, model)
    for family in ("auto", "llama", "mistral"):
        assert load_config([file], [f"pretrained.format={family}"]).architecture is not None
    (problem,) = problems_of([file], "pretrained.format=qwen2")
    assert problem == (
        "override 1: pretrained.format is qwen2, which the checkpoint average does not fit (format qwen2 has biases on query, "
        "key and value alone, this model has none (llama holds it); see add_linear_biases: only_attn_qkv); write format: auto"
    )


def test_the_folder_of_a_run_is_not_one_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "config.json", {"modelyard_version": "1"})
    (problem,) = problems_of([config(tmp_path, run)])
    assert (
        problem == "config.yaml:5: pretrained.path: run is the folder of a run, and it has no checkpoint yet"
    )
    for iteration in (9, 10):
        checkpoint(run / "checkpoint" / str(iteration))
    (problem,) = problems_of([config(tmp_path, run)])
    assert problem.endswith("run is the folder of a run; name one of its checkpoints: run/checkpoint/10")


def test_a_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "30")
    assert unreadable_weights(model) == []
    (model / "__0_0.distcp").write_text("weight")
    assert unreadable_weights(model) == [f"{model}/__0_0.distcp has 6 bytes where its manifest says 7"]
    (model / "__0_0.distcp").unlink()
    assert load_config([config(tmp_path, model)]).warnings == [
        f"{tmp_path}/config.yaml:5: pretrained.path: {model} has no weights (*.distcp)"
    ]
    (model / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"30/state\.json cannot be read \(KeyError\('architecture'\)\)"):
        read_shape(model)


def test_what_lies_around_the_weights(tmp_path: Path) -> None:
    """A run's checkpoint has its tokenizer in the experiment, an average inside, a Hugging Face folder among the rest."""
    model = checkpoint(tmp_path / "run/checkpoint/30")
    assert is_checkpoint(model)
    assert model_tokenizer(model) == tmp_path / "run/tokenizer"
    assert reference_folder(model) is None
    inside = model / "tokenizer"
    inside.mkdir()
    assert model_tokenizer(model) == inside
    assert reference_folder(model) is None
    (inside / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert reference_folder(model) == inside
    assert not is_checkpoint(tmp_path)
    assert model_tokenizer(tmp_path) == reference_folder(tmp_path) == tmp_path
