"""The shape of a decoder, and everything that follows from it by arithmetic. No torch, no pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RotaryType = Literal["none", "default", "llama3", "yarn"]
NormType = Literal["rms_norm", "layer_norm"]
Activation = Literal["silu", "gelu", "gelu_exact", "relu", "squared_relu", "identity"]
"""`gelu` is the tanh formula, as in the guides' dialect; `gelu_exact` has the error function."""


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding.

    `llama3` stretches the low frequencies by `scale_factor` (Llama 3.1 report), `yarn` those that turn less than
    `beta_slow` times within `original_context_length` (arXiv 2309.00071); both rules are in `modelyard.model.rotary`.
    """

    type: RotaryType = "default"
    theta: float = 10_000.0
    scale_factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context_length: int = 8192
    attention_factor: float | None = None
    """yarn: factor on cos and sin; None: 0.1 ln(scale_factor) + 1."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def stretched_length(self) -> int:
        """Longest position after the stretching, in tokens; 0 where nothing is stretched."""
        return (
            round(self.scale_factor * self.original_context_length) if self.type in ("llama3", "yarn") else 0
        )


@dataclass(frozen=True)
class Architecture:
    """A decoder of blocks with grouped-query attention and a feed-forward, each behind its norm.

    The defaults are Llama's: gated feed-forward, RMSNorm, rotary positions, no biases.
    """

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
    activation: Activation = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    rotary: Rotary = field(default_factory=Rotary)
    window_size: int | None = None
    """Sliding window in tokens, the present one included; None attends to the whole document."""
    max_position_embeddings: int | None = None
    """Longest position that the model is said to support, in tokens; metadata for export."""
    gated: bool = True
    """Whether the feed-forward is down(act(gate(x)) * up(x)), and not down(act(up(x)))."""
    norm_type: NormType = "rms_norm"
    full_attention_layers: int = 0
    """With a window: the first so many layers attend to the whole document all the same."""
    softmax_scale_power: float = 0.5
    """Attention scores are divided by head_size to this power."""
    position_embeddings: int | None = None
    """Learned absolute positions: rows of their table, in tokens; None: there are none."""
    full_precision_residual: bool = False
    """Whether the residual stream stays fp32 where the weights are narrower."""
    logits_scale: float = 1.0
    """Factor on the logits, in training and in whatever uses the model."""

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer, in tokens."""
        return None if layer < self.full_attention_layers else self.window_size

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every logical parameter's name and full shape, in the model's order. Tied weights appear once."""
        hidden, head = self.hidden_size, self.head_size
        query, key_value = self.num_attention_heads * head, self.head_groups * head
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, hidden)}
        if self.position_embeddings is not None:
            shapes["embed_positions.weight"] = (self.position_embeddings, hidden)

        def norm(name: str) -> None:
            shapes[f"{name}.weight"] = (hidden,)
            if self.norm_type == "layer_norm":
                shapes[f"{name}.bias"] = (hidden,)

        def linear(name: str, out_features: int, in_features: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (out_features, in_features)
            if bias:
                shapes[f"{name}.bias"] = (out_features,)

        for layer in (f"layers.{i}" for i in range(self.num_layers)):
            norm(f"{layer}.input_layernorm")
            linear(f"{layer}.self_attn.q_proj", query, hidden, self.qkv_bias)
            linear(f"{layer}.self_attn.k_proj", key_value, hidden, self.qkv_bias)
            linear(f"{layer}.self_attn.v_proj", key_value, hidden, self.qkv_bias)
            linear(f"{layer}.self_attn.o_proj", hidden, query, self.output_bias)
            norm(f"{layer}.post_attention_layernorm")
            if self.gated:
                linear(f"{layer}.mlp.gate_proj", self.ffn_hidden_size, hidden, self.mlp_bias)
            linear(f"{layer}.mlp.up_proj", self.ffn_hidden_size, hidden, self.mlp_bias)
            linear(f"{layer}.mlp.down_proj", hidden, self.ffn_hidden_size, self.mlp_bias)
        norm("norm")
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
        feed_forward = (3 if self.gated else 2) * self.ffn_hidden_size
        layer = self.hidden_size * (2 * query + 2 * key_value + feed_forward)
        return 6 * (self.num_layers * layer + self.vocab_size * self.hidden_size)

    def attention_flops_per_token(self, sequence_length: int, *, causal: bool) -> int:
        """Forward and backward FLOPs of the attention scores and their use, per token, at full rows.

        `causal` counts the lower triangle only (Fast-LLM, Megatron); otherwise the full square (PaLM, torchtitan).
        Of layers with a window only what is inside it is counted.
        """
        keys = 0.0  # of one query, on average, summed over the layers
        for layer in range(self.num_layers):
            window = min(self.window_of(layer) or sequence_length, sequence_length)
            keys += window - window * window / (2 * sequence_length) if causal else window
        return round(12 * self.num_attention_heads * self.head_size * keys)


def architecture_from(fields: Mapping[str, Any]) -> Architecture:
    """The shape that `dataclasses.asdict` made `fields` of."""
    return Architecture(**{**fields, "rotary": Rotary(**fields["rotary"])})
