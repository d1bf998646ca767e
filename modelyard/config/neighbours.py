"""Keys of the dialect that Modelyard reads without acting on them: harmless values pass, others are refused by name.

Everything that has an effect is a field of a section. What is left is two tables: keys that can be anything because
nothing here depends on them (`NO_EFFECT`, shown by `modelyard validate`), and keys of features that are not built,
accepted at the value that switches the feature off (`NOT_BUILT`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelyard.config.document import Document, KeyPath, dotted
from modelyard.errors import did_you_mean


@dataclass(frozen=True)
class NoEffect:
    """A key that is accepted and does nothing here, and why."""

    key: str
    kind: type
    """Type its value must have (or null); `dict` accepts a whole section."""
    why: str

    @property
    def path(self) -> KeyPath:
        return tuple(self.key.split("."))


@dataclass(frozen=True)
class NotBuilt:
    """A key of a feature that is not there: accepted at `harmless`, refused otherwise."""

    key: str
    harmless: tuple[Any, ...]
    instead: str
    """What to do about it, or why it is not there."""

    @property
    def path(self) -> KeyPath:
        return tuple(self.key.split("."))


_TRANSFORMER = "model.base_model.transformer"
_DISTRIBUTED = "model.distributed"
_NEVER = (None,)

NO_EFFECT = (
    NoEffect(
        "training.num_workers", int, "batches are read from memory-mapped stores, without worker processes"
    ),
    NoEffect("training.prefetch_factor", int, "as num_workers"),
    NoEffect("training.timeout", float, "model.distributed.timeout limits every wait for other processes"),
    NoEffect(
        "training.export.parameters_per_file", int, "export shards have the size that transformers gives them"
    ),
    NoEffect("pretrained.timeout", float, "model.distributed.timeout limits every wait for other processes"),
    NoEffect("model.base_model.cross_entropy_splits", int, "the fused cross-entropy chooses its own pieces"),
    NoEffect(
        "model.base_model.parallel_embeddings", bool, "tensor-parallel processes always share the vocabulary"
    ),
    NoEffect("model.base_model.sequence_first", bool, "an order of dimensions in memory"),
    NoEffect(
        f"{_TRANSFORMER}.use_flash_attention", bool, "the fastest attention of the hardware is always used"
    ),
    NoEffect(f"{_TRANSFORMER}.rotary.triton", bool, "chooses a kernel; exports have one layout"),
    NoEffect(f"{_TRANSFORMER}.normalization.implementation", str, "chooses a kernel"),
    NoEffect(
        f"{_TRANSFORMER}.mlp_recompute_level", str, "saves memory only; model.multi_stage.recompute does"
    ),
    NoEffect(
        "model.multi_stage.num_grad_buffers", int, "FSDP has as many as it takes to send while computing"
    ),
    NoEffect("model.multi_stage.num_weight_buffers", int, "as num_grad_buffers"),
    NoEffect("model.multi_stage.full_precision_gradients", bool, "gradients are always summed in float32"),
    NoEffect(
        "model.multi_stage.store_frozen_weights_in_optimization_precision",
        bool,
        "what is frozen beside an adapter is kept in the type that is computed in, the rest in float32",
    ),
    NoEffect(f"{_DISTRIBUTED}.reproducible_init", bool, "initial weights never depend on the layout"),
    NoEffect("run.experiment_name", str, "a label; the folder's name is the run's"),
    NoEffect("run.model_debug_level", int, "nothing is logged of the layers' inside"),
    NoEffect("run.structured_logs", bool, "metrics.jsonl is always written"),
    NoEffect("run.log_timestamps", bool, "lines of metrics.jsonl carry the time"),
    NoEffect("run.enable_all_loggers", bool, "there is one logger"),
    NoEffect("run.torch_dynamo_enable", bool, "chooses how kernels are made"),
    NoEffect("run.enable_triton_kernels", bool, "chooses kernels"),
    NoEffect("run.triton_linear_kernels", bool, "chooses kernels"),
    NoEffect("schedule.pipeline_overlap", bool, "what is sent always overlaps with computation where it can"),
    NoEffect("schedule.data_overlap", bool, "as pipeline_overlap"),
    NoEffect("schedule.throttle_cpu", bool, "the host is never far ahead"),
    NoEffect("schedule.throttle_cpu_rate", int, "as throttle_cpu"),
    NoEffect("schedule.throttle_cpu_delay", int, "as throttle_cpu"),
    NoEffect("schedule.data_batch_warn_time_ms", float, "the log line shows what is slow"),
    NoEffect("data.data_sample_warn_time_ms", float, "the log line shows what is slow"),
    NoEffect("profiling.table_width", int, "the tables in EXPERIMENT_DIR/profile have the width they need"),
    NoEffect("profiling.log", bool, "tables are written to EXPERIMENT_DIR/profile"),
    NoEffect("data.multiprocessing_context", str, "batches are read without worker processes"),
)

NOT_BUILT = (
    NotBuilt("training.checkpoint.callback", ({}, None), "shell callbacks are not run"),
    NotBuilt("training.export.callback", ({}, None), "shell callbacks are not run"),
    NotBuilt(
        "training.export.model_weights",
        (True,),
        "an export is its weights; set export.interval: null for none",
    ),
    NotBuilt(
        "training.export.optimizer_state",
        (False, None),
        "checkpoints hold the optimizer state, exports do not",
    ),
    NotBuilt(
        "batch.breadth_first_micro_batches",
        (1, None),
        "model.distributed.pipeline_schedule has the order of micro-batches; write batch.sequential_micro_batches",
    ),
    NotBuilt(
        "batch.micro_sequence_length",
        _NEVER,
        "rows are not split in time; use a smaller micro_batch_size, or model.distributed.sequence_data_parallel",
    ),
    NotBuilt("data.fim", ({}, None), "fill-in-the-middle is not supported yet"),
    NotBuilt("data.tokenizer.bos_token", _NEVER, "the tokenizer's own is used"),
    NotBuilt(
        "pretrained.optimizer_state",
        (False,),
        "a Hugging Face folder has none; a run resumes from its own checkpoints",
    ),
    NotBuilt("reference_models", ({}, None), "distillation and DPO are not supported yet"),
    NotBuilt("model.base_model.prediction_heads", (1,), "several prediction heads are not supported"),
    NotBuilt(
        "model.base_model.prediction_loss_coefficient", _NEVER, "several prediction heads are not supported"
    ),
    NotBuilt("model.base_model.distillation_model", _NEVER, "distillation is not supported yet"),
    NotBuilt("model.base_model.enable_dpo", (False, None), "preference tuning is not supported yet"),
    NotBuilt("model.base_model.dpo_beta", (1, 1.0, None), "preference tuning is not supported yet"),
    NotBuilt("model.base_model.dpo_reference_model", _NEVER, "preference tuning is not supported yet"),
    NotBuilt(
        "model.base_model.use_megatron_initialization",
        (False,),
        "initial weights have one rule; see init_method_std",
    ),
    NotBuilt(
        f"{_TRANSFORMER}.attention_dropout", (0, 0.0), "dropout is not supported; write attention_dropout: 0"
    ),
    NotBuilt(f"{_TRANSFORMER}.hidden_dropout", (0, 0.0), "dropout is not supported; write hidden_dropout: 0"),
    NotBuilt(
        f"{_TRANSFORMER}.num_experts", (1,), "mixtures of experts are not supported; write num_experts: 1"
    ),
    NotBuilt(f"{_TRANSFORMER}.num_shared_experts", (0,), "mixtures of experts are not supported"),
    NotBuilt(f"{_TRANSFORMER}.num_experts_per_token", (1,), "mixtures of experts are not supported"),
    NotBuilt(f"{_TRANSFORMER}.expert_routing_type", ("aux_loss",), "mixtures of experts are not supported"),
    NotBuilt(
        f"{_TRANSFORMER}.expert_auxiliary_loss_coefficient", (0.01,), "mixtures of experts are not supported"
    ),
    NotBuilt(f"{_TRANSFORMER}.expert_z_loss_coefficient", (0, 0.0), "mixtures of experts are not supported"),
    NotBuilt(f"{_TRANSFORMER}.moe_jitter_eps", (0, 0.0), "mixtures of experts are not supported"),
    NotBuilt(f"{_TRANSFORMER}.dropless_moe", (True,), "mixtures of experts are not supported"),
    NotBuilt(f"{_TRANSFORMER}.router_lr_scale", (1, 1.0, None), "mixtures of experts are not supported"),
    NotBuilt(
        f"{_TRANSFORMER}.normalization.zero_centered",
        (False,),
        "norm weights are stored as they are used; as they are not decayed, zero_centered: no trains the same model",
    ),
    NotBuilt(
        "model.multi_stage.layers_per_stage",
        (1, 1.0),
        "layers are split over the stages by what they cost; model.distributed.stages_per_process says how many there are",
    ),
    NotBuilt(
        "model.multi_stage.stages_per_pipeline_stage", (1,), "write model.distributed.stages_per_process"
    ),
    NotBuilt("model.multi_stage.compile_all", (False,), "the program decides what is compiled"),
    NotBuilt(
        f"{_DISTRIBUTED}.optimization_dtype", ("float32", "fp32", "float"), "optimizer state is float32"
    ),
    *(
        NotBuilt(f"{_DISTRIBUTED}.{key}", _NEVER, "torchrun or --nproc says how many processes there are")
        for key in ("world_size", "rank", "local_world_size")
    ),
    NotBuilt(
        f"{_DISTRIBUTED}.use_cuda",
        (True, None),
        "a GPU is used where there is one; CUDA_VISIBLE_DEVICES= in front of the command hides it",
    ),
    NotBuilt(
        f"{_DISTRIBUTED}.force_cpu_initialization",
        (False, None),
        "initial weights are drawn on the device that trains",
    ),
    NotBuilt(
        f"{_DISTRIBUTED}.pipeline_first",
        (False,),
        "neighbours in rank are, from the nearest on: tensor, sequence, pipeline, data",
    ),
    NotBuilt(
        "schedule.profile_schedule",
        (False,),
        "a pipeline's schedule is not drawn; training.profiling.iterations writes traces",
    ),
    NotBuilt("profiling.ranks", ({}, [], [0], None), "rank 0 is the one that is traced"),
)


PURE_SECTIONS: tuple[KeyPath, ...] = (
    ("schedule",),
    ("reference_models",),
)
"""Sections that consist of these tables' keys alone."""


