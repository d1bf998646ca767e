"""Learning rates of single parameters, relative to the schedule's: `*_lr_scale` in the model's section. No torch."""

from __future__ import annotations

from modelyard.config.adapter import MODULES, is_adapter_parameter
from modelyard.config.architecture import Architecture
from modelyard.config.model import BaseModelConfig
from modelyard.config.peft import adapter_of, modules_of


def rate_scales(model: BaseModelConfig, architecture: Architecture, default: float = 1.0) -> dict[str, float]:
    """The factor on the learning rate of each logical parameter; 0 where it is frozen.

    A block's own factor and that of the kind of layer in it multiply; `default` (optimizer.default_learning_rate_scale)
    holds where neither is given. Norms have their block's factor, the final norm the default. Beside adapters that alone are
    trained everything else is frozen.
    """
    transformer = model.transformer
    of_kind = {
        "embed_tokens": model.embeddings_lr_scale,
        "embed_positions": model.embeddings_lr_scale,
        "lm_head": model.output_lr_scale,
        "self_attn": transformer.attention_lr_scale,
        "mlp": _one(transformer.mlp_lr_scale),
    }
    of_layer = transformer.per_layer_lr_scale or []
    scales = {}
    adapter = adapter_of(transformer.peft)
    shapes = architecture.parameter_shapes() | (adapter.shapes(architecture) if adapter else {})
    for name in shapes:
        if adapter is not None and adapter.freeze_others and not is_adapter_parameter(name):
            scales[name] = 0.0
            continue
        parts = name.split(".")
        inside = parts[0] == "layers"
        given = [of_kind.get(parts[2] if inside else parts[0])]
        if inside and int(parts[1]) < len(of_layer):
            given.append(of_layer[int(parts[1])])
        factors = [factor for factor in given if factor is not None]
        scale = default if not factors else 1.0
        for factor in factors:
            scale *= factor
        scales[name] = scale
    return scales


def scale_problems(
    model: BaseModelConfig, architecture: Architecture, default: float = 1.0
) -> list[tuple[str, str]]:
    """What of the factors cannot be meant: (key below model.base_model, one-line problem with the line to write)."""
    problems = []
    layers = model.transformer.per_layer_lr_scale
    if layers is not None and len(layers) != architecture.num_layers:
        problems.append(
            (
                "transformer.per_layer_lr_scale",
                f"there are {len(layers)} numbers for {architecture.num_layers} layers; write one a layer (null: as the rest)",
            )
        )
    if isinstance(model.transformer.mlp_lr_scale, list) and len(model.transformer.mlp_lr_scale) > 1:
        problems.append(
            (
                "transformer.mlp_lr_scale",
                "there is one feed-forward in a layer, not several experts; write one number",
            )
        )
    if model.output_lr_scale is not None and architecture.tie_word_embeddings:
        problems.append(
            (
                "output_lr_scale",
                "the output layer is the embedding (tie_word_embeddings: yes); write embeddings_lr_scale",
            )
        )
    is_empty = model.transformer.peft.type == "lora" and not modules_of(
        model.transformer.peft
    )  # said elsewhere
    if not problems and not is_empty and not any(rate_scales(model, architecture, default).values()):
        problems.append(("transformer", "every parameter is frozen: no learning-rate scale is above 0"))
    return problems


def without_effect(model: BaseModelConfig) -> dict[str, str]:
    """Factors below model.base_model that hold for nothing that is trained, and why."""
    adapter = adapter_of(model.transformer.peft)
    if adapter is None or not adapter.freeze_others:
        return {}
    frozen = "it keeps its values beside an adapter (peft.freeze_others: yes)"
    found = {"embeddings_lr_scale": frozen, "output_lr_scale": frozen}
    if not set(adapter.modules) & set(MODULES[:4]):
        found["transformer.attention_lr_scale"] = "no matrix of the attention has an adapter"
    if not set(adapter.modules) & set(MODULES[4:]):
        found["transformer.mlp_lr_scale"] = "no matrix of the feed-forward has an adapter"
    return found


def _one(scale: float | list[float | None] | None) -> float | None:
    return (scale[0] if scale else None) if isinstance(scale, list) else scale
