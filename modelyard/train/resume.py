"""Whether a run may go on from a checkpoint under a config that has changed since."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from modelyard.config.adapter import Adapter, adapter_to_dict
from modelyard.config.architecture import Architecture
from modelyard.config.optimizer import LearningRateConfig
from modelyard.config.peft import PeftConfig, adapter_of
from modelyard.config.train import TrainConfig
from modelyard.errors import UserError
from modelyard.train.checkpoint import Checkpoint
from modelyard.train.schedule import learning_rate

# Where a change cannot alter what was already trained: how it is computed, not what.
_FREE = (
    "batch.micro_batch_size",
    "batch.sequential_micro_batches",
    "data.sampling.gpu",
    "optimizer.gradient_scaler",
    "optimizer.state",
)
# The shape is compared as an `Architecture`; once there is a checkpoint, nothing is read from `pretrained.path`.
_BOUND = (
    "batch",
    "data.sampling",
    "optimizer",
    "pretrained.model_weights",
    "model.base_model.logit_z_loss",
    "model.base_model.logits_scale_factor",
    "model.base_model.embeddings_lr_scale",
    "model.base_model.output_lr_scale",
    "model.base_model.transformer.attention_lr_scale",
    "model.base_model.transformer.mlp_lr_scale",
    "model.base_model.transformer.per_layer_lr_scale",
    *(f"model.base_model.init_method_{word}_embed" for word in ("std", "min", "max")),
    *(
        f"model.base_model.transformer.init_method_{word}{part}"
        for word in ("std", "min", "max")
        for part in ("", "_qkv", "_attn_proj", "_mlp_1", "_mlp_2")
    ),
    "model.distributed.seed",
    "model.distributed.training_dtype",
)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`; lists are leaves."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat


def binding_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: was X, is now Y` for each change that would alter what was already trained.

    The learning rate is left out: the schedule may change from here on, and `schedule_difference` compares what it
    was so far. Intervals, evaluators, logging, the number of iterations and the micro-batch size are free.
    """
    before, now = flatten(old), flatten(new)
    return [
        f"{key}: was {before.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and _binds(key)
    ]


def _binds(key: str) -> bool:
    return _in(_BOUND, key) and not _in((*_FREE, "optimizer.learning_rate"), key)


def _in(sections: Collection[str], key: str) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def schedule_difference(old: LearningRateConfig, new: LearningRateConfig, steps: int) -> str | None:
    """Where the new schedule departs from the old one within the first `steps` updates; None where it does not."""
    for step in range(1, steps + 1):
        was, is_now = learning_rate(old, step), learning_rate(new, step)
        if was != is_now:
            return (
                f"optimizer.learning_rate: at step {step} of the {steps} already taken it was {was:g}, "
                f"the schedule now says {is_now:g}"
            )
    return None


def run_differences(
    old_config: dict[str, Any],
    old_architecture: Architecture,
    old_fingerprint: str,
    *,
    config: TrainConfig,
    architecture: Architecture,
    data_fingerprint: str,
) -> list[str]:
    """Lines on everything but the learning rate that makes a run of `config` another run than the old one."""
    new_config = config.model_dump(mode="json")
    written = flatten(config.model_dump(mode="json", exclude_defaults=True))
    # A key that there was not when the checkpoint was saved stood at its default.
    defaults = {key: value for key, value in flatten(new_config).items() if key not in written}
    differences = binding_differences(defaults | flatten(old_config), new_config)
    # The longest position is a word in exports; nothing is computed from it.
    before, now = (
        flatten(dataclasses.asdict(dataclasses.replace(shape, max_position_embeddings=None)))
        for shape in (old_architecture, architecture)
    )
    differences += [
        f"architecture.{k}: was {before[k]!r}, is now {now[k]!r}" for k in now if before[k] != now[k]
    ]
    differences += adapter_differences(_adapter(old_config), _adapter(new_config))
    explained = any(line.startswith(("data.sampling", "batch.")) for line in differences)
    if old_fingerprint != data_fingerprint and not explained:
        differences.append(
            "data.datasets.training: the rows are not those that this run was trained on so far"
        )
    return differences


def adapter_differences(old: Adapter | None, new: Adapter | None) -> list[str]:
    """Lines on what makes an adapter another one, however the configs write it."""
    section = "model.base_model.transformer.peft"
    if old is None or new is None:
        kinds = ["none" if one is None else "lora" for one in (old, new)]
        return [] if old == new else [f"{section}.type: was {kinds[0]!r}, is now {kinds[1]!r}"]
    before, now = flatten(adapter_to_dict(old)), flatten(adapter_to_dict(new))
    return [
        f"{section}.{key}: was {before.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _adapter(config: dict[str, Any]) -> Adapter | None:
    """The adapter of a resolved config, perhaps of a version that had none."""
    section = config["model"]["base_model"]["transformer"].get("peft")
    return adapter_of(PeftConfig.model_validate(section or {}))


def _saved_shapes(adapter: Adapter | None, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The parameters that a checkpoint has."""
    if adapter is None:
        return architecture.parameter_shapes()
    own = adapter.shapes(architecture)
    return own if adapter.freeze_others else architecture.parameter_shapes() | own


def refuse_changes(
    checkpoint: Checkpoint,
    config: TrainConfig,
    architecture: Architecture,
    data_fingerprint: str,
    *,
    force: bool,
) -> list[str]:
    """Raise UserError when going on from `checkpoint` under `config` would alter what was already trained.

    With `force` the differences are returned instead, as lines. From an average nothing can go on, forced or not.
    """
    if checkpoint.is_average:
        raise UserError(
            f"{checkpoint.folder} is an average of models, without optimizer state: no run can go on from it; move it out of "
            f"{checkpoint.folder.parent}, and to train from its weights name it as pretrained.path of a new run"
        )
    old = checkpoint.config
    differences = run_differences(
        old,
        checkpoint.architecture,
        checkpoint.state["data_fingerprint"],
        config=config,
        architecture=architecture,
        data_fingerprint=data_fingerprint,
    )
    old_rates = LearningRateConfig.model_validate(old["optimizer"]["learning_rate"])
    new_rates = config.optimizer.learning_rate
    if old_rates != new_rates:
        difference = schedule_difference(old_rates, new_rates, checkpoint.state["optimizer_steps"])
        differences += [difference] if difference else []
    # With other parameters than those of the checkpoint nothing can go on; --force does not help.
    now = adapter_of(config.model.base_model.transformer.peft)
    before = _saved_shapes(_adapter(old), checkpoint.architecture)
    is_another = before != _saved_shapes(now, architecture)
    if differences and (is_another or not force):
        way_out = "" if is_another else ", or go on all the same with --force"
        raise UserError(
            *differences,
            f"these changes would alter what {checkpoint.folder} was trained with: undo them, choose another "
            f"run.experiment_dir{way_out}",
        )
    return differences
