"""`model`: the decoder's shape, its initialisation and the number types it is trained in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from modelyard.config.architecture import Activation, Architecture, Rotary
from modelyard.config.base import DataType, Section
from modelyard.config.layout import Recompute, Schedule
from modelyard.config.peft import PeftConfig

Biases = Literal[
    "everywhere",
    "nowhere",
    "only_attn_qkv",
    "only_attn",
    "only_mlp",
    "only_attn_output",
    "attn_qkv_and_mlp",
    "attn_output_and_mlp",
]

# Which of (query/key/value, attention output, feed-forward) carry a bias. All but the first three are Modelyard's own
# words: Hugging Face folders have `attention_bias` without `mlp_bias`, the newest dialect a switch for each layer.
BIASES: dict[Biases, tuple[bool, bool, bool]] = {
    "everywhere": (True, True, True),
    "nowhere": (False, False, False),
    "only_attn_qkv": (True, False, False),
    "only_attn": (True, True, False),
    "only_mlp": (False, False, True),
    "only_attn_output": (False, True, False),
    "attn_qkv_and_mlp": (True, False, True),
    "attn_output_and_mlp": (False, True, True),
}
_BIAS_WORDS = {where: word for word, where in BIASES.items()}

NonNegative = Annotated[float, Field(ge=0)]

INIT_PARTS = {"qkv": "qkv", "attn_proj": "attention_output", "mlp_1": "mlp_in", "mlp_2": "mlp_out"}
"""`init_method_{std,min,max}_<part>` -> the name that `modelyard.model.init` has for the part."""

LEARNED_POSITIONS = 2048
"""Rows of the table of learned positions where `max_position_embeddings` says nothing, in tokens."""


class NormalizationConfig(Section):
    """Normalisation of every block and of the final hidden states."""

    type: Literal["layer_norm", "rms_norm", "none"] = "layer_norm"
    """`layer_norm` (a weight and a bias) or `rms_norm` (a weight); none is not built."""
    epsilon: float = Field(default=1e-5, gt=0)
    """Added to the variance or mean square before the root."""


class RotaryConfig(Section):
    """Rotary position embedding."""

    type: Literal["none", "default", "llama3", "yarn"] = "none"
    """`default`, or one that stretches the low frequencies: `llama3` (Llama 3.1's rule) or `yarn`."""
    theta: float = Field(default=10_000.0, gt=0)
    """Base of the wavelengths."""
    scale_factor: float = Field(default=8.0, gt=0)
    """llama3 and yarn: by how much the low frequencies are stretched."""
    low_frequency_factor: float = Field(default=1.0, gt=0)
    """llama3: wavelengths above original_context_length / this are stretched in full."""
    high_frequency_factor: float = Field(default=4.0, gt=0)
    """llama3: wavelengths below original_context_length / this are kept."""
    original_context_length: int = Field(default=8192, gt=0)
    """llama3 and yarn: context length before the stretching, in tokens."""
    attention_factor: float | None = Field(default=None, gt=0)
    """yarn: factor on cos and sin; default: 0.1 ln(scale_factor) + 1."""
    beta_fast: float = Field(default=32.0, gt=0)
    """yarn: pairs that turn more often than this within original_context_length are kept."""
    beta_slow: float = Field(default=1.0, gt=0)
    """yarn: pairs that turn less often than this within original_context_length are stretched in full."""


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
    """Whether the feed-forward layer is gated: down(act(gate(x)) * up(x)), SwiGLU with silu; else down(act(up(x)))."""
    activation_type: Activation | None = None
    """Activation of the feed-forward layer; default: silu when gated, else gelu (the tanh formula; gelu_exact has erf)."""
    add_linear_biases: bool | Biases = True
    """Where the linear layers have a bias: yes/everywhere, no/nowhere, only_attn_qkv, only_attn (with the output), only_mlp,
    only_attn_output, attn_qkv_and_mlp, attn_output_and_mlp."""
    normalization: NormalizationConfig = Field(default_factory=NormalizationConfig)
    """Normalisation of the blocks and of the final hidden states."""
    rotary: RotaryConfig = Field(default_factory=RotaryConfig)
    """Rotary position embedding."""
    window_size: int | None = Field(default=None, gt=0)
    """Sliding attention window, the present token included, in tokens; null: the whole document."""
    max_window_layers: int | None = Field(default=None, ge=0)
    """With window_size: the first so many blocks attend to the whole document all the same (as in Qwen 2); null: none."""
    attention_softmax_scale_power: float = Field(default=0.5, ge=0)
    """Attention scores are divided by the head's width to this power; 1 under muP with growing heads."""
    full_precision_residual: bool = False
    """Whether the residual stream stays in float32 where training_dtype is narrower."""
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
    init_method_max: float | None = None
    """Initial weights above are moved to this; null: no limit."""
    init_method_max_qkv: float | None = None
    """The same for query, key and value; default: init_method_max."""
    init_method_max_attn_proj: float | None = None
    """The same for the attention's output; default: init_method_max."""
    init_method_max_mlp_1: float | None = None
    """The same for gate and up projections; default: init_method_max."""
    init_method_max_mlp_2: float | None = None
    """The same for the down projection; default: init_method_max."""
    init_method_min: float | None = None
    """Initial weights below are moved to this; null: no limit."""
    init_method_min_qkv: float | None = None
    """The same for query, key and value; default: init_method_min."""
    init_method_min_attn_proj: float | None = None
    """The same for the attention's output; default: init_method_min."""
    init_method_min_mlp_1: float | None = None
    """The same for gate and up projections; default: init_method_min."""
    init_method_min_mlp_2: float | None = None
    """The same for the down projection; default: init_method_min."""
    attention_lr_scale: float | None = Field(default=None, ge=0)
    """Factor on the learning rate of the attention's projections; 0 freezes them; default:
    optimizer.default_learning_rate_scale."""
    mlp_lr_scale: NonNegative | list[NonNegative | None] | None = None
    """The same for the feed-forward layers."""
    per_layer_lr_scale: list[NonNegative | None] | None = None
    """One factor for each block, norms included, on top of the two above; 0 freezes the block."""
    peft: PeftConfig = Field(default_factory=PeftConfig)
    """Low-rank adapters: small matrices that are trained beside those of the blocks, which keep their values."""

    @field_validator("peft", mode="before")
    @classmethod
    def _left_empty(cls, value: Any) -> Any:
        return {} if value is None else value

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
    """Learned absolute positions, beside or instead of rotary; default: yes unless rotary."""
    max_position_embeddings: int | None = Field(default=None, gt=0)
    """Longest position the model is said to support, for exports; default: rotary scale factor x original length, else the
    sequence length. Of learned positions the number there are; default: 2048. In tokens."""
    cross_entropy_impl: Literal["auto", "torch", "fused", "triton"] = "auto"
    """`fused` never holds all logits at once, `torch` is its plain twin; auto and triton mean fused."""
    logit_z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-partition added to the loss."""
    logits_scale_factor: float = Field(default=1.0, gt=0)
    """Factor on the logits."""
    init_method_std_embed: float | None = Field(default=None, gt=0)
    """Standard deviation of the initial embedding, positions and output layer; default: transformer.init_method_std."""
    init_method_max_embed: float | None = None
    """Initial weights of these above are moved to this; default: transformer.init_method_max."""
    init_method_min_embed: float | None = None
    """Initial weights of these below are moved to this; default: transformer.init_method_min."""
    embeddings_lr_scale: float | None = Field(default=None, ge=0)
    """Factor on the learning rate of the embedding and of learned positions; 0 freezes them; default:
    optimizer.default_learning_rate_scale."""
    output_lr_scale: float | None = Field(default=None, ge=0)
    """The same for the output layer where it is not tied."""
    transformer: TransformerConfig = Field(default_factory=TransformerConfig)
    """The decoder's blocks."""


class DistributedConfig(Section):
    """Number types, the seed of the weights, and how many processes share what.

    Processes that are left over share the rows of the batch: world size / (tensor_parallel x pipeline_parallel x
    sequence_data_parallel) data-parallel ones.
    """

    training_dtype: DataType = "float32"
    """Type of the weights and activations in forward and backward; the master weights stay float32 (float64 in float64)."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the initial weights, and of everything else that has no seed of its own."""
    tensor_parallel: int = Field(default=1, gt=0)
    """Processes that each matrix is spread over; divides heads, head groups, feed-forward width and vocabulary."""
    sequence_tensor_parallel: bool = False
    """Whether tensor-parallel processes share the tokens of norms and residuals, too: less memory, as much communication."""
    sequence_data_parallel: int = Field(default=1, gt=0)
    """Processes that the tokens of each row are spread over (context parallelism)."""
    pipeline_parallel: int = Field(default=1, gt=0)
    """Processes that the layers are spread over."""
    pipeline_schedule: Schedule = "1f1b"
    """Order in which a pipeline takes its micro-batches: gpipe, 1f1b, interleaved, zero_bubble or zbv."""
    stages_per_process: int | None = Field(default=None, gt=0)
    """Stretches of layers that each process of a pipeline has; default: 2 under interleaved, zero_bubble and zbv, else 1."""
    data_parallel_replicas: int = Field(default=1, gt=0)
    """Whole copies of the model among the data-parallel processes; each copy is sharded over the rest of them."""
    timeout: float = Field(default=600.0, gt=0)
    """How long a process waits for the others before the run fails, in seconds."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """How processes talk; auto: nccl on GPUs, gloo elsewhere."""


class MultiStageConfig(Section):
    """What of the model each data-parallel process keeps, and what it computes again."""

    zero_stage: int | None = Field(default=None, ge=1, le=3)
    """What processes that share a copy keep only their part of: 1 optimizer state and master weights, 2 gradients between
    micro-batches too, 3 weights between forward and backward too; null: 1."""
    cpu_offload: bool = False
    """Whether master weights, gradients and optimizer state live in the host's memory, where a GPU has too little."""
    recompute: Recompute = "none"
    """Activations that the backward computes again instead of keeping them: none, selective (all but matrix products and
    attention), full (whole blocks)."""
    offload_activations: bool = False
    """Whether what `recompute: full` keeps of each block, its input, is in the host's memory between forward and backward;
    without a GPU it is there in any case."""


class ModelConfig(Section):
    """The model."""

    preset: str | None = None
    """A published shape to start from, such as llama-3.1-8b; keys given beside it override it."""
    base_model: BaseModelConfig = Field(default_factory=BaseModelConfig)
    """The decoder."""
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    """Number types, the seed of the weights, and how many processes share what."""
    multi_stage: MultiStageConfig = Field(default_factory=MultiStageConfig)
    """What of the model each data-parallel process keeps, and what it computes again."""

    @field_validator("multi_stage", mode="before")
    @classmethod
    def _left_empty(cls, value: Any) -> Any:
        return {} if value is None else value


class PretrainedConfig(Section):
    """A model to start from: its shape, and its weights unless model_weights is `no`."""

    path: Path
    """A Hugging Face folder (config.json, *.safetensors) or a checkpoint, relative to the working directory."""
    format: Literal["auto", "llama", "qwen2", "mistral", "starcoder2"] = "auto"
    """Family that the folder must hold; auto: as its config.json says. A checkpoint must fit it."""
    model_weights: bool = True
    """Whether the weights are read; `no` takes the shape only."""
    adapter: Path | None = None
    """An adapter of that model to go on with: PEFT's folder, or a checkpoint; model.base_model.transformer.peft is then as it
    says. Without peft to train, it is merged."""
    load_config: Literal["model", "none"] = "model"
    """`model`: the shape comes from the folder, keys given here override it; `none`: the shape is given here alone."""


def architecture_problems(
    model: BaseModelConfig, sequence_length: int | None = None
) -> list[tuple[str, str]]:
    """What of a resolved decoder cannot be built: (key below model.base_model, one-line problem with the line to write).

    `sequence_length` (tokens) is that of the rows it is to be trained on.
    """
    transformer, rotary = model.transformer, model.transformer.rotary
    problems = []

    def refuse(key: str, problem: str) -> None:
        problems.append((key, problem))

    if transformer.normalization.type == "none":
        refuse(
            "transformer.normalization.type",
            "a decoder without normalization is not supported; write type: rms_norm or layer_norm",
        )
    positions = _learned_positions(model)
    if positions is not None and (sequence_length or 0) > positions:
        refuse(
            "max_position_embeddings",
            f"rows of {sequence_length} tokens are longer than the {positions} learned positions; write "
            f"max_position_embeddings: {sequence_length}, or rotary: {{type: default}} in their place",
        )
    if transformer.max_window_layers is not None and transformer.window_size is None:
        refuse(
            "transformer.max_window_layers",
            "there is no window: give window_size too, or leave max_window_layers out",
        )
    limits = {f"transformer.init_method_min_{key}": part for key, part in INIT_PARTS.items()}
    impossible = {
        key: init_limits(model)[part]
        for key, part in (limits | {"init_method_min_embed": "embedding"}).items()
        if not _in_order(*init_limits(model)[part])
    }
    overall = (transformer.init_method_min, transformer.init_method_max)
    if not _in_order(*overall):  # it is where the others have theirs from
        impossible = {"transformer.init_method_min": overall}
    for key, (lowest, highest) in impossible.items():
        refuse(
            key, f"initial weights cannot be at least {lowest:g} and at most {highest:g} (init_method_max)"
        )
    if rotary.type == "yarn" and rotary.theta <= 1:
        refuse("transformer.rotary.theta", f"yarn needs a theta above 1, not {rotary.theta:g}")
    if rotary.type == "yarn" and rotary.beta_fast < rotary.beta_slow:
        refuse("transformer.rotary.beta_fast", "beta_fast must not be below beta_slow")
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


def _learned_positions(model: BaseModelConfig) -> int | None:
    """How many learned absolute positions the decoder has; None: it has none."""
    learned = model.use_position_embeddings
    if learned is None:
        learned = model.transformer.rotary.type == "none"
    return (model.max_position_embeddings or LEARNED_POSITIONS) if learned else None


def _in_order(lowest: float | None, highest: float | None) -> bool:
    return lowest is None or highest is None or lowest <= highest


def init_limits(model: BaseModelConfig) -> dict[str, tuple[float | None, float | None]]:
    """(lowest, highest) initial weight by the parts of `modelyard.model.init`; a part's own limit wins."""

    def own(section: Section, key: str, default: float | None) -> float | None:
        value: float | None = getattr(section, key)
        return default if value is None else value

    lowest, highest = model.transformer.init_method_min, model.transformer.init_method_max
    limits = {
        part: (
            own(model.transformer, f"init_method_min_{key}", lowest),
            own(model.transformer, f"init_method_max_{key}", highest),
        )
        for key, part in INIT_PARTS.items()
    }
    limits["embedding"] = (
        own(model, "init_method_min_embed", lowest),
        own(model, "init_method_max_embed", highest),
    )
    return limits


def architecture_of(model: BaseModelConfig, sequence_length: int) -> Architecture:
    """The decoder's shape from a resolved section that has no `architecture_problems`."""
    transformer, rotary = model.transformer, model.transformer.rotary
    qkv_bias, output_bias, mlp_bias = transformer.biases
    shape = Rotary(
        type=rotary.type,
        theta=rotary.theta,
        scale_factor=rotary.scale_factor,
        low_frequency_factor=rotary.low_frequency_factor,
        high_frequency_factor=rotary.high_frequency_factor,
        original_context_length=rotary.original_context_length,
        attention_factor=rotary.attention_factor,
        beta_fast=rotary.beta_fast,
        beta_slow=rotary.beta_slow,
    )
    learned = _learned_positions(model)
    assert transformer.normalization.type != "none"
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
        activation=transformer.activation_type or ("silu" if transformer.gated else "gelu"),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        rotary=shape,
        window_size=transformer.window_size,
        max_position_embeddings=model.max_position_embeddings
        or learned
        or max(sequence_length, shape.stretched_length),
        gated=transformer.gated,
        norm_type=transformer.normalization.type,
        full_attention_layers=(transformer.max_window_layers or 0) if transformer.window_size else 0,
        softmax_scale_power=transformer.attention_softmax_scale_power,
        position_embeddings=learned,
        full_precision_residual=transformer.full_precision_residual,
        logits_scale=model.logits_scale_factor,
    )


