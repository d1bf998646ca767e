"""Small random transformers models of every family, as the reference that nobody here wrote."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from modelyard.config.huggingface import architecture_from_config
from modelyard.model.decoder import Decoder
from modelyard.model.formats.huggingface import logical_name

_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama-3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
    "llama-2": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 7}),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2-yarn": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"rope_parameters": _YARN_ROPE | {"beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3}},
    ),
    "smollm2-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "num_attention_heads": 2}),
    "llama-geglu-yarn": (
        LlamaConfig,
        LlamaForCausalLM,
        {"hidden_act": "gelu", "rope_parameters": _YARN_ROPE, "head_dim": 16},
    ),
    "starcoder2": (Starcoder2Config, Starcoder2ForCausalLM, {}),
    "starcoder2-window": (
        Starcoder2Config,
        Starcoder2ForCausalLM,
        {"sliding_window": 7, "use_bias": False, "tie_word_embeddings": False, "hidden_act": "relu2"},
    ),
}


def reference_model(name: str, **changes: Any) -> PreTrainedModel:
    """A random transformers model of the family, fp32, the same each time; norms and biases are random too."""
    config_class, model_class, values = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = config_class(**(_SHAPE | values | changes))
        model = model_class._from_config(config, attn_implementation="sdpa").float().eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1.0 if parameter_name.endswith("norm.weight") else 0.0, 0.2)
    return model


def ours(reference: PreTrainedModel) -> Decoder:
    """Our decoder with the reference's weights."""
    architecture, _ = architecture_from_config(reference.config.to_dict(), "the reference")
    model = Decoder(architecture)
    wanted = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named_weights(reference).items():
            wanted.pop(name).copy_(parameter)
    assert not wanted
    return model


def named_weights(reference: PreTrainedModel) -> dict[str, torch.Tensor]:
    family = reference.config.model_type
    return {str(logical_name(name, family)): p for name, p in reference.named_parameters()}


def whole_rows(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [rows, length] and cu_seqlens [rows, 2] of rows that are one document each."""
    return torch.arange(length).expand(rows, -1), torch.tensor([[0, length]] * rows, dtype=torch.int32)


def in_dtype(reference: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The reference as `from_pretrained(dtype=...)` has it: its rotary frequencies stay fp32."""
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(dtype)
    reference.config.dtype = dtype
    return reference
