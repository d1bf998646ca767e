"""Published shapes have their published parameter counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modelyard.config.model import BaseModelConfig, architecture_of, architecture_problems, base_model_of
from modelyard.config.presets import PRESETS, preset
from modelyard.errors import UserError

COUNTS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3-8b": 8_030_261_248,
    "llama-2-7b": 6_738_415_616,
    "qwen-2.5-0.5b": 494_032_768,
    "qwen-2.5-1.5b": 1_543_714_304,
    "qwen-2.5-3b": 3_085_938_688,
    "qwen-2.5-7b": 7_615_616_512,
    "qwen-2.5-14b": 14_770_033_664,
    "qwen-2.5-32b": 32_763_876_352,
    "qwen-2.5-72b": 72_706_203_648,
    "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "starcoder2-3b": 3_030_371_328,
    "dmas-llama-lite-1.7b": 1_716_144_128,
}


def test_every_preset_is_counted() -> None:
    assert set(COUNTS) == set(PRESETS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    assert preset(name).parameter_count() == COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_way_through_the_config(name: str) -> None:
    section = BaseModelConfig.model_validate(base_model_of(PRESETS[name]))
    assert architecture_problems(section) == []
    assert architecture_of(section, sequence_length=128) == PRESETS[name]


def test_the_hugging_face_export_of_dmas_drops_the_padding() -> None:
    assert replace(PRESETS["dmas-llama-lite-1.7b"], vocab_size=50_257).parameter_count() == 1_715_951_616


def test_llama_3_stretches_its_positions_from_3_1_on() -> None:
    assert PRESETS["llama-3-8b"].rotary.type == "default"
    assert PRESETS["llama-3.1-8b"].rotary.scale_factor == 8.0
    assert PRESETS["llama-3.2-1b"].rotary.scale_factor == 32.0
    assert PRESETS["qwen-2.5-7b"].qkv_bias
    assert not PRESETS["qwen-2.5-7b"].output_bias


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'llama3.1-8b'; did you mean 'llama-3.1-8b'\?"):
        preset("llama3.1-8b")
