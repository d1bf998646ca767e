"""`model`: the decoder's shape, its initialisation and the number types it is trained in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from modelyard.config.architecture import Architecture, Rotary
from modelyard.config.base import DataType, Section

Biases = Literal["everywhere", "nowhere", "only_attn_qkv", "only_attn", "only_mlp"]

# Which of (query/key/value, attention output, feed-forward) carry a bias. The last two are Modelyard's own words, for
# Hugging Face folders that have `attention_bias` without `mlp_bias` or the reverse.
BIASES: dict[Biases, tuple[bool, bool, bool]] = {
    "everywhere": (True, True, True),
    "nowhere": (False, False, False),
    "only_attn_qkv": (True, False, False),
    "only_attn": (True, True, False),
    "only_mlp": (False, False, True),
}


class NormalizationConfig(Section):
    """Normalisation of every block and of the final hidden states."""

    type: Literal["layer_norm", "rms_norm", "none"] = "layer_norm"
    """Kind of normalisation. Only rms_norm is built; the default is the dialect's and has to be overridden."""
    epsilon: float = Field(default=1e-5, gt=0)
    """Added to the mean square before the root."""


class RotaryConfig(Section):
    """Rotary position embedding."""

    type: Literal["none", "default", "llama3", "yarn"] = "none"
    """`default`, or `llama3` (Llama 3.1's stretching of the low frequencies); yarn is not built."""
    theta: float = Field(default=10_000.0, gt=0)
    """Base of the wavelengths."""
    scale_factor: float = Field(default=8.0, gt=0)
    """llama3: by how much the low frequencies are stretched."""
    low_frequency_factor: float = Field(default=1.0, gt=0)
    """llama3: wavelengths above original_context_length / this are stretched in full."""
    high_frequency_factor: float = Field(default=4.0, gt=0)
    """llama3: wavelengths below original_context_length / this are kept."""
    original_context_length: int = Field(default=8192, gt=0)
    """llama3: context length before the stretching, in tokens."""


class TransformerConfig(Section):
    """The decoder's blocks."""

    num_layers: int = Field(default=12, gt=0, le=10_000)
    """Number of blocks."""
    hidden_size: int = Field(default=1024, gt=0)
    """Width of the hidden states."""
    num_attention_heads: int = Field(default=8, gt=0)
    """Query heads of each block."""
    head_groups: int = Field(default=1, gt=0)
    """Key/value heads of each block; divides num_attention_heads."""
    kv_channels: int | None = Field(default=None, gt=0)
    """Width of one head; default: hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = Field(default=None, gt=0)
    """Width of the feed-forward layer; default: 4 x hidden_size."""
    gated: bool = False
    """Whether the feed-forward layer is gated (SwiGLU). Only gated ones are built."""
    activation_type: Literal["silu", "gelu", "relu", "squared_relu", "identity"] | None = None
    """Activation of the feed-forward layer; default: silu when gated, else gelu. Only silu is built."""
    add_linear_biases: bool | Biases = True
    """Where the linear layers have a bias: yes/everywhere, no/nowhere, only_attn_qkv, only_attn (with the output), only_mlp."""
    normalization: NormalizationConfig = Field(default_factory=NormalizationConfig)
    """Normalisation of the blocks and of the final hidden states."""
    rotary: RotaryConfig = Field(default_factory=RotaryConfig)
    """Rotary position embedding."""
    window_size: int | None = Field(default=None, gt=0)
    """Sliding attention window, the present token included, in tokens; null: the whole document."""
    init_method_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the initial weights; default: hidden_size ** -0.5."""
    init_method_std_qkv: float | None = Field(default=None, gt=0)
    """The same for query, key and value; default: init_method_std."""
    init_method_std_attn_proj: float | None = Field(default=None, gt=0)
    """The same for the attention's output; default: init_method_std / sqrt(2 x num_layers)."""
    init_method_std_mlp_1: float | None = Field(default=None, gt=0)
    """The same for gate and up projections; default: init_method_std."""
    init_method_std_mlp_2: float | None = Field(default=None, gt=0)
    """The same for the down projection; default: init_method_std / sqrt(2 x num_layers)."""

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        """Whether (query/key/value, attention output, feed-forward) carry a bias."""
        where = self.add_linear_biases
        if isinstance(where, bool):
            where = "everywhere" if where else "nowhere"
        return BIASES[where]


