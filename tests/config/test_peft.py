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


def test_words_of_others(tmp_path: Path) -> None:
    def problem(*keys: str) -> str:
        (line,) = tiny_problems(tmp_path, *(f"{PEFT}.{key}" for key in keys))
        return line.partition("peft")[2]

    lora = ("type=lora", "freeze_others=no")
    said = "without a type every weight is trained; write type: lora, or type: none to say so"
    assert problem("rank=4").endswith(said)
    assert problem("type=dora").endswith("'dora' is a kind of lora; write type: lora, dora: yes")
    assert problem("type=qlora").endswith("'qlora' is a kind of lora; write type: lora, quantization: nf4")
    assert (
        problem(*lora, "layers=[q_proj]") == ".layers: there is no layer 'q_proj'; it is called 'query' here"
    )
    assert problem(*lora, "layers=[qery]") == ".layers: there is no layer 'qery'; did you mean 'query'?"
    loaded = load_tiny(tmp_path, *(f"{PEFT}.{key}" for key in (*lora, "layers=all")))
    assert loaded.train.model.base_model.transformer.peft.layers == ["all"]


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
            ("type=none", "quantization=nf4"),
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


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            (f"{PEFT}.type=none", f"{PEFT}.rank=64", f"{PEFT}.dora=yes", f"{PEFT}.double_quantization=yes"),
            {
                f"{PEFT}.{key}": "there is no adapter (type: none)"
                for key in ("rank", "dora", "double_quantization")
            },
        ),
        (
            (*BESIDE, f"{PEFT}.quantization_block=32"),
            {f"{PEFT}.quantization_block": "nothing is quantized (quantization: none)"},
        ),
        ((*BESIDE, "model.base_model.embeddings_lr_scale=0.5"), {}),
        ((f"{PEFT}.type=none", "model.base_model.embeddings_lr_scale=0.5"), {}),
    ],
)
def test_keys_that_change_nothing_are_told(
    tmp_path: Path, overrides: tuple[str, ...], expected: dict[str, str]
) -> None:
    assert {row.key: row.why for row in load_tiny(tmp_path, *overrides).without_effect} == expected


def pretrained(tmp_path: Path) -> tuple[str, ...]:
    """Overrides of a run that adapts a pretrained model of the tiny shape."""
    folder = tmp_path / "base"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, '
        '"num_key_value_heads": 1, "intermediate_size": 256, "tie_word_embeddings": false}'
    )
    return f"pretrained.path={folder}", f"{PEFT}.type=lora"


def test_rates_of_what_is_frozen_change_nothing(tmp_path: Path) -> None:
    below = "model.base_model"
    keys = (
        f"{below}.embeddings_lr_scale=0.5",
        f"{below}.output_lr_scale=0.1",
        f"{below}.transformer.attention_lr_scale=0.5",
        f"{below}.transformer.mlp_lr_scale=0.5",
    )
    frozen = "it keeps its values beside an adapter (peft.freeze_others: yes)"
    loaded = load_tiny(tmp_path, *pretrained(tmp_path), *keys)
    assert {row.key: row.why for row in loaded.without_effect} == {
        f"{below}.embeddings_lr_scale": frozen,
        f"{below}.output_lr_scale": frozen,
        f"{below}.transformer.mlp_lr_scale": "no matrix of the feed-forward has an adapter",
    }
    loaded = load_tiny(tmp_path, *pretrained(tmp_path), *keys, f"{PEFT}.layers=[mlp_2]")
    assert [row.key for row in loaded.without_effect][2:] == [f"{below}.transformer.attention_lr_scale"]


def test_a_pretrained_model_whose_weights_are_not_read(tmp_path: Path) -> None:
    assert load_tiny(tmp_path, *pretrained(tmp_path)).architecture is not None
    (problem,) = tiny_problems(tmp_path, *pretrained(tmp_path), "pretrained.model_weights=no")
    assert problem.endswith(
        f"{PEFT}.type: there is nothing to adapt: the base would be random and stay so; write pretrained.model_weights: yes, or "
        "write freeze_others: no"
    )