def take_neighbours(document: Document) -> tuple[list[str], list[NoEffect]]:
    """Remove the keys of both tables from `document`; return problems, and the rows of `NO_EFFECT` that were there."""
    problems: list[str] = []
    without_effect = []
    for row in NO_EFFECT:
        if document.has(row.path):
            if not _is_kind(document.get(row.path), row.kind):
                shown = _shown(document.get(row.path))
                problems.append(
                    f"{document.origin(row.path)}: {row.key} = {shown}: expected {_KIND_WORDS[row.kind]}"
                )
            without_effect.append(row)
            _take(document, row.path)
    for feature in NOT_BUILT:
        if document.has(feature.path):
            value = document.get(feature.path)
            if not any(value == harmless and type(value) is type(harmless) for harmless in feature.harmless):
                problems.append(
                    f"{document.origin(feature.path)}: {feature.key} = {_shown(value)}: {feature.instead}"
                )
            _take(document, feature.path)
    for section in PURE_SECTIONS:
        if document.has(section):
            problems += _left_over(document, section)
            _take(document, section)
    return problems, without_effect


def _left_over(document: Document, section: KeyPath) -> list[str]:
    value, keys = document.get(section), neighbour_keys(section)
    if value is None:
        return []
    if not isinstance(value, dict):
        return [
            f"{document.origin(section)}: {dotted(section)} = {_shown(value)}: expected a section with keys {', '.join(keys)}"
        ]
    return [
        f"{document.origin((*section, key))}: unknown key '{key}' in {dotted(section)}"
        f"{did_you_mean(key, keys) or '; known keys: ' + ', '.join(keys)}"
        for key in value
    ]


def _is_kind(value: Any, kind: type) -> bool:
    if value is None:
        return True
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is int and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


_KIND_WORDS = {int: "a whole number", float: "a number", bool: "yes or no", str: "text", dict: "a section"}


def _take(document: Document, path: KeyPath) -> None:
    document.take(path)
    document.prune(path[:-1])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "null" if value is None else str(value)


def neighbour_keys(section: KeyPath) -> list[str]:
    """Names of the tables' keys directly in `section`."""
    paths = [row.path for row in NO_EFFECT] + [feature.path for feature in NOT_BUILT]
    names = {
        str(path[len(section)])
        for path in paths
        if path[: len(section)] == section and len(path) > len(section)
    }
    return sorted(names)
