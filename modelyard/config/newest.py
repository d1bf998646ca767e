"""The newest dialect (Fast-LLM 0.3 and later) as tables: each of its keys, and what it is in today's spelling.

Eras: 0.3.0 (2025-09) brought `decoder.block` and `compute_dtype`, 0.4.0 (2026-03) took `batch` away. Keys that were only
renamed are rows of `modelyard.config.dialect.REPAIRS`; here are those with a meaning of their own. `translation.py` acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelyard.config.document import KeyPath
from modelyard.config.model import BIASES

BASE: KeyPath = ("model", "base_model")
DIALECT = "the newest dialect (Fast-LLM >= 0.3)"
BOUNDS = ("std", "min", "max")
"""What is said of initial weights, here and there."""


@dataclass(frozen=True)
class To:
    """A key, or a whole section, that has another name today."""

    target: KeyPath


@dataclass(frozen=True)
class Only:
    """A key without counterpart: left out at a harmless value, refused at any other."""

    harmless: tuple[Any, ...]
    why: str
    """What to do about any other value."""


@dataclass(frozen=True)
class Part:
    """A key that has a counterpart only together with others; whatever is below it goes along."""

    targets: tuple[KeyPath, ...]
    """What it decides, today."""


Rule = To | Only | Part

_DEFAULT_START: tuple[Any, ...] = (None, {}, {"type": "default"})
_ONE_RATE = Only(
    (None, 1, 1.0),
    "only embeddings, mixer, mlp and head.output_weight have an lr_scale of their own here; leave it out",
)
_NO_LORA = Only(
    (None, False),
    "which matrices have an adapter is said once: leave it out, and write base_model.peft.layers",
)
_NO_DROPOUT = Only((None, 0, 0.0), "dropout is not supported; write dropout: 0")
_STANDARD_START = Only(_DEFAULT_START, "norms start at one and biases at zero; leave it out")
_ALIKE = "all blocks are alike here"


def path(key: str) -> KeyPath:
    return tuple(key.split("."))


def _to(target: str) -> To:
    return To((*BASE, *path(target)))


def _part(*targets: str) -> Part:
    return Part(tuple((*BASE, *path(target)) for target in targets))


def _start(which: str) -> Part:
    """Initial weights of `which`, a key with `*` for std, min and max."""
    return _part(*(which.replace("*", bound) for bound in BOUNDS))


def _linear(name: str, initial: str) -> dict[str, Rule]:
    return {
        f"{name}.weight.initialization": _start(initial),
        f"{name}.weight.lr_scale": _ONE_RATE,
        f"{name}.bias.enabled": _part("transformer.add_linear_biases"),
        f"{name}.bias.initialization": _STANDARD_START,
        f"{name}.bias.lr_scale": _ONE_RATE,
        f"{name}.lr_scale": _ONE_RATE,
        f"{name}.apply_peft": _NO_LORA,
    }


def _normalization(name: str) -> dict[str, Rule]:
    rules: dict[str, Rule] = {
        f"{name}.{key}": _part(f"transformer.normalization.{key}")
        for key in ("type", "epsilon", "zero_centered")
    }
    rules[f"{name}.implementation"] = Only(
        (None, "auto", "torch", "fused", "fast", "triton"), "it chooses a kernel; leave it out"
    )
    rules[f"{name}.lr_scale"] = _ONE_RATE
    for parameter in ("weight", "bias"):
        rules[f"{name}.{parameter}.initialization"] = _STANDARD_START
        rules[f"{name}.{parameter}.lr_scale"] = _ONE_RATE
    return rules


_MIXER = "decoder.block.mixer"
_MLP = "decoder.block.mlp"
QKV = tuple(f"{_MIXER}.{name}_layer" for name in ("query", "key", "value"))
OUTPUT = f"{_MIXER}.dense_layer"
MLP_1, MLP_2 = f"{_MLP}.layer_1", f"{_MLP}.layer_2"

_BASE_RULES: dict[str, Rule] = {
    "hidden_size": _to("transformer.hidden_size"),
    "tied_embedding_weight": _to("tie_word_embeddings"),
    "peft": _to("transformer.peft"),
    "embeddings.vocab_size": _to("vocab_size"),
    "embeddings.vocab_parallel": _to("parallel_embeddings"),
    "embeddings.position_embeddings.enabled": _to("use_position_embeddings"),
    "embeddings.position_embeddings.initialization": Only(
        _DEFAULT_START, "learned positions are not supported"
    ),
    "embeddings.position_embeddings.lr_scale": _ONE_RATE,
    "embeddings.num_position_embeddings": _to("max_position_embeddings"),
    "embeddings.full_precision_residual": _to("transformer.full_precision_residual"),
    "embeddings.dropout": _NO_DROPOUT,
    "embeddings.word_embeddings.initialization": _start("init_method_*_embed"),
    "embeddings.word_embeddings.lr_scale": _ONE_RATE,
    "embeddings.lr_scale": _to("embeddings_lr_scale"),
    "decoder.type": _part(),
    "decoder.blocks": _part(),
    "decoder.pattern": _part(),
    "decoder.num_blocks": _to("transformer.num_layers"),
    "decoder.lr_scale": _ONE_RATE,
    "decoder.block.type": Only((None, "decoder"), "only blocks of type decoder are supported"),
    "decoder.block.dropout": _NO_DROPOUT,
    "decoder.block.lr_scale": _ONE_RATE,
    f"{_MIXER}.type": Only((None, "attention"), "only mixers of type attention are supported"),
    f"{_MIXER}.causal": Only((None, True), "attention is causal here"),
    f"{_MIXER}.heads": _to("transformer.num_attention_heads"),
    f"{_MIXER}.head_groups": _to("transformer.head_groups"),
    f"{_MIXER}.head_size": _to("transformer.kv_channels"),
    f"{_MIXER}.rotary": _to("transformer.rotary"),
    f"{_MIXER}.window_size": _to("transformer.window_size"),
    f"{_MIXER}.use_flash_attention": _to("transformer.use_flash_attention"),
    f"{_MIXER}.implementation": Only(
        (None, "auto", "flash", "sdpa", "sdpa_nested", "sdpa_dense", "backup"),
        "it chooses a kernel; leave it out",
    ),
    f"{_MIXER}.dropout": _to("transformer.attention_dropout"),
    f"{_MIXER}.softmax_scale_power": _to("transformer.attention_softmax_scale_power"),
    f"{_MIXER}.add_linear_biases": _part("transformer.add_linear_biases"),
    f"{_MIXER}.lr_scale": _to("transformer.attention_lr_scale"),
    f"{_MLP}.type": Only((None, "mlp"), "mixtures of experts are not supported; write type: mlp"),
    f"{_MLP}.intermediate_size": _to("transformer.ffn_hidden_size"),
    f"{_MLP}.gated": _to("transformer.gated"),
    f"{_MLP}.activation": _to("transformer.activation_type"),
    f"{_MLP}.recompute_level": _to("transformer.mlp_recompute_level"),
    f"{_MLP}.add_linear_biases": _part("transformer.add_linear_biases"),
    f"{_MLP}.lr_scale": _to("transformer.mlp_lr_scale"),
    f"{_MLP}.experts": _to("transformer.num_experts"),
    f"{_MLP}.shared_experts": _to("transformer.num_shared_experts"),
    f"{_MLP}.experts_per_token": _to("transformer.num_experts_per_token"),
    f"{_MLP}.routing": _to("transformer.expert_routing_type"),
    f"{_MLP}.auxiliary_loss_coefficient": _to("transformer.expert_auxiliary_loss_coefficient"),
    f"{_MLP}.z_loss_coefficient": _to("transformer.expert_z_loss_coefficient"),
    f"{_MLP}.jitter_eps": _to("transformer.moe_jitter_eps"),
    f"{_MLP}.implementation": Only((None, "auto"), "mixtures of experts are not supported"),
    **{key: rule for name in QKV for key, rule in _linear(name, "transformer.init_method_*_qkv").items()},
    **_linear(OUTPUT, "transformer.init_method_*_attn_proj"),
    **_linear(MLP_1, "transformer.init_method_*_mlp_1"),
    **_linear(MLP_2, "transformer.init_method_*_mlp_2"),
    **_normalization("decoder.block.normalization"),
    **_normalization("head.normalization"),
    "head.type": Only((None, "language_model_head"), "only language-model heads are supported"),
    "head.losses": _part("logit_z_loss", "cross_entropy_impl"),
    "head.loss_implementation": _to("cross_entropy_impl"),
    "head.cross_entropy_implementation": _to("cross_entropy_impl"),
    "head.cross_entropy_splits": _to("cross_entropy_splits"),
    "head.logit_z_loss": _to("logit_z_loss"),
    "head.logits_scale_factor": _to("logits_scale_factor"),
    "head.prediction_heads": _to("prediction_heads"),
    "head.distillation_model": _to("distillation_model"),
    "head.enable_dpo": _to("enable_dpo"),
    "head.dpo_beta": _to("dpo_beta"),
    "head.dpo_reference_model": _to("dpo_reference_model"),
    "head.output_weight.initialization": _start("init_method_*_embed"),
    "head.output_weight.lr_scale": _to("output_lr_scale"),
    "head.lr_scale": _ONE_RATE,
}

BATCH_SIZE: KeyPath = ("batch", "batch_size")
SEQUENCE: KeyPath = ("batch", "sequence_length")
MICRO_BATCH: KeyPath = ("batch", "micro_batch_size")
TIED: KeyPath = (*BASE, "tie_word_embeddings")
POSITIONS: KeyPath = (*BASE, "use_position_embeddings")
EMBEDDING_START: KeyPath = (*BASE, "init_method_*_embed")
TOKENS: KeyPath = ("data", "micro_batch_size")
LONGEST: KeyPath = ("data", "maximum_document_length")
DEPTH_FIRST: KeyPath = ("schedule", "depth_first_micro_batches")
BREADTH_FIRST: KeyPath = ("schedule", "breadth_first_micro_batches")
BATCH_PARTS = (TOKENS, LONGEST, DEPTH_FIRST, BREADTH_FIRST)
ISOLATION: KeyPath = ("batch", "cross_document_attention")
LOSSES: KeyPath = (*BASE, "head", "losses")
DECODER: KeyPath = (*BASE, "decoder")
BLOCK: KeyPath = (*DECODER, "block")

RULES: dict[KeyPath, Rule] = {(*BASE, *path(key)): rule for key, rule in _BASE_RULES.items()} | {
    TOKENS: Part((("batch", "micro_batch_size"),)),
    LONGEST: Part(()),
    DEPTH_FIRST: Part((("batch", "sequential_micro_batches"),)),
    BREADTH_FIRST: Part((("batch", "sequential_micro_batches"),)),
    ("schedule", "micro_batch_splits"): Only(
        (None, 1), "rows are not split along the sequence; use a smaller micro-batch"
    ),
}
"""Every key of the dialect that has a meaning of its own, and what becomes of it."""

SECTIONS: dict[KeyPath, list[str]] = {}
"""The sections that only this dialect has, and the keys in each."""
for _key in RULES:
    for _length in range(len(BASE) + 1, len(_key)):
        if _key[_length] not in SECTIONS.setdefault(_key[:_length], []):
            SECTIONS[_key[:_length]].append(str(_key[_length]))

ROOTS: tuple[KeyPath, ...] = tuple(
    dict.fromkeys(key[: len(BASE) + 1] if key[:2] == BASE else key for key in RULES)
)
"""Where the walk through a document begins."""


@dataclass(frozen=True)
class Alike:
    """Several keys of the dialect that are one here: they must say the same."""

    parts: tuple[KeyPath, ...]
    target: KeyPath
    default: Any
    why: str


ALIKE: tuple[Alike, ...] = tuple(
    Alike(
        tuple((*BASE, *path(f"{place}.normalization.{key}")) for place in ("decoder.block", "head")),
        (*BASE, "transformer", "normalization", key),
        default,
        "blocks and head have one normalization here",
    )
    for key, default in (("type", "layer_norm"), ("epsilon", 1e-5), ("zero_centered", False))
)

STARTS: tuple[tuple[tuple[KeyPath, ...], KeyPath], ...] = tuple(
    (tuple((*BASE, *path(f"{name}.initialization")) for name in names), (*BASE, *path(target)))
    for names, target in (
        (tuple(f"{name}.weight" for name in QKV), "transformer.init_method_*_qkv"),
        ((f"{OUTPUT}.weight",), "transformer.init_method_*_attn_proj"),
        ((f"{MLP_1}.weight",), "transformer.init_method_*_mlp_1"),
        ((f"{MLP_2}.weight",), "transformer.init_method_*_mlp_2"),
        (("embeddings.word_embeddings", "head.output_weight"), "init_method_*_embed"),
    )
)
"""`initialization` sections that are one today, and today's keys with `*` for std, min and max."""

