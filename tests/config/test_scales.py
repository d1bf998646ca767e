"""Factors on the learning rate: which parameters have which, and what cannot be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelyard.config.architecture import Architecture
from modelyard.config.model import BaseModelConfig, architecture_of
from modelyard.config.scales import rate_scales
from tests.config.helpers import load_tiny, tiny_problems

TRANSFORMER = "model.base_model.transformer"


def scales(default: float = 1.0, *, tied: bool = False, **keys: Any) -> dict[str, float]:
    """Of a decoder of two layers with LayerNorm, biases and learned positions; keys of the transformer, or of above."""
    above = {key: keys.pop(key) for key in list(keys) if key in ("embeddings_lr_scale", "output_lr_scale")}
    shape = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    model = BaseModelConfig.model_validate(
        {"tie_word_embeddings": tied, **above, "transformer": shape | keys}
    )
    architecture = architecture_of(model, 16)
    found = rate_scales(model, architecture, default)
    assert found.keys() == architecture.parameter_shapes().keys()
    return found


def test_without_a_word_all_have_the_default() -> None:
    assert set(scales().values()) == {1.0}
    assert set(scales(0.5).values()) == {0.5}


def test_each_key_has_its_parameters() -> None:
    found = scales(0.5, embeddings_lr_scale=2, output_lr_scale=3.0, attention_lr_scale=4, mlp_lr_scale=[5])
    expected = {
        "embed_tokens.weight": 2.0,
        "embed_positions.weight": 2.0,
        "lm_head.weight": 3.0,
        "layers.1.self_attn.q_proj.weight": 4.0,
        "layers.0.self_attn.o_proj.bias": 4.0,
        "layers.1.mlp.up_proj.bias": 5.0,
        "layers.0.mlp.down_proj.weight": 5.0,
        "layers.0.input_layernorm.bias": 0.5,
        "layers.1.post_attention_layernorm.weight": 0.5,
        "norm.weight": 0.5,
    }
    assert {name: found[name] for name in expected} == expected


def test_a_layers_factor_multiplies_and_takes_the_norms_along() -> None:
    found = scales(0.5, attention_lr_scale=4.0, per_layer_lr_scale=[0, None])
    assert {value for name, value in found.items() if name.startswith("layers.0.")} == {0.0}
    assert found["layers.1.self_attn.k_proj.weight"] == 4.0
    assert found["layers.1.mlp.up_proj.weight"] == found["layers.1.input_layernorm.weight"] == 0.5
    found = scales(0.5, attention_lr_scale=4.0, per_layer_lr_scale=[0.25, 3])
    assert found["layers.0.self_attn.v_proj.bias"] == 1.0
    assert found["layers.1.mlp.up_proj.weight"] == found["layers.1.input_layernorm.weight"] == 3.0


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([f"{TRANSFORMER}.per_layer_lr_scale=[1]"], "there are 1 numbers for 2 layers; write one a layer"),
        ([f"{TRANSFORMER}.mlp_lr_scale=[1, 2]"], "not several experts; write one number"),
        (["model.base_model.output_lr_scale=2"], "write embeddings_lr_scale"),
        (["optimizer.default_learning_rate_scale=0"], "every parameter is frozen"),
        ([f"{TRANSFORMER}.attention_lr_scale=-1"], "attention_lr_scale = -1: "),
        ([f"{TRANSFORMER}.per_layer_lr_scale=[1, -1]"], "per_layer_lr_scale"),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, overrides: list[str], problem: str) -> None:
    (found,) = tiny_problems(tmp_path, *overrides)
    assert problem in found


def test_freezing_most_is_fine(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, "optimizer.default_learning_rate_scale=0", f"{TRANSFORMER}.mlp_lr_scale=1")
    assert isinstance(loaded.architecture, Architecture)
    found = rate_scales(loaded.train.model.base_model, loaded.architecture, 0.0)
    assert {name.split(".")[2] for name, scale in found.items() if scale} == {"mlp"}
