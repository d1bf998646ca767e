"""`peft`: what it means for the parameters, and what of it cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.config.adapter import (
    MODULES,
    Adapter,
    Quantization,
    adapter_from,
    adapter_to_dict,
    block_matrices,
)
from modelyard.config.disk import checkpoint_bytes
from modelyard.config.peft import adapter_of
from modelyard.config.scales import rate_scales
from tests.config.helpers import load_tiny, tiny_problems

PEFT = "model.base_model.transformer.peft"
BESIDE = (f"{PEFT}.type=lora", f"{PEFT}.freeze_others=no")


def test_the_default_is_that_of_the_dialect(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, *BESIDE)
    adapter = adapter_of(loaded.train.model.base_model.transformer.peft)
    assert adapter == Adapter(8, 8.0, ("q_proj", "v_proj"), freeze_others=False)
    assert adapter_of(load_tiny(tmp_path).train.model.base_model.transformer.peft) is None


@pytest.mark.parametrize(
    ("layers", "modules"),
    [
        ("[all]", MODULES),
        ("[mlp_2, key_value, query]", ("q_proj", "k_proj", "v_proj", "down_proj")),
        ("[key, mlp_1, dense]", ("k_proj", "o_proj", "gate_proj", "up_proj")),
    ],
)
def test_layers_are_matrices(tmp_path: Path, layers: str, modules: tuple[str, ...]) -> None:
    adapter = adapter_of(
        load_tiny(tmp_path, *BESIDE, f"{PEFT}.layers={layers}").train.model.base_model.transformer.peft
    )
    assert adapter is not None
    assert adapter.modules == modules


def test_shapes_scale_and_count(tmp_path: Path) -> None:
    shape = load_tiny(tmp_path).architecture
    assert shape is not None
    adapter = Adapter(4, 2.0, ("k_proj", "down_proj"), dora=True)
    shapes = adapter.shapes(shape)
    # hidden 64, one key/value head of 16, feed-forward 4 x 64; two layers
    assert shapes["layers.1.self_attn.k_proj.lora_A"] == (4, 64)
    assert shapes["layers.1.self_attn.k_proj.lora_B"] == (16, 4)
    assert shapes["layers.0.mlp.down_proj.lora_A"] == (4, 256)
    assert shapes["layers.0.mlp.down_proj.lora_magnitude"] == (64,)
    assert len(shapes) == 12
    assert adapter.parameter_count(shape) == 2 * (4 * (64 + 16) + 16 + 4 * (256 + 64) + 64)
    assert adapter.scale == 0.5
    assert Adapter(4, 2.0, ("k_proj",), rank_stabilized=True).scale == 1.0
    assert len(block_matrices(shape)) == 14


@pytest.mark.parametrize("quantization", [None, Quantization(32, double=True)])
def test_an_adapter_is_kept_as_plain_values(quantization: Quantization | None) -> None:
    adapter = Adapter(4, 2.0, ("k_proj",), dropout=0.1, quantization=quantization)
    assert adapter_from(adapter_to_dict(adapter)) == adapter


def test_rates_of_an_adapter_are_those_of_its_layer(tmp_path: Path) -> None:
    loaded = load_tiny(
        tmp_path,
        f"{PEFT}={{type: lora, freeze_others: no, layers: [all]}}",
        "model.base_model.transformer.mlp_lr_scale=0.5",
    )
    assert loaded.architecture is not None
    scales = rate_scales(loaded.train.model.base_model, loaded.architecture)
    assert scales["layers.0.mlp.up_proj.lora_A"] == scales["layers.0.mlp.up_proj.weight"] == 0.5
    assert scales["layers.0.self_attn.q_proj.lora_B"] == scales["embed_tokens.weight"] == 1.0
    # beside all weights the adapter is in the checkpoint, too: three numbers of four bytes each
    adapter = adapter_of(loaded.train.model.base_model.transformer.peft)
    assert adapter is not None
    own = adapter.parameter_count(loaded.architecture)
    count = loaded.architecture.parameter_count() + own
    assert checkpoint_bytes(loaded.train, loaded.architecture) == 12 * count


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("type=lora",),
            "type: there is nothing to adapt: the base would be random and stay so; give pretrained.path, or write "
            "freeze_others: no",
        ),
        (
            ("type=lora", "freeze_others=no", "layers=[querry]"),
            "layers: there is no layer 'querry'; did you mean 'query'?",
        ),
        (
            ("type=lora", "freeze_others=no", "layers=[]"),
            "layers: no layer has an adapter; write layers: [all], or type: none",
        ),
        (
            ("type=lora", "freeze_others=no", "rank=64", "layers=[query, key]"),
            "rank: rank 64 is no less than that of any matrix it is to adapt (at most 64), so that nothing is saved; lower "
            "it, or write type: none",
        ),
        (
            ("quantization=nf4",),
            "quantization: only a frozen base can be quantized; write type: lora, or quantization: none",
        ),
        (
            ("type=lora", "freeze_others=no", "quantization=nf4"),
            "quantization: quantized matrices cannot be trained; write freeze_others: yes",
        ),
        (
            ("type=lora", "freeze_others=no", "double_quantization=yes"),
            "double_quantization: nothing is quantized; write quantization: nf4",
        ),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, overrides: tuple[str, ...], problem: str) -> None:
    problems = tiny_problems(tmp_path, *(f"{PEFT}.{override}" for override in overrides))
    assert [line.partition(f"{PEFT}.")[2] for line in problems] == [problem]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("quantization_block=48",),
            "quantization_block: q_proj has rows of 64 weights, which blocks of 48 do not fill; write 64",
        ),
        (
            ("quantization_block=8",),
            "quantization_block: a block is a multiple of 16, which blocks of 8 do not fill; write 64",
        ),
        (
            ("double_quantization=yes",),
            "double_quantization: rows of q_proj have 1 scales, which is no multiple of 8; write double_quantization: no",
        ),
    ],
)
def test_a_base_that_cannot_be_quantized(tmp_path: Path, overrides: tuple[str, ...], problem: str) -> None:
    keys = ("type=lora", "quantization=nf4", *overrides)
    problems = tiny_problems(tmp_path, *(f"{PEFT}.{key}" for key in keys))
    lines = [line.partition(f"{PEFT}.")[2] for line in problems]
    assert lines[1:] == [problem]  # the first: there is no pretrained model