def base_model_of(architecture: Architecture) -> dict[str, object]:
    """The inverse: `model.base_model` as a plain dictionary, every shape key written out."""
    biases = (architecture.qkv_bias, architecture.output_bias, architecture.mlp_bias)
    rotary = architecture.rotary
    rotary_keys: dict[str, object] = {"type": rotary.type, "theta": rotary.theta}
    if rotary.type in ("llama3", "yarn"):
        rotary_keys |= {
            "scale_factor": rotary.scale_factor,
            "original_context_length": rotary.original_context_length,
        }
    if rotary.type == "llama3":
        rotary_keys |= {
            "low_frequency_factor": rotary.low_frequency_factor,
            "high_frequency_factor": rotary.high_frequency_factor,
        }
    if rotary.type == "yarn":
        rotary_keys |= {
            "attention_factor": rotary.attention_factor,
            "beta_fast": rotary.beta_fast,
            "beta_slow": rotary.beta_slow,
        }
    result: dict[str, object] = {
        "vocab_size": architecture.vocab_size,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "use_position_embeddings": architecture.position_embeddings is not None,
        "logits_scale_factor": architecture.logits_scale,
        "transformer": {
            "num_layers": architecture.num_layers,
            "hidden_size": architecture.hidden_size,
            "num_attention_heads": architecture.num_attention_heads,
            "head_groups": architecture.head_groups,
            "kv_channels": architecture.head_size,
            "ffn_hidden_size": architecture.ffn_hidden_size,
            "gated": architecture.gated,
            "activation_type": architecture.activation,
            "add_linear_biases": _BIAS_WORDS[biases],
            "normalization": {"type": architecture.norm_type, "epsilon": architecture.norm_epsilon},
            "rotary": rotary_keys,
            "window_size": architecture.window_size,
            "max_window_layers": architecture.full_attention_layers or None,
            "attention_softmax_scale_power": architecture.softmax_scale_power,
            "full_precision_residual": architecture.full_precision_residual,
        },
    }
    if positions := architecture.position_embeddings or architecture.max_position_embeddings:
        result["max_position_embeddings"] = positions
    return result
