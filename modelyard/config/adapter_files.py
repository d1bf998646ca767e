"""Adapters on disk, as far as their files tell without torch: PEFT's folders, and checkpoints of runs that train an adapter.

A PEFT folder has `adapter_config.json` and `adapter_model.safetensors`. Those that are written here also have
`modelyard_adapter.json`, which says what PEFT's file has no place for:

    format_version   1
    base             path and fingerprint (`train.models_on_disk.base_fingerprint`) of what was adapted
    quantization     of that base while it was trained on (block, double); null: none
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelyard.config.adapter import LAYERS, MODULES, Adapter, Quantization, adapter_from
from modelyard.config.peft import quantization_keys
from modelyard.errors import UserError
from modelyard.files import numbered_folders

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "modelyard_adapter.json"
BASE_FILE_VERSION = 1

_OTHER_NAMES = {"c_fc": "up_proj", "c_proj": "down_proj"}
"""What starcoder2 calls matrices of its blocks; in the other families they have our names."""
_EVERY_MATRIX = "all-linear"
"""PEFT's word for every linear layer but the head: the matrices of the blocks."""
_FIRST_VALUES = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin an adapter that leave the base's weights as they are; others subtract something from them."""
_OF_NO_EFFECT = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "megatron_core", "qalora_group_size",
        "eva_config", "loftq_config", "runtime_config", "ensure_weight_tying",
    }
)  # fmt: skip
"""Keys of adapter_config.json that say nothing about what is computed."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a folder, and what it was trained on."""

    folder: Path
    adapter: Adapter
    base_path: str | None
    """As it is written there: a folder or a name on the hub. None: not said, or the folder has the base inside."""
    fingerprint: str | None
    """Of the base's weights; None where nobody took it."""
    is_peft: bool

    @property
    def knows_quantization(self) -> bool:
        """Whether it says how its base was kept in training. PEFT's own files do not."""
        return not self.is_peft or self.fingerprint is not None


def is_peft_folder(folder: Path) -> bool:
    """Whether `folder` holds an adapter as PEFT writes it."""
    return (folder / PEFT_CONFIG).is_file()


def stored_adapter(folder: Path) -> StoredAdapter | None:
    """The adapter in a PEFT folder or a checkpoint; None where there is none. Raises UserError where it cannot be used."""
    if is_peft_folder(folder):
        return _read_peft(folder)
    path = folder / "state.json"
    if not path.is_file():
        return None
    state = _read_json(path)
    if state.get("adapter") is None:
        return None
    base = state.get("base") or {}
    try:
        adapter = adapter_from(state["adapter"])
        return StoredAdapter(folder, adapter, base.get("path"), base.get("fingerprint"), is_peft=False)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not describe an adapter that can be read ({error!r})") from None


def no_adapter(folder: Path) -> str:
    """What is wrong with a folder in which `stored_adapter` finds none, in one line with the folder that may be meant."""
    for inside in (folder / "checkpoint", folder / "export" / "peft", folder):
        if found := [each for each in numbered_folders(inside) if _may_hold_one(each)]:
            which = "one of its checkpoints" if inside.name == "checkpoint" else "one of its adapters"
            return f"{folder} is the folder of {'a run' if inside != folder else 'exports'}; name {which}: {found[-1]}"
    return (
        f"{folder} holds no adapter: neither adapter_config.json nor a checkpoint of a run that trained one"
    )


def _may_hold_one(folder: Path) -> bool:
    try:
        return stored_adapter(folder) is not None
    except UserError:
        return False


_WORDS = ("query", "key", "value", "dense", "mlp_1", "mlp_2")
"""Words of `peft.layers` that mean no matrix twice."""


def origin_of(stored: StoredAdapter) -> str:
    """The file that says what an adapter is like."""
    return str(stored.folder / (PEFT_CONFIG if stored.is_peft else "state.json"))