class BaseModelConfig(Section):
    """The decoder."""

    vocab_size: int = Field(default=49_152, gt=0)
    """Rows of the embedding, in tokens; at least the tokenizer's."""
    tie_word_embeddings: bool = True
    """Whether the output layer is the embedding."""
    use_position_embeddings: bool | None = None
    """Learned absolute positions; default: yes unless rotary. They are not built: use rotary."""
    max_position_embeddings: int | None = Field(default=None, gt=0)
    """Longest position the model is said to support, for exports; default: rotary scale factor x original length, else the sequence length; in tokens."""
    cross_entropy_impl: Literal["auto", "torch", "fused", "triton"] = "auto"
    """`fused` never holds all logits at once, `torch` is its plain twin; auto and triton mean fused."""
    logit_z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-partition added to the loss."""
    logits_scale_factor: float = Field(default=1.0, gt=0)
    """Factor on the logits."""
    init_method_std_embed: float | None = Field(default=None, gt=0)
    """Standard deviation of the initial embedding and output layer; default: hidden_size ** -0.5."""
    transformer: TransformerConfig = Field(default_factory=TransformerConfig)
    """The decoder's blocks."""


class DistributedConfig(Section):
    """Number types and the seed of the weights."""

    training_dtype: DataType = "float32"
    """Type of the weights and activations in forward and backward; the master weights stay float32 (float64 in float64)."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the initial weights, and of everything else that has no seed of its own."""


class ModelConfig(Section):
    """The model."""

    preset: str | None = None
    """A published shape to start from, such as llama-3.1-8b; keys given beside it override it."""
    base_model: BaseModelConfig = Field(default_factory=BaseModelConfig)
    """The decoder."""
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    """Number types and the seed of the weights."""


class PretrainedConfig(Section):
    """A model to start from: its shape, and its weights unless model_weights is `no`."""

    path: Path
    """A Hugging Face folder (config.json, *.safetensors), relative to the working directory."""
    format: Literal["auto", "llama", "qwen2", "mistral"] = "auto"
    """Family that the folder must hold; auto: as its config.json says."""
    model_weights: bool = True
    """Whether the weights are read; `no` takes the shape only."""
    load_config: Literal["model", "none"] = "model"
    """`model`: the shape comes from the folder, keys given here override it; `none`: the shape is given here alone."""


def architecture_problems(model: BaseModelConfig) -> list[tuple[str, str]]:
    """What of a resolved decoder cannot be built: (key below model.base_model, one-line problem with the line to write)."""
    transformer, rotary = model.transformer, model.transformer.rotary
    problems = []

    def refuse(key: str, problem: str) -> None:
        problems.append((key, problem))

    if transformer.normalization.type != "rms_norm":
        refuse(
            "transformer.normalization.type",
            f"normalization {transformer.normalization.type} is not supported; write normalization: {{type: rms_norm}}",
        )
    if not transformer.gated:
        refuse(
            "transformer.gated", "a feed-forward layer that is not gated is not supported; write gated: yes"
        )
    if transformer.gated and transformer.activation_type not in (None, "silu"):
        refuse(
            "transformer.activation_type",
            f"activation {transformer.activation_type} is not supported; write activation_type: silu",
        )
    if rotary.type == "yarn":
        refuse(
            "transformer.rotary.type", "rotary type yarn is not supported yet; write type: default or llama3"
        )
    if model.use_position_embeddings or (model.use_position_embeddings is None and rotary.type == "none"):
        refuse(
            "use_position_embeddings",
            "learned absolute positions are not supported; write rotary: {type: default} "
            "(and use_position_embeddings: no where it says yes)",
        )
    heads = transformer.num_attention_heads
    if heads % transformer.head_groups:
        refuse(
            "transformer.head_groups",
            f"head_groups {transformer.head_groups} does not divide num_attention_heads {heads}",
        )
    if transformer.kv_channels is None and transformer.hidden_size % heads:
        refuse(
            "transformer.num_attention_heads",
            f"num_attention_heads {heads} does not divide hidden_size {transformer.hidden_size}; give kv_channels or change one",
        )
    head_size = transformer.kv_channels or transformer.hidden_size / heads
    if rotary.type != "none" and head_size % 2 == 1:
        refuse("transformer.kv_channels", f"rotary needs an even head width, not {head_size}")
    if rotary.type == "llama3" and rotary.high_frequency_factor <= rotary.low_frequency_factor:
        refuse(
            "transformer.rotary.high_frequency_factor",
            "high_frequency_factor must be above low_frequency_factor",
        )
    return problems