BIAS_PARTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (QKV, f"{_MIXER}.add_linear_biases"),
    ((OUTPUT,), f"{_MIXER}.add_linear_biases"),
    ((MLP_1, MLP_2), f"{_MLP}.add_linear_biases"),
)
"""For each of (query/key/value, attention output, feed-forward): its linear layers, and the key where they say nothing."""
BIAS_TARGET: KeyPath = (*BASE, "transformer", "add_linear_biases")
BIAS_WORDS = {where: word for word, where in BIASES.items()}

# What makes a section one of this dialect's, or of the older one. Keys that both have, or that have no other spelling
# today, say nothing.
NEWEST_MODEL: tuple[KeyPath, ...] = tuple(root for root in ROOTS if root[:2] == BASE)
OLDER_MODEL: tuple[KeyPath, ...] = (
    *((*BASE, key) for key in ("vocab_size", "tie_word_embeddings", "use_position_embeddings")),
    *(
        (*BASE, "transformer", key)
        for key in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "head_groups",
            "kv_channels",
            "ffn_hidden_size",
            "gated",
            "activation_type",
            "add_linear_biases",
            "normalization",
            "rotary",
            "use_rotary_embeddings",
            "rotary_embedding_scale",
        )
    ),
)
NEWEST_DATA: tuple[KeyPath, ...] = (
    TOKENS,
    LONGEST,
    *(("data", key) for key in ("seed", "gpu", "shuffle")),
    DEPTH_FIRST,
    BREADTH_FIRST,
)
OLDER_DATA: tuple[KeyPath, ...] = (
    *(
        ("batch", key)
        for key in (
            "micro_batch_size",
            "sequential_micro_batches",
            "depth_first_micro_batches",
            "breadth_first_micro_batches",
            "micro_sequence_length",
        )
    ),
    *(("data", key) for key in ("sampling", "format", "path", "split")),
)

