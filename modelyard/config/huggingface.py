"""`config.json` of a Hugging Face folder <-> `Architecture`, as plain JSON: neither transformers nor torch is imported.

Both spellings are read: `rope_theta` + `rope_scaling` + `torch_dtype` (transformers 4) and `rope_parameters` + `dtype`
(transformers 5). Both are written, so that older and newer readers agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard.config.architecture import Activation, Architecture, Rotary
from modelyard.errors import UserError, missing_path

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
"""Families (`model_type`) that can be read and written, with the class that transformers loads."""

# What transformers assumes where config.json says nothing (its configuration classes).
_POINTER = b"version https://git-lfs.github.com/spec/"

_DEFAULT_POSITIONS = {"llama": 2048, "qwen2": 32_768, "mistral": 131_072, "starcoder2": 4096}
_DEFAULT_EPSILON = {"llama": 1e-6, "qwen2": 1e-6, "mistral": 1e-6, "starcoder2": 1e-5}
_DEFAULT_WINDOW = {"llama": None, "qwen2": 4096, "mistral": 4096, "starcoder2": None}
_DEFAULT_WINDOW_BEGIN = 28
_DEFAULT_KEY_VALUE_HEADS = {"qwen2": 32, "mistral": 8, "starcoder2": 2}
_DEFAULT_ACTIVATION = {"starcoder2": "gelu_pytorch_tanh"}
_DEFAULT_INITIALIZER_RANGE = 0.02

# transformers' words for activations; the first word of each is the one that is written.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "squared_relu",
    "linear": "identity",
}


def pointer_problem(path: Path) -> str | None:
    """What to do about a file that git-lfs has left a pointer in the place of; None where it has not."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) != _POINTER:
            return None
    return f"{path} is a git-lfs pointer, not the file; fetch it with `git lfs pull`"


