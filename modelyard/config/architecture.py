"""The shape of a decoder, and everything that follows from it by arithmetic. No torch, no pydantic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RotaryType = Literal["none", "default", "llama3"]


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding.

    `llama3` stretches the low frequencies by `scale_factor` (Llama 3.1 report; `reference` rule in
    `modelyard.model.rotary`); the last four fields are read by it alone.
    """

    type: RotaryType = "default"
    theta: float = 10_000.0
    scale_factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context_length: int = 8192


@dataclass(frozen=True)
class Architecture:
    """A Llama-style decoder: grouped-query attention, gated feed-forward, RMSNorm, rotary positions."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    head_groups: int
    """Number of key/value heads."""
    head_size: int
    ffn_hidden_size: int
    tie_word_embeddings: bool = False
    norm_epsilon: float = 1e-5
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    rotary: Rotary = field(default_factory=Rotary)
    window_size: int | None = None
    """Sliding window in tokens, the present one included; None attends to the whole document."""
    max_position_embeddings: int | None = None
    """Longest position that the model is said to support, in tokens; metadata for export."""

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every logical parameter's name and full shape, in the model's order. Tied weights appear once."""
        hidden, head = self.hidden_size, self.head_size
        query, key_value = self.num_attention_heads * head, self.head_groups * head
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, hidden)}

        def linear(name: str, out_features: int, in_features: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (out_features, in_features)
            if bias:
                shapes[f"{name}.bias"] = (out_features,)

        for layer in (f"layers.{i}" for i in range(self.num_layers)):
            shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
            linear(f"{layer}.self_attn.q_proj", query, hidden, self.qkv_bias)
            linear(f"{layer}.self_attn.k_proj", key_value, hidden, self.qkv_bias)
            linear(f"{layer}.self_attn.v_proj", key_value, hidden, self.qkv_bias)
            linear(f"{layer}.self_attn.o_proj", hidden, query, self.output_bias)
            shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
            linear(f"{layer}.mlp.gate_proj", self.ffn_hidden_size, hidden, self.mlp_bias)
            linear(f"{layer}.mlp.up_proj", self.ffn_hidden_size, hidden, self.mlp_bias)
            linear(f"{layer}.mlp.down_proj", hidden, self.ffn_hidden_size, self.mlp_bias)
        shapes["norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def parameter_count(self) -> int:
        """Number of parameters, tied weights counted once."""
        total = 0
        for shape in self.parameter_shapes().values():
            size = 1
            for dimension in shape:
                size *= dimension
            total += size
        return total

    def matmul_flops_per_token(self) -> int:
        """Forward and backward FLOPs of the matrix products with weights, per token (embedding lookup is free)."""
        query, key_value = self.num_attention_heads * self.head_size, self.head_groups * self.head_size
        layer = self.hidden_size * (2 * query + 2 * key_value + 3 * self.ffn_hidden_size)
        return 6 * (self.num_layers * layer + self.vocab_size * self.hidden_size)

    def attention_flops_per_token(self, sequence_length: int, *, causal: bool) -> int:
        """Forward and backward FLOPs of the attention scores and their use, per token, at full rows.

        `causal` counts the lower triangle only (Fast-LLM, Megatron); otherwise the full square (PaLM, torchtitan).
        """
        full = 12 * self.num_layers * self.num_attention_heads * self.head_size * sequence_length
        return full // 2 if causal else full
