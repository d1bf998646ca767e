"""Published shapes, by name: `model: {preset: llama-3.1-8b}`."""

from __future__ import annotations

from modelyard.config.architecture import Architecture, Rotary
from modelyard.errors import UserError, did_you_mean


def _llama3(
    layers: int, hidden: int, ffn: int, heads: int, *, scale: float | None = 8.0, tied: bool = False
) -> Architecture:
    """Llama 3.x: eight key/value heads, 128,256 tokens; 3.1 and later stretch the rotary wavelengths."""
    return Architecture(
        vocab_size=128_256,
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=heads,
        head_groups=8,
        head_size=hidden // heads,
        ffn_hidden_size=ffn,
        tie_word_embeddings=tied,
        rotary=Rotary(type="llama3", theta=500_000.0, scale_factor=scale)
        if scale
        else Rotary(theta=500_000.0),
        max_position_embeddings=131_072 if scale else 8192,
    )


def _qwen2(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    groups: int,
    *,
    vocabulary: int = 151_936,
    epsilon: float = 1e-6,
) -> Architecture:
    """Qwen 2.5 base models: bias on query, key and value; embeddings tied up to 3B."""
    return Architecture(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=heads,
        head_groups=groups,
        head_size=hidden // heads,
        ffn_hidden_size=ffn,
        tie_word_embeddings=vocabulary == 151_936,
        norm_epsilon=epsilon,
        qkv_bias=True,
        rotary=Rotary(theta=1_000_000.0),
        max_position_embeddings=32_768 if hidden in (896, 2048) else 131_072,
    )


def _smollm2(
    layers: int, hidden: int, ffn: int, heads: int, groups: int, *, theta: float = 100_000.0
) -> Architecture:
    """SmolLM2: tied embeddings, 49,152 tokens."""
    return Architecture(
        vocab_size=49_152,
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=heads,
        head_groups=groups,
        head_size=hidden // heads,
        ffn_hidden_size=ffn,
        tie_word_embeddings=True,
        rotary=Rotary(theta=theta),
        max_position_embeddings=8192,
    )


PRESETS: dict[str, Architecture] = {
    "llama-3.2-1b": _llama3(16, 2048, 8192, 32, scale=32.0, tied=True),
    "llama-3.2-3b": _llama3(28, 3072, 8192, 24, scale=32.0, tied=True),
    "llama-3.1-8b": _llama3(32, 4096, 14_336, 32),
    "llama-3.1-70b": _llama3(80, 8192, 28_672, 64),
    "llama-3.1-405b": _llama3(126, 16_384, 53_248, 128),
    "llama-3-8b": _llama3(32, 4096, 14_336, 32, scale=None),
    "llama-2-7b": Architecture(
        vocab_size=32_000,
        hidden_size=4096,
        num_layers=32,
        num_attention_heads=32,
        head_groups=32,
        head_size=128,
        ffn_hidden_size=11_008,
        rotary=Rotary(theta=10_000.0),
        max_position_embeddings=4096,
    ),
    "qwen-2.5-0.5b": _qwen2(24, 896, 4864, 14, 2),
    "qwen-2.5-1.5b": _qwen2(28, 1536, 8960, 12, 2),
    "qwen-2.5-3b": _qwen2(36, 2048, 11_008, 16, 2),
    "qwen-2.5-7b": _qwen2(28, 3584, 18_944, 28, 4, vocabulary=152_064),
    "qwen-2.5-14b": _qwen2(48, 5120, 13_824, 40, 8, vocabulary=152_064, epsilon=1e-5),
    "qwen-2.5-32b": _qwen2(64, 5120, 27_648, 40, 8, vocabulary=152_064, epsilon=1e-5),
    "qwen-2.5-72b": _qwen2(80, 8192, 29_568, 64, 8, vocabulary=152_064, epsilon=1e-5),
    "mistral-7b-v0.3": Architecture(
        vocab_size=32_768,
        hidden_size=4096,
        num_layers=32,
        num_attention_heads=32,
        head_groups=8,
        head_size=128,
        ffn_hidden_size=14_336,
        rotary=Rotary(theta=1_000_000.0),
        max_position_embeddings=32_768,
    ),
    "smollm2-135m": _smollm2(30, 576, 1536, 9, 3),
    "smollm2-360m": _smollm2(32, 960, 2560, 15, 5),
    "smollm2-1.7b": _smollm2(24, 2048, 8192, 32, 32, theta=130_000.0),
    "starcoder2-3b": Architecture(
        vocab_size=49_152,
        hidden_size=3072,
        num_layers=30,
        num_attention_heads=24,
        head_groups=2,
        head_size=128,
        ffn_hidden_size=12_288,
        tie_word_embeddings=True,
        activation="gelu",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        rotary=Rotary(theta=999_999.4420358813),
        window_size=4096,
        max_position_embeddings=16_384,
        gated=False,
        norm_type="layer_norm",
    ),
    "dmas-llama-lite-1.7b": Architecture(
        vocab_size=50_304,
        hidden_size=2048,
        num_layers=36,
        num_attention_heads=32,
        head_groups=8,
        head_size=64,
        ffn_hidden_size=5120,
        rotary=Rotary(theta=500_000.0),
        max_position_embeddings=1024,
    ),
}


def preset(name: str) -> Architecture:
    """The shape called `name`. Raises UserError with the names there are."""
    if name not in PRESETS:
        raise UserError(
            f"unknown preset '{name}'{did_you_mean(name, PRESETS)} (there are: {', '.join(PRESETS)})"
        )
    return PRESETS[name]