def weight_problems(folder: Path) -> list[str]:
    """What keeps the weights in `folder` from being read, as far as a look at each file's first bytes says."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    return [problem for file in files if (problem := pointer_problem(file))]


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder`. Raises UserError."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(missing_path(path))
    if problem := pointer_problem(path):
        raise UserError(problem)
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
    activation = config.get("hidden_act") or _DEFAULT_ACTIVATION.get(family, "silu")
    if activation not in _ACTIVATIONS:
        problems.append(
            f"{where}: hidden_act '{activation}' is not supported (supported: {', '.join(_ACTIVATIONS)})"
        )
    if config.get("quantization_config"):
        problems.append(f"{where}: quantised weights (quantization_config) are not supported")
    if problems:
        raise UserError(*problems)
    heads = config["num_attention_heads"]
    is_starcoder = family == "starcoder2"
    qkv_bias, output_bias, mlp_bias = _read_biases(config, family)
    window, full_attention_layers = _read_window(config, family, where)
    return Architecture(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        head_groups=config.get("num_key_value_heads") or _DEFAULT_KEY_VALUE_HEADS.get(family, heads),
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        ffn_hidden_size=config["intermediate_size"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", is_starcoder)),
        norm_epsilon=float(config.get(_epsilon_key(family), _DEFAULT_EPSILON[family])),
        activation=_ACTIVATIONS[activation],
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        rotary=_read_rotary(config, where),
        window_size=window,
        max_position_embeddings=config.get("max_position_embeddings") or _DEFAULT_POSITIONS[family],
        gated=not is_starcoder,
        norm_type="layer_norm" if is_starcoder else "rms_norm",
        full_attention_layers=full_attention_layers,
    ), family


def _epsilon_key(family: str) -> str:
    return "norm_epsilon" if family == "starcoder2" else "rms_norm_eps"


def _read_biases(config: Mapping[str, Any], family: str) -> tuple[bool, bool, bool]:
    """Whether query/key/value, the attention's output and the feed-forward have biases."""
    if family == "starcoder2":
        everywhere = bool(config.get("use_bias", True))
        return everywhere, everywhere, everywhere
    if family == "llama":
        attention = bool(config.get("attention_bias", False))
        return attention, attention, bool(config.get("mlp_bias", False))
    return family == "qwen2", False, False


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
    if kind not in ("llama3", "yarn"):
        raise UserError(
            f"{where}: rotary scaling '{kind}' is not supported (supported: default, llama3, yarn)"
        )
    if kind == "yarn" and not parameters.get("truncate", True):
        raise UserError(f"{where}: rotary scaling yarn with truncate: false is not supported")
    try:
        if kind == "yarn":
            return Rotary(
                type="yarn",
                theta=theta,
                scale_factor=float(parameters["factor"]),
                original_context_length=int(parameters["original_max_position_embeddings"]),
                attention_factor=_read_attention_factor(parameters),
                beta_fast=float(parameters.get("beta_fast") or 32),
                beta_slow=float(parameters.get("beta_slow") or 1),
            )
        return Rotary(
            type="llama3",
            theta=theta,
            scale_factor=float(parameters["factor"]),
            low_frequency_factor=float(parameters["low_freq_factor"]),
            high_frequency_factor=float(parameters["high_freq_factor"]),
            original_context_length=int(parameters["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise UserError(f"{where}: rotary scaling {kind} lacks {error.args[0]}") from None


def _read_attention_factor(parameters: Mapping[str, Any]) -> float | None:
    """yarn's factor; two further keys of some models stand for a quotient of two such factors."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if not over or not under or parameters["factor"] <= 1:
        return None
    growth = 0.1 * math.log(parameters["factor"])
    return float((over * growth + 1) / (under * growth + 1))


def _read_window(config: Mapping[str, Any], family: str, where: str) -> tuple[int | None, int]:
    """The sliding window, and how many of the first layers are without it."""
    if family == "llama" or (family == "qwen2" and not config.get("use_sliding_window", False)):
        return None, 0
    window: int | None = config.get("sliding_window", _DEFAULT_WINDOW[family])
    if family != "qwen2" or window is None:
        return window, 0
    layers = config["num_hidden_layers"]
    begin = min(config.get("max_window_layers", _DEFAULT_WINDOW_BEGIN), layers)
    kinds = config.get("layer_types")
    if kinds is not None:
        begin = kinds.index("sliding_attention") if "sliding_attention" in kinds else layers
        if kinds != _layer_types(layers, begin):
            raise UserError(
                f"{where}: layer_types is not supported (only whole attention in the first layers, and windows in the others)"
            )
    return (window, begin) if begin < layers else (None, 0)


def _layer_types(layers: int, begin: int) -> list[str]:
    return ["full_attention"] * begin + ["sliding_attention"] * (layers - begin)


def can_export(architecture: Architecture, family: str) -> str | None:
    """Why transformers' `family` cannot hold this shape, in one line; None when it can."""
    biases = (architecture.qkv_bias, architecture.output_bias, architecture.mlp_bias)
    if family not in FAMILIES:
        return f"format {family} is not supported (supported: {', '.join(FAMILIES)})"
    if architecture.rotary.type == "none":
        return f"format {family} has rotary positions, the model has none"
    if architecture.position_embeddings is not None:
        return f"format {family} has no learned positions (use_position_embeddings: no)"
    if architecture.logits_scale != 1:
        return f"format {family} has no factor on the logits (logits_scale_factor: 1)"
    if architecture.softmax_scale_power != 0.5:
        return f"format {family} has attention_softmax_scale_power 0.5 alone"
    wanted = "layer_norm" if family == "starcoder2" else "rms_norm"
    if architecture.norm_type != wanted:
        other = "llama, qwen2 and mistral have" if wanted == "layer_norm" else "starcoder2 has"
        return f"format {family} has {wanted}, the model {architecture.norm_type} ({other} it)"
    if architecture.gated != (family != "starcoder2"):
        return (
            "format starcoder2 has a feed-forward that is not gated (write gated: no)"
            if architecture.gated
            else f"format {family} has a gated feed-forward, the model's is not gated (starcoder2's is not)"
        )
    if family == "starcoder2":
        if any(biases) and not all(biases):
            return "format starcoder2 has biases everywhere or nowhere (add_linear_biases: yes or no)"
        if architecture.full_attention_layers:
            return "format starcoder2 has the sliding window in every layer (max_window_layers: null)"
    if family == "llama":
        if architecture.hidden_size % architecture.num_attention_heads:
            return "format llama needs num_attention_heads to divide hidden_size (mistral does not)"
        if architecture.qkv_bias != architecture.output_bias:
            return "format llama has biases on all of the attention or on none (qwen2 holds add_linear_biases: only_attn_qkv)"
        if architecture.window_size is not None:
            return "format llama has no sliding window (mistral has)"
    if family == "qwen2" and biases != (True, False, False):
        return (
            "format qwen2 has biases on query, key and value alone, this model has "
            f"{'others' if any(biases) else 'none (llama holds it)'}; see add_linear_biases: only_attn_qkv"
        )
    if family == "mistral" and any(biases):
        return "format mistral has no biases (add_linear_biases: no)"
    if family == "mistral" and architecture.full_attention_layers:
        return "format mistral has the sliding window in every layer (qwen2 need not; or max_window_layers: null)"
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
    begin = architecture.full_attention_layers if architecture.window_size else architecture.num_layers
    if config.get("layer_types") != _layer_types(architecture.num_layers, begin):
        config.pop("layer_types", None)  # one word per layer of the original
    if _ACTIVATIONS.get(config.get("hidden_act", "")) != architecture.activation:
        config["hidden_act"] = next(w for w, name in _ACTIVATIONS.items() if name == architecture.activation)
    config |= {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.head_groups,
        "max_position_embeddings": _positions(architecture, sequence_length),
        "initializer_range": config.get("initializer_range", _DEFAULT_INITIALIZER_RANGE),
        _epsilon_key(family): architecture.norm_epsilon,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "use_cache": config.get("use_cache", True),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    optional = family in ("qwen2", "starcoder2")
    if config.get("head_dim") is not None or _needs_head_dim(architecture) or not optional:
        config["head_dim"] = architecture.head_size
    if family == "llama":
        config["attention_bias"] = architecture.qkv_bias
        config["mlp_bias"] = architecture.mlp_bias
    elif family in ("mistral", "starcoder2"):
        config["sliding_window"] = architecture.window_size
    else:
        config["use_sliding_window"] = architecture.window_size is not None
        if architecture.window_size is not None:
            config["sliding_window"] = architecture.window_size
            config["max_window_layers"] = architecture.full_attention_layers
    if family == "starcoder2":
        config["use_bias"] = architecture.qkv_bias
    config |= _write_rotary(architecture.rotary)
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    for key, token_id in ids.items():
        if token_id is not None or key not in config:
            config[key] = token_id
    return config


def _positions(architecture: Architecture, sequence_length: int | None) -> int:
    if architecture.max_position_embeddings is not None:
        return architecture.max_position_embeddings
    return max(architecture.rotary.stretched_length, sequence_length or 0) or 2048


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
    scaling: dict[str, Any] = {
        "factor": rotary.scale_factor,
        "original_max_position_embeddings": rotary.original_context_length,
        "rope_type": rotary.type,
    }
    if rotary.type == "llama3":
        scaling["high_freq_factor"] = rotary.high_frequency_factor
        scaling["low_freq_factor"] = rotary.low_frequency_factor
    else:
        optional = ("attention_factor", "beta_fast", "beta_slow")
        scaling |= {
            key: getattr(rotary, key) for key in optional if getattr(rotary, key) != getattr(Rotary, key)
        }
    return {
        "rope_theta": rotary.theta,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": rotary.theta},
    }