def peft_section(stored: StoredAdapter, *, gated: bool) -> dict[str, Any]:
    """`model.base_model.transformer.peft` for going on with an adapter of a model whose feed-forward is `gated` or not.

    Raises UserError where `layers` has no word for the matrices that it adapts.
    """
    adapter = stored.adapter
    present = [module for module in MODULES if gated or module != "gate_proj"]
    adapted = [module for module in present if module in adapter.modules]
    of_word = {word: [module for module in modules if module in present] for word, modules in LAYERS.items()}
    layers = [word for word in _WORDS if set(of_word[word]) <= set(adapted)]
    if [module for module in present if any(module in of_word[word] for word in layers)] != adapted:
        raise UserError(
            f"{stored.folder} adapts one of gate_proj and up_proj without the other, for which peft.layers has no word; merge "
            "it first (modelyard merge)"
        )
    return {
        "type": "lora",
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "dropout": adapter.dropout,
        "layers": layers,
        "rank_stabilized": adapter.rank_stabilized,
        "dora": adapter.dora,
        **quantization_keys(adapter.quantization),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return values


# --- PEFT's file ------------------------------------------------------------------------------------------------


def _read_peft(folder: Path) -> StoredAdapter:
    path = folder / PEFT_CONFIG
    config = _read_json(path)
    problems = [f"{path}: {problem}" for problem in _unsupported(config)]
    if problems:
        raise UserError(*problems)
    base, fingerprint, quantization = config.get("base_model_name_or_path"), None, None
    if (folder / BASE_FILE).is_file():
        base, fingerprint, quantization = _read_base_file(folder / BASE_FILE)
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: base_model_name_or_path should be a folder's name, not {base!r}")
    adapter = Adapter(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        modules=_modules(config["target_modules"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        rank_stabilized=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        quantization=quantization,
    )
    return StoredAdapter(folder, adapter, base or None, fingerprint, is_peft=True)


def _read_base_file(path: Path) -> tuple[str, str, Quantization | None]:
    values = _read_json(path)
    if values.get("format_version") != BASE_FILE_VERSION:
        raise UserError(
            f"{path} has format {values.get('format_version')!r}; this version reads {BASE_FILE_VERSION}"
        )
    try:
        quantization = values["quantization"]
        found = None if quantization is None else Quantization(**quantization)
        return str(values["base"]["path"]), str(values["base"]["fingerprint"]), found
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r})") from None


def _modules(targets: str | Sequence[str]) -> tuple[str, ...]:
    """PEFT's target modules as ours, in the model's order."""
    if isinstance(targets, str):
        return MODULES
    named = {_module(target) for target in targets}
    return tuple(module for module in MODULES if (module, None) in named or (module, 0) in named)


def _module(target: str) -> tuple[str, int | None] | None:
    """The matrix that a target module means, and its layer, None for all: `q_proj`, `self_attn.q_proj`,
    `model.layers.0.self_attn.q_proj`. None for anything else."""
    found = _TARGET.fullmatch(target)
    if found is None:
        return None
    layer, parent, last = found.groups()
    module = _OTHER_NAMES.get(last, last)
    inside = "self_attn" if module in MODULES[:4] else "mlp"
    if module not in MODULES or parent not in (None, inside):
        return None
    return module, None if layer is None else int(layer)


_TARGET = re.compile(r"(?:model\.layers\.(\d+)\.)?(?:(\w+)\.)?(\w+)")


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """What of a parsed adapter_config.json cannot be represented, one line each."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"peft_type {kind!r} is not supported (only 'LORA')"]
    problems = []
    for key, why in _REFUSED.items():
        if not _is_empty(config.get(key)):
            problems.append(f"{key} {_short(config[key])} is not supported: {why}")
    if config.get("bias", "none") != "none":
        problems.append(
            f"bias {config['bias']!r} is not supported (only 'none'): it trains the base's biases too"
        )
    if (first := config.get("init_lora_weights", True)) not in _FIRST_VALUES:
        problems.append(
            f"init_lora_weights {first!r} is not supported: it changed the base's weights; convert it with PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key, (fits, wanted) in _NUMBERS.items():
        value = config.get(key, 0 if key == "lora_dropout" else None)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
            problems.append(f"{key} should be {wanted}, not {value!r}")
    problems += _target_problems(config.get("target_modules"))
    known = {*_REFUSED, *_NUMBERS, *_OF_NO_EFFECT, *_READ}
    return problems + [
        f"{key} {_short(value)} is not known here, nor what it does to the model"
        for key, value in config.items()
        # A strength of 0.0 does nothing; a whole 0 may be the number of a layer.
        if key not in known and not _is_empty(value) and not (isinstance(value, float) and value == 0)
    ]


def _is_empty(value: Any) -> bool:
    """Whether a key says nothing: 0 may be the first of something, `layers_to_transform: 0` the first layer."""
    return value is None or value is False or value in ("", [], {})


def _target_problems(targets: Any) -> list[str]:
    if targets == _EVERY_MATRIX:
        return []
    if isinstance(targets, str):
        return [
            f"target_modules {targets!r} is a pattern; name the modules in a list (of {', '.join(MODULES)})"
        ]
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        return [f"target_modules should be a list of modules' names, not {_short(targets)}"]
    if other := [target for target in targets if _module(target) is None]:
        return [
            f"target_modules names {_short(other)}: only matrices that every block has are adapted ({', '.join(MODULES)})"
        ]
    named = [found for target in targets if (found := _module(target))]
    layers = {layer for _, layer in named if layer is not None}
    for module in dict.fromkeys(module for module, _ in named):
        of_module = {layer for name, layer in named if name == module}
        # Whether they are all that the model has, the tensors show.
        if None not in of_module and of_module != set(range(max(layers) + 1)):
            return [f"target_modules names {module} of some layers alone; every block is adapted here"]
    return []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


_REFUSED = {
    "modules_to_save": "it has whole modules beside the adapter; merge it with PEFT (merge_and_unload)",
    "rank_pattern": "every adapter has one rank here",
    "alpha_pattern": "every adapter has one alpha here",
    "layers_to_transform": "every block is adapted here",
    "layer_replication": "it repeats blocks of the base",
    "exclude_modules": "every block is adapted alike here",
    "fan_in_fan_out": "it is for transposed matrices, which no family that is read here has",
    "target_parameters": "it adapts parameters that are not those of linear layers",
    "trainable_token_indices": "it has rows of the embedding beside the adapter; merge it with PEFT (merge_and_unload)",
    "lora_bias": "an adapter has no biases here",
    "use_bdlora": "its matrices have blocks",
    "use_qalora": "it is for another kind of quantised base",
    "megatron_config": "it is for Megatron's layers",
    "alora_invocation_tokens": "it is not on for every token",
}
"""Keys that must be empty, and why."""
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "r": (lambda value: isinstance(value, int) and value > 0, "a whole number above 0"),
    "lora_alpha": (lambda value: math.isfinite(value) and value > 0, "a number above 0"),
    "lora_dropout": (lambda value: 0 <= value < 1, "a number from 0 to below 1"),
}
_READ = (
    "peft_type",
    "bias",
    "init_lora_weights",
    "target_modules",
    "base_model_name_or_path",
    "use_rslora",
    "use_dora",
    "layers_pattern",  # nothing without layers_to_transform
)


def peft_config(adapter: Adapter, targets: Sequence[str], base_path: str) -> dict[str, Any]:
    """adapter_config.json as a dictionary. `targets` are the adapted matrices' names in the base's family."""
    alpha = adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": list(targets),
        "use_rslora": adapter.rank_stabilized,
        "use_dora": adapter.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def base_file(adapter: Adapter, base_path: str, fingerprint: str) -> dict[str, Any]:
    """modelyard_adapter.json as a dictionary."""
    return {
        "format_version": BASE_FILE_VERSION,
        "base": {"path": base_path, "fingerprint": fingerprint},
        "quantization": None if adapter.quantization is None else asdict(adapter.quantization),
    }