MODEL_DEFAULTS: dict[KeyPath, Any] = {
    (*BASE, "tie_word_embeddings"): False,
    (*BASE, "transformer", "kv_channels"): 128,
    (*BASE, "transformer", "ffn_hidden_size"): 4096,
}
"""Its defaults that are not today's. The initial weights of output projections are another (`translation.py`)."""
OUTPUT_STARTS: tuple[KeyPath, ...] = tuple(
    (*BASE, "transformer", f"init_method_std_{name}") for name in ("attn_proj", "mlp_2")
)
DATA_DEFAULTS: dict[KeyPath, Any] = {
    ISOLATION: False,
    ("batch", "use_loss_masking_spans"): "auto",
}
TODAYS_DEFAULTS: dict[KeyPath, str] = {
    (*BASE, "tie_word_embeddings"): "yes",
    (*BASE, "transformer", "kv_channels"): "hidden_size / num_attention_heads",
    (*BASE, "transformer", "ffn_hidden_size"): "4 x hidden_size",
    **dict.fromkeys(OUTPUT_STARTS, "init_method_std / sqrt(2 x num_layers)"),
    ISOLATION: "yes",
    ("batch", "use_loss_masking_spans"): "no",
    ("batch", "micro_batch_size"): "all rows of a process",
}
"""What holds today where that dialect has another default, in words."""
DEFAULT_TOKENS = 2048
"""Its `data.micro_batch_size` where none is given, in tokens."""

RENAMED: dict[str, str] = {
    "model.base_model.output_layer.tied_weight": "model.base_model.tied_embedding_weight",
    "model.base_model.output_layer": "model.base_model.head",
    "model.base_model.embeddings_layer": "model.base_model.embeddings",
    "model.distributed.compute_dtype": "model.distributed.training_dtype",
    "data.seed": "data.sampling.seed",
    "data.gpu": "data.sampling.gpu",
    "data.shuffle": "data.sampling.shuffle",
}
"""Keys that have another name today and the same meaning (the first three: of the weeks around 0.3.0)."""


def newest_keys(section: KeyPath) -> list[str]:
    """The dialect's own keys in `section`, for the nearest name of a misspelt one."""
    if not section:
        return []  # It has no sections of its own.
    keys = [*RULES, *map(path, RENAMED)]
    return list(
        dict.fromkeys(
            str(key[len(section)])
            for key in keys
            if len(key) > len(section) and key[: len(section)] == section
        )
    )
