"""`config.json` of a Hugging Face folder <-> `Architecture`, as plain JSON: neither transformers nor torch is imported.

Both spellings are read: `rope_theta` + `rope_scaling` + `torch_dtype` (transformers 4) and `rope_parameters` + `dtype`
(transformers 5). Both are written, so that older and newer readers agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard.config.architecture import Architecture, Rotary
from modelyard.errors import UserError, missing_path

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
"""Families (`model_type`) that can be read and written, with the class that transformers loads."""

# What transformers assumes where config.json says nothing (its configuration classes).
_DEFAULT_POSITIONS = {"llama": 2048, "qwen2": 32_768, "mistral": 131_072}
_DEFAULT_EPSILON = 1e-6
_DEFAULT_WINDOW = {"llama": None, "qwen2": 4096, "mistral": 4096}
_DEFAULT_KEY_VALUE_HEADS = {"qwen2": 32, "mistral": 8}
_DEFAULT_INITIALIZER_RANGE = 0.02


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder`. Raises UserError."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(missing_path(path))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a model configuration")
    return values


def read_architecture(folder: Path) -> tuple[Architecture, str]:
    """Shape and family of the model in `folder`. Raises UserError with everything that cannot be represented."""
    return architecture_from_config(read_config(folder), str(folder / "config.json"))


def architecture_from_config(config: Mapping[str, Any], where: str) -> tuple[Architecture, str]:
    """Shape and family that a parsed config.json describes; `where` names it in messages. Raises UserError."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type '{family}' is not supported (supported: {', '.join(FAMILIES)})")
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    problems = [
        f"{where}: {key} should be a whole number above 0, not {config.get(key)!r}"
        for key in required
        if not isinstance(config.get(key), int) or config[key] <= 0
    ]
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"{where}: hidden_act '{config['hidden_act']}' is not supported (only silu)")
    if config.get("quantization_config"):
        problems.append(f"{where}: quantised weights (quantization_config) are not supported")
    if problems:
        raise UserError(*problems)
    heads = config["num_attention_heads"]
    attention_bias = bool(config.get("attention_bias", False)) if family == "llama" else family == "qwen2"
    return Architecture(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        head_groups=config.get("num_key_value_heads") or _DEFAULT_KEY_VALUE_HEADS.get(family, heads),
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        ffn_hidden_size=config["intermediate_size"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        norm_epsilon=float(config.get("rms_norm_eps", _DEFAULT_EPSILON)),
        qkv_bias=attention_bias,
        output_bias=attention_bias and family == "llama",
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        rotary=_read_rotary(config, where),
        window_size=_read_window(config, family, where),
        max_position_embeddings=config.get("max_position_embeddings") or _DEFAULT_POSITIONS[family],
    ), family


def _read_rotary(config: Mapping[str, Any], where: str) -> Rotary:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10_000.0)))
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor {config['partial_rotary_factor']} is not supported (only 1)"
        )
    if kind == "default":
        return Rotary(theta=theta)
    if kind != "llama3":
        raise UserError(f"{where}: rotary scaling '{kind}' is not supported yet (supported: default, llama3)")
    try:
        return Rotary(
            type="llama3",
            theta=theta,
            scale_factor=float(parameters["factor"]),
            low_frequency_factor=float(parameters["low_freq_factor"]),
            high_frequency_factor=float(parameters["high_freq_factor"]),
            original_context_length=int(parameters["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise UserError(f"{where}: rotary scaling llama3 lacks {error.args[0]}") from None


def _read_window(config: Mapping[str, Any], family: str, where: str) -> int | None:
    if family == "llama" or (family == "qwen2" and not config.get("use_sliding_window", False)):
        return None
    window: int | None = config.get("sliding_window", _DEFAULT_WINDOW[family])
    if family == "qwen2" and window is not None:
        raise UserError(f"{where}: use_sliding_window (windows in some layers only) is not supported yet")
    return window


def can_export(architecture: Architecture, family: str) -> str | None:
    """Why transformers' `family` cannot hold this shape, in one line; None when it can."""
    biases = (architecture.qkv_bias, architecture.output_bias, architecture.mlp_bias)
    if family not in FAMILIES:
        return f"format {family} is not supported (supported: {', '.join(FAMILIES)})"
    if architecture.rotary.type == "none":
        return f"format {family} has rotary positions, the model has none"
    if family == "llama":
        if architecture.hidden_size % architecture.num_attention_heads:
            return "format llama needs num_attention_heads to divide hidden_size (mistral does not)"
        if architecture.qkv_bias != architecture.output_bias:
            return "format llama has biases on all of the attention or on none (qwen2 holds add_linear_biases: only_attn_qkv)"
        if architecture.window_size is not None:
            return "format llama has no sliding window (mistral has)"
    if family == "qwen2":
        if biases != (True, False, False):
            return (
                "format qwen2 has biases on query, key and value alone, this model has "
                f"{'others' if any(biases) else 'none (llama holds it)'}; see add_linear_biases: only_attn_qkv"
            )
        if architecture.window_size is not None:
            return "format qwen2 has no sliding window in every layer (mistral has)"
    if family == "mistral" and any(biases):
        return "format mistral has no biases (add_linear_biases: no)"
    return None


def write_config(
    architecture: Architecture,
    *,
    family: str,
    dtype: str,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    original: Mapping[str, Any] | None = None,
    sequence_length: int | None = None,
) -> dict[str, Any]:
    """config.json for `architecture` as a dictionary.

    `dtype` is torch's name of the weights' type; special token ids of None are left as `original` has them.
    `original` is the parsed config.json that the weights came from: every key of it that still describes this model
    is kept as it is, so that a round trip gives an equal configuration. `sequence_length` (tokens) is the longest
    position where neither the architecture nor rotary scaling says otherwise. Raises UserError where the family
    cannot hold the architecture.
    """
    if reason := can_export(architecture, family):
        raise UserError(reason)
    same_family = original is not None and original.get("model_type") == family
    config: dict[str, Any] = dict(original or {}) if same_family else {}
    if config.get("num_hidden_layers") != architecture.num_layers:
        config.pop("layer_types", None)  # one word per layer of the original
    config |= {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.head_groups,
        "hidden_act": config.get("hidden_act", "silu"),
        "max_position_embeddings": _positions(architecture, sequence_length),
        "initializer_range": config.get("initializer_range", _DEFAULT_INITIALIZER_RANGE),
        "rms_norm_eps": architecture.norm_epsilon,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "use_cache": config.get("use_cache", True),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if config.get("head_dim") is not None or _needs_head_dim(architecture) or family != "qwen2":
        config["head_dim"] = architecture.head_size
    if family == "llama":
        config["attention_bias"] = architecture.qkv_bias
        config["mlp_bias"] = architecture.mlp_bias
    elif family == "mistral":
        config["sliding_window"] = architecture.window_size
    else:
        config["use_sliding_window"] = False
    config |= _write_rotary(architecture.rotary)
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    for key, token_id in ids.items():
        if token_id is not None or key not in config:
            config[key] = token_id
    return config


def _positions(architecture: Architecture, sequence_length: int | None) -> int:
    if architecture.max_position_embeddings is not None:
        return architecture.max_position_embeddings
    rotary = architecture.rotary
    stretched = round(rotary.scale_factor * rotary.original_context_length) if rotary.type == "llama3" else 0
    return max(stretched, sequence_length or 0) or 2048


def _needs_head_dim(architecture: Architecture) -> bool:
    return architecture.head_size * architecture.num_attention_heads != architecture.hidden_size


def _write_rotary(rotary: Rotary) -> dict[str, Any]:
    """Both spellings of the rotary embedding."""
    if rotary.type == "default":
        return {
            "rope_theta": rotary.theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": rotary.theta, "rope_type": "default"},
        }
    scaling = {
        "factor": rotary.scale_factor,
        "high_freq_factor": rotary.high_frequency_factor,
        "low_freq_factor": rotary.low_frequency_factor,
        "original_max_position_embeddings": rotary.original_context_length,
        "rope_type": "llama3",
    }
    return {
        "rope_theta": rotary.theta,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": rotary.theta},
    }
