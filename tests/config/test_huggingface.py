"""config.json: both spellings read, one that older and newer readers agree on written, nothing lost on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelyard.config.architecture import Architecture, Rotary
from modelyard.config.huggingface import (
    architecture_from_config,
    can_export,
    read_architecture,
    read_config,
    write_config,
)
from modelyard.config.presets import PRESETS
from modelyard.errors import UserError

# As published with the models (transformers 4).
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
QWEN_2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
MISTRAL_7B_V0_3: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
    "use_cache": True, "vocab_size": 32768,
}  # fmt: skip
STARCODER2_3B: dict[str, Any] = {
    "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1, "attention_softmax_in_fp32": True,
    "bos_token_id": 0, "embedding_dropout": 0.1, "eos_token_id": 0, "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 3072, "initializer_range": 0.018042, "intermediate_size": 12288, "max_position_embeddings": 16384,
    "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05, "norm_type": "layer_norm",
    "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2, "residual_dropout": 0.1,
    "rope_theta": 999999.4420358813, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True,
    "sliding_window": 4096, "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0", "use_bias": True,
    "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
PUBLISHED = [
    pytest.param(LLAMA_3_1_8B, "llama-3.1-8b", id="llama"),
    pytest.param(QWEN_2_5_7B, "qwen-2.5-7b", id="qwen2"),
    pytest.param(MISTRAL_7B_V0_3, "mistral-7b-v0.3", id="mistral"),
    pytest.param(STARCODER2_3B, "starcoder2-3b", id="starcoder2"),
]


STARCODER: dict[str, Any] = {"gated": False, "norm_type": "layer_norm", "activation": "gelu"}


def read(config: dict[str, Any]) -> Architecture:
    return architecture_from_config(config, "config.json")[0]


def as_written_by_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """The same in the newer spelling."""
    newer = {
        key: value
        for key, value in config.items()
        if key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    return newer | {
        "dtype": config["torch_dtype"],
        "rope_parameters": {**scaling, "rope_theta": config["rope_theta"]},
    }


@pytest.mark.parametrize(("config", "preset"), PUBLISHED)
def test_both_spellings_are_the_preset(config: dict[str, Any], preset: str) -> None:
    assert architecture_from_config(config, "x") == (PRESETS[preset], config["model_type"])
    assert read(as_written_by_transformers_5(config)) == PRESETS[preset]


@pytest.mark.parametrize(("config", "preset"), PUBLISHED)
def test_a_round_trip_keeps_every_key(config: dict[str, Any], preset: str) -> None:
    for original in (config, as_written_by_transformers_5(config)):
        written = write_config(
            read(original), family=original["model_type"], dtype="bfloat16", original=original
        )
        assert {key: written[key] for key in original} == original
        assert read(written) == PRESETS[preset]
        assert written["torch_dtype"] == written["dtype"] == "bfloat16"
        assert (
            written["rope_theta"] == written["rope_parameters"]["rope_theta"] == PRESETS[preset].rotary.theta
        )


@pytest.mark.parametrize(("config", "preset"), PUBLISHED)
def test_transformers_reads_the_same_from_original_and_written(
    config: dict[str, Any], preset: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")

    def seen(values: dict[str, Any], name: str) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
        found: dict[str, Any] = transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict()
        found.pop("_name_or_path", None)
        return found

    written = write_config(PRESETS[preset], family=config["model_type"], dtype="bfloat16", original=config)
    assert seen(written, "written") == seen(config, "original")
    fresh = seen(write_config(PRESETS[preset], family=config["model_type"], dtype="bfloat16"), "fresh")
    original = seen(config, "again")
    for key in (
        "hidden_size",
        "num_key_value_heads",
        "norm_epsilon" if config["model_type"] == "starcoder2" else "rms_norm_eps",
        "rope_parameters",
        "max_position_embeddings",
        "dtype",
    ):
        assert fresh[key] == original[key]


def test_a_fresh_config_has_what_every_reader_needs() -> None:
    architecture = replace(PRESETS["llama-3.2-1b"], max_position_embeddings=None)
    written = write_config(
        architecture,
        family="llama",
        dtype="float32",
        bos_token_id=1,
        eos_token_id=[2, 3],
        sequence_length=512,
    )
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["max_position_embeddings"] == 32 * 8192
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, [2, 3], None)
    assert written["head_dim"] == 64
    assert written["tie_word_embeddings"] is True
    plain = replace(architecture, rotary=Rotary())
    assert (
        write_config(plain, family="llama", dtype="float32", sequence_length=512)["max_position_embeddings"]
        == 512
    )
    assert json.loads(json.dumps(written)) == written


def test_the_original_of_another_family_is_not_mixed_in() -> None:
    architecture = replace(read(QWEN_2_5_7B), qkv_bias=False)
    written = write_config(architecture, family="mistral", dtype="bfloat16", original=QWEN_2_5_7B)
    assert "max_window_layers" not in written
    assert written["bos_token_id"] is None


def test_token_ids_given_win_over_the_original() -> None:
    written = write_config(
        PRESETS["llama-3.1-8b"], family="llama", dtype="bfloat16", original=LLAMA_3_1_8B, pad_token_id=7
    )
    assert written["pad_token_id"] == 7
    assert written["eos_token_id"] == [128001, 128008, 128009]


def test_fewer_layers_than_the_original() -> None:
    original = QWEN_2_5_7B | {"layer_types": ["full_attention"] * 28}
    written = write_config(
        replace(read(original), num_layers=2), family="qwen2", dtype="float32", original=original
    )
    assert written["num_hidden_layers"] == 2
    assert "layer_types" not in written


def test_what_is_left_out_of_a_config() -> None:
    small = {"model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    architecture = read(small)
    assert (architecture.head_groups, architecture.head_size) == (2, 4)
    assert (architecture.norm_epsilon, architecture.max_position_embeddings) == (1e-6, 2048)
    assert architecture.rotary == Rotary(theta=10_000.0)
    assert not architecture.tie_word_embeddings
    assert read(small | {"head_dim": 6}).head_size == 6
    biased = read(small | {"attention_bias": True})
    assert (biased.qkv_bias, biased.output_bias, biased.mlp_bias) == (True, True, False)
    assert read(small | {"model_type": "mistral", "sliding_window": 4096}).window_size == 4096
    assert read(small | {"model_type": "mistral", "sliding_window": None}).window_size is None
    assert read(small | {"model_type": "qwen2", "sliding_window": 4096}).window_size is None
    older = {
        "type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert read(small | {"rope_scaling": older}).rotary == Rotary(
        type="llama3", scale_factor=4.0, original_context_length=64
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"model_type": "mixtral"},
            "model_type 'mixtral' is not supported (supported: llama, qwen2, mistral, starcoder2)",
        ),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported (supported: silu, swish, gelu_pytorch"),
        ({"hidden_size": None}, "hidden_size should be a whole number above 0, not None"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rotary scaling 'dynamic' is not supported (supported:"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rotary scaling yarn lacks original_max_pos",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "truncate": False}},
            "yarn with truncate: false is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rotary scaling llama3 lacks low_freq_factor",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported (only 1)"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "layer_types is not supported (only whole attention in the first layers, and windows in the others)",
        ),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
    ],
)
def test_what_cannot_be_represented_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError) as raised:
        read(LLAMA_3_1_8B | change)
    assert problem in raised.value.problems[0]
    assert raised.value.problems[0].startswith("config.json: ")


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="does not hold a model configuration"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN_2_5_7B))
    assert read_architecture(tmp_path) == (PRESETS["qwen-2.5-7b"], "qwen2")


@pytest.mark.parametrize(
    ("changes", "families"),
    [
        ({}, {"llama", "mistral"}),
        ({"qkv_bias": True}, {"qwen2"}),
        ({"qkv_bias": True, "window_size": 128}, {"qwen2"}),
        ({"qkv_bias": True, "window_size": 128, "full_attention_layers": 3}, {"qwen2"}),
        ({"window_size": 128, "full_attention_layers": 3}, set()),
        ({"qkv_bias": True, "output_bias": True}, {"llama"}),
        ({"qkv_bias": True, "output_bias": True, "mlp_bias": True}, {"llama"}),
        ({"mlp_bias": True}, {"llama"}),
        ({"window_size": 128}, {"mistral"}),
        ({"rotary": Rotary(type="none")}, set()),
        ({"position_embeddings": 64}, set()),
        ({"softmax_scale_power": 1.0}, set()),
        ({"gated": False}, set()),
        ({"norm_type": "layer_norm"}, set()),
        ({"gated": False, "norm_type": "layer_norm"}, {"starcoder2"}),
        (STARCODER | {"qkv_bias": True, "output_bias": True, "mlp_bias": True}, {"starcoder2"}),
        (STARCODER | {"window_size": 128, "num_attention_heads": 24, "head_groups": 8}, {"starcoder2"}),
        (STARCODER | {"qkv_bias": True}, set()),
        (STARCODER | {"window_size": 128, "full_attention_layers": 1}, set()),
        *(
            ({"activation": word}, {"llama", "mistral"})
            for word in ("gelu", "gelu_exact", "relu", "squared_relu", "identity")
        ),
        ({"rotary": Rotary("yarn", original_context_length=64)}, {"llama", "mistral"}),
        (
            {"rotary": Rotary("yarn", beta_fast=8.0, beta_slow=2.0, attention_factor=1.5), "qkv_bias": True},
            {"qwen2"},
        ),
        ({"num_attention_heads": 24, "head_groups": 8}, {"mistral"}),
    ],
)
def test_which_family_can_hold_what(changes: dict[str, Any], families: set[str]) -> None:
    architecture = replace(PRESETS["llama-3.1-8b"], **changes)
    assert {
        family
        for family in ("llama", "qwen2", "mistral", "starcoder2")
        if can_export(architecture, family) is None
    } == families
    for family in families:
        written = write_config(architecture, family=family, dtype="float32")
        assert read(written) == architecture
    assert (
        can_export(architecture, "gpt_neox")
        == "format gpt_neox is not supported (supported: llama, qwen2, mistral, starcoder2)"
    )
    if "llama" not in families:
        with pytest.raises(UserError):
            write_config(architecture, family="llama", dtype="float32")


def test_the_real_folder(shared_data: Path) -> None:
    folder = shared_data / "weights" / "stories260K" / "hf"
    architecture, family = read_architecture(folder)
    assert family == "llama"
    assert architecture.parameter_count() == 260_032
    original = read_config(folder)
    written = write_config(architecture, family=family, dtype="float32", original=original)
    assert {key: written[key] for key in original} == original