def architecture_of(model: BaseModelConfig, sequence_length: int) -> Architecture:
    """The decoder's shape from a resolved section that has no `architecture_problems`."""
    transformer, rotary = model.transformer, model.transformer.rotary
    qkv_bias, output_bias, mlp_bias = transformer.biases
    positions = model.max_position_embeddings
    if positions is None:
        positions = sequence_length
        if rotary.type == "llama3":
            positions = max(positions, round(rotary.scale_factor * rotary.original_context_length))
    assert rotary.type != "yarn"
    return Architecture(
        vocab_size=model.vocab_size,
        hidden_size=transformer.hidden_size,
        num_layers=transformer.num_layers,
        num_attention_heads=transformer.num_attention_heads,
        head_groups=transformer.head_groups,
        head_size=transformer.kv_channels or transformer.hidden_size // transformer.num_attention_heads,
        ffn_hidden_size=transformer.ffn_hidden_size or 4 * transformer.hidden_size,
        tie_word_embeddings=model.tie_word_embeddings,
        norm_epsilon=transformer.normalization.epsilon,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        rotary=Rotary(
            type=rotary.type,
            theta=rotary.theta,
            scale_factor=rotary.scale_factor,
            low_frequency_factor=rotary.low_frequency_factor,
            high_frequency_factor=rotary.high_frequency_factor,
            original_context_length=rotary.original_context_length,
        ),
        window_size=transformer.window_size,
        max_position_embeddings=positions,
    )


def base_model_of(architecture: Architecture) -> dict[str, object]:
    """The inverse: `model.base_model` as a plain dictionary, every shape key written out."""
    biases = (architecture.qkv_bias, architecture.output_bias, architecture.mlp_bias)
    words = [word for word, where in BIASES.items() if where == biases]
    if not words:
        raise ValueError(
            f"no add_linear_biases word for biases on (query/key/value, output, feed-forward) = {biases}"
        )
    rotary = architecture.rotary
    rotary_keys: dict[str, object] = {"type": rotary.type, "theta": rotary.theta}
    if rotary.type == "llama3":
        rotary_keys |= {
            "scale_factor": rotary.scale_factor,
            "low_frequency_factor": rotary.low_frequency_factor,
            "high_frequency_factor": rotary.high_frequency_factor,
            "original_context_length": rotary.original_context_length,
        }
    result: dict[str, object] = {
        "vocab_size": architecture.vocab_size,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "use_position_embeddings": False,
        "transformer": {
            "num_layers": architecture.num_layers,
            "hidden_size": architecture.hidden_size,
            "num_attention_heads": architecture.num_attention_heads,
            "head_groups": architecture.head_groups,
            "kv_channels": architecture.head_size,
            "ffn_hidden_size": architecture.ffn_hidden_size,
            "gated": True,
            "activation_type": architecture.activation,
            "add_linear_biases": words[0],
            "normalization": {"type": "rms_norm", "epsilon": architecture.norm_epsilon},
            "rotary": rotary_keys,
            "window_size": architecture.window_size,
        },
    }
    if architecture.max_position_embeddings is not None:
        result["max_position_embeddings"] = architecture.max_position_embeddings
    return result
